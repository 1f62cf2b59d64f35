"""Rules of the repository: who may import whom, what ships, what the wheel holds, what README and docs/ name."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from transformers.dynamic_module_utils import get_relative_imports

import modeling_moextend

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_moextend"
PACKAGES = [PACKAGE, ROOT / "moextend", ROOT / "moextend_cli"]  # the library, its short name, its command
SHIPPED = sorted(PACKAGE.glob("*_moextend.py"))
ORDER = (  # of the package's folders; each imports only from those before it. "": what ships, at the root
    "",
    "metrics",
    "data",
    "tools",
    "attaching",
    "serving",
    "publishing",
    "evaluation",
    "chat",
    "extender",
    "training",
    "quickstart",
)
DOORS = {  # shipped file -> what it asks the package for through `from_package`, where a user wants more than it holds
    "adapters_moextend": {"attaching", "serving", "training.reference"},
    "base_checks_moextend": {"attaching"},
    "modeling_moextend": {"attaching"},
    "persistence_moextend": {"attaching", "publishing.hub"},
    "processing_moextend": {"data.processors"},
    "tensors_moextend": {"training.trainable"},
}
MAX_SHIPPED_LINES = 4850  # what a stranger has to trust with every adapter
ALLOWED = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)
RECIPES = sorted((ROOT / "configuration" / "recipes").glob("*.yaml"))
MAX_KEYS = 30  # a recipe has fewer
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:work|root)/")


def forbidden_import(node, siblings):
    """The import of `node` as text if a shipped file may not contain it, else None."""
    if isinstance(node, ast.Import):
        allowed = all(alias.name.split(".")[0] in ALLOWED for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        allowed = node.module.split(".")[0] in ALLOWED
    elif isinstance(node, ast.ImportFrom):
        allowed = node.level == 1 and node.module in siblings
    else:
        return None
    return None if allowed else ast.unparse(node)


def forbidden_imports(source, siblings):
    """Every import in `source`, at any depth, that the Hub's flat folder of shipped files could not satisfy."""
    found = (forbidden_import(node, siblings) for node in ast.walk(ast.parse(source)))
    return [text for text in found if text]


@pytest.mark.parametrize(
    "line, allowed",
    [
        ("import torch.nn.functional as F", True),
        ("from transformers import AutoModel", True),
        ("from .routing_moextend import route", True),
        ("def f():\n    import json, safetensors.torch", True),
        ("import numpy as np", False),
        ("import json, trl", False),
        ("def f():\n    from PIL import Image", False),
        ("from . import routing_moextend", False),
        ("from .extender import measure_router_shift", False),
        ("from ..routing_moextend import route", False),
        ("from .sub.routing_moextend import route", False),
        ("from modeling_moextend.routing_moextend import route", False),
    ],
)
def test_import_rule(line, allowed):
    assert (not forbidden_imports(line, siblings={"routing_moextend"})) == allowed


def module_name(path):
    """The name of a module below the package: "" for the package itself, "tools.merge"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {  # links are to files from elsewhere
    module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if not path.is_symlink()
}


def folder_of(module):
    """The folder of a module, "" for what ships; the package's own __init__ comes after all of them."""
    folder, _, name = module.rpartition(".")
    return folder.partition(".")[0] if name.endswith("_moextend") or folder else module or "__init__"


def imported_modules(source, module):
    """Modules of the package, in `MODULES` or not, that `source` of `module` imports by a statement, at any depth."""
    here = module.split(".") if module else []
    here = here if MODULES.get(module, PACKAGE).name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == PACKAGE.name)
            yield from (a.name for a in node.names if a.name.split(".")[0] in OUTSIDE)
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".")
            if node.level == 0 and path[0] != PACKAGE.name:
                yield from [node.module] if path[0] in OUTSIDE else []
                continue
            path = here[: len(here) + 1 - node.level] + path if node.level else path[1:]
            target = ".".join(filter(None, path))
            found = [f"{target}.{alias.name}".strip(".") for alias in node.names]
            yield from (name if name in MODULES else target for name in found)


OUTSIDE = ("benchmarks", "examples", "tests", "moextend", "moextend_cli")  # of the package: they import it
IMPORTERS = re.compile(r"(.*\.)?(importlib|pkgutil|runpy|imp|builtins)(\.|$)|sys\.modules$|.* by another name")
ALLOWED_IMPORTS = {"importlib.metadata.version", "importlib.resources.files"}  # by name: they hand no importlib on


def hidden_imports(source, doors=()):
    """Imports of `source` that no statement shows: by importlib, by a name, by `from_package` except for `doors`."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if re.match(r"modeling_moextend\.(?!py$)([a-z]|$)", node.value):
                yield repr(node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            names += [
                f"{a.name} by another name" for a in node.names if a.name in ("from_package", "sys") and a.asname
            ]
            yield from (name for name in names if name not in ALLOWED_IMPORTS and IMPORTERS.match(name))
        elif isinstance(node, ast.Name) and node.id in ("__import__", "exec", "eval"):
            yield ast.unparse(node)
        elif isinstance(node, ast.Name) and node.id == "from_package" and id(node) not in called:
            yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and (node.attr == "from_package" or ast.unparse(node) == "sys.modules"):
            yield ast.unparse(node)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("getattr", "vars")
            and "sys" in map(ast.unparse, node.args)
        ):
            yield ast.unparse(node)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "from_package":
            asked = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if asked not in doors:
                yield ast.unparse(node)


def upward_imports(source, module):
    """What `source` of `module` imports from folders that come after its own, or that are in no order."""
    rank = {**{folder: number for number, folder in enumerate(ORDER)}, "__init__": len(ORDER)}
    own = rank[folder_of(module)]
    return [name for name in imported_modules(source, module) if rank.get(folder_of(name), own + 1) > own]


@pytest.mark.parametrize(
    "module, line, wrong",
    [
        ("routing_moextend", "from .tools.merge import merge", True),
        ("routing_moextend", "from .tools import merge", True),
        ("routing_moextend", "def f():\n    import modeling_moextend.tools", True),
        ("routing_moextend", "from modeling_moextend import training", True),
        ("routing_moextend", "from . import evaluation", True),
        ("routing_moextend", "from .scope_moextend import BASE", False),
        ("tools.merge", "from ..training.trainer import MoExtendSFTTrainer", True),
        ("tools.merge", "from ..routing_moextend import route", False),
        ("tools.merge", "from .native import export", False),
        ("training", "from .trainer import MoExtendSFTTrainer", False),
        ("training.trainer", "from ..tools.merge import merge", False),
        ("training.trainer", "from moextend_cli import main", True),
        ("training.trainer", "from ..unknown.folder import x", True),
        ("tools.merge", "from examples.measure import x", True),
        ("tools.merge", "import benchmarks.run", True),
        ("tools.merge", "from .. import create_card", True),  # the package's own names need all of it
    ],
)
def test_arrow_rule(module, line, wrong):
    assert bool(upward_imports(line, module)) == wrong


@pytest.mark.parametrize(
    "line, hidden",
    [
        ("import importlib", True),
        ("from importlib import import_module", True),
        ("import importlib.metadata", True),
        ("from importlib.metadata import version", False),
        ("from pkgutil import resolve_name", True),
        ("import builtins", True),
        ("__import__('modeling_moextend.cli')", True),
        ("exec('from .cli import main')", True),
        ("from sys import modules", True),
        ("from .package_moextend import from_package as door", True),
        ("sys.modules['modeling_moextend']", True),
        ("load('modeling_moextend.training.trainer')", True),
        ("from_package('cli', 'x')", True),
        ("from_package(name, 'x')", True),
        ("from_package('tools', 'x')", False),
        ("door = from_package\ndoor('cli', 'x')", True),
        ("from .. import package_moextend\npackage_moextend.from_package('cli', 'x')", True),
        ("from .package_moextend import importlib", True),
        ("from transformers.utils.import_utils import importlib", True),
        ("import sys as s\ns.modules['modeling_moextend' + '.cli']", True),
        ("getattr(sys, 'modules')", True),
        ("load(f'modeling_moextend.{name}')", True),
        ("'see modeling_moextend.cli'", False),
        ("from .routing_moextend import route", False),
    ],
)
def test_hidden_import_rule(line, hidden):
    assert bool(list(hidden_imports(line, doors={"tools"}))) == hidden


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    found = upward_imports(MODULES[module].read_text(encoding="utf-8"), module)
    assert not found, f"{module} imports {found}; folders may import only from those before them: {ORDER}"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"", "package_moextend"}))
def test_imports_are_statements(module):
    """Only `package_moextend` reaches from what ships to the package by name, for what `DOORS` lists."""
    source = MODULES[module].read_text(encoding="utf-8")
    found = list(hidden_imports(source, DOORS.get(module, ())))
    assert not found, f"{module} imports in a way that no statement shows: {found}"
    assert all(f'from_package("{door}"' in source for door in DOORS.get(module, ())), "a door that nobody uses"


def test_the_architectures_arrows_are_the_imports():
    """Every import between folders is a way along arrows of the page's first diagram, and every arrow is an import."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    arrows = set(re.findall(r"^    (\w+) --> (\w+)$", text.split("```mermaid")[1].split("```")[0], re.MULTILINE))
    imports = {
        (folder_of(module), folder_of(name) or "root")
        for module, path in MODULES.items()
        if folder_of(module) not in ("", "__init__")
        for name in imported_modules(path.read_text(encoding="utf-8"), module)
    }
    imports = {(start, end) for start, end in imports if start != end}
    ways = set(arrows)
    for middle in ORDER:
        ways |= {(start, end) for start, one in ways for other, end in ways if one == other == middle}
    assert arrows and arrows <= imports, f"no import: {sorted(arrows - imports)}"
    assert imports <= ways, f"no arrow: {sorted(imports - ways)}"


def test_no_imports_go_in_a_circle():
    left = {m: {n for n in imported_modules(p.read_text(encoding="utf-8"), m) if n != m} for m, p in MODULES.items()}
    while True:
        leaves = {module for module, names in left.items() if not names & left.keys()}
        if not leaves:
            break
        left = {module: names for module, names in left.items() if module not in leaves}
    assert not left, f"modules that import each other: {sorted(left)}"


def test_the_root_holds_only_what_ships():
    """Everything else has a folder, and every folder a place in the order."""
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files - {path.name for path in SHIPPED} == {"__init__.py", "py.typed"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == {*ORDER} - {""}
    assert not [path for path in PACKAGE.rglob("*_moextend.py") if path.parent != PACKAGE]


def test_what_ships_is_short_enough_to_be_read():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SHIPPED)
    assert lines <= MAX_SHIPPED_LINES


def test_setup_lists_every_folder():
    found = [path for package in PACKAGES for path in package.rglob("__init__.py")]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in found}
    assert set(read_setup()["options"]["packages"].split()) == folders


def test_shipped_files_are_there():
    names = {path.stem for path in SHIPPED}
    assert {"configuration_moextend", "modeling_moextend", "adapter_file_moextend"} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_file_imports_only_what_the_hub_folder_has(path):
    found = forbidden_imports(path.read_text(encoding="utf-8"), siblings={sibling.stem for sibling in SHIPPED})
    assert not found, f"{path.name} is shipped to the Hub and may not contain: {found}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_no_text_of_a_shipped_file_looks_like_a_relative_import(path):
    """transformers looks for relative imports line by line, in docstrings as well."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    real = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    assert set(get_relative_imports(path)) == real


@pytest.mark.parametrize("name", ["moextend", "modeling_moextend"])
def test_importing_the_package_imports_nothing_of_the_extras(name):
    code = f"import sys, {name}; print(*{{'trl', 'datasets', 'evaluate', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert (PACKAGE / "__init__.py").is_file()


def test_editors_see_the_names_that_are_imported_when_asked_for():
    """What `LAZY` finds at run time is imported for type checkers, from the same modules, and nothing else is."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == modeling_moextend.LAZY and seen.keys() < set(modeling_moextend.__all__)
    assert all(getattr(modeling_moextend, name).__module__.endswith(module) for name, module in seen.items())


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_flat_and_short(path):
    text = path.read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    assert isinstance(recipe, dict)
    assert 0 < len(recipe) < MAX_KEYS
    assert len(re.findall(r"^[\w\"'-]+\s*:", text, re.MULTILINE)) == len(recipe), "a key is given twice"
    for key, value in recipe.items():
        items = value if isinstance(value, list) else [value]
        assert isinstance(key, str)
        assert not any(isinstance(item, (dict, list)) for item in items), f"{key} is nested"


def tracked_files():
    """Files under version control; without it (an unpacked archive), all files in folders that are not hidden."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
    if listed:
        return [ROOT / name for name in listed.split("\0") if name]
    unpacked = (path.relative_to(ROOT).parts for path in ROOT.rglob("*"))
    made = {"PKG-INFO", "moextend.egg-info"}  # by whoever built the archive
    return [ROOT.joinpath(*parts) for parts in unpacked if not (made & {*parts} or any(p[0] == "." for p in parts))]


def folders():
    """Top folders of the repository that are no hidden ones."""
    parts = (path.relative_to(ROOT).parts for path in tracked_files())
    return [ROOT / name for name in {names[0] for names in parts if len(names) > 1} if name[0] != "."]


@pytest.mark.parametrize(
    "page, paths",
    [
        ("docs/architecture.md", [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]),
        ("docs/architecture.md", [path for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"]),
        ("CONTRIBUTING.md", folders()),
        ("CONTRIBUTING.md", list((ROOT / "examples").glob("*.py"))),
        ("mkdocs.yml", list((ROOT / "docs").glob("*.md"))),
    ],
    ids=["modules", "folders of modules", "folders", "examples", "pages"],
)
def test_a_page_names_every(page, paths):
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [path.name for path in sorted(paths) if not re.search(rf"(?<!\w){re.escape(path.name)}", text)]
    assert paths and not missing, f"{page} does not name: {missing}"


def is_text(path):
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(4096)


def test_no_tracked_text_file_names_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in filter(is_text, tracked_files())
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, f"paths of one machine: {found}"


def read_setup():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def requirement_names(text):
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in text.splitlines() if line.strip()}


def test_versions_agree():
    version = read_setup()["metadata"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert citation["version"] == newest == version


def test_every_direct_requirement_has_a_tested_version():
    setup = read_setup()
    required = requirement_names(setup["options"]["install_requires"])
    required |= set().union(*(requirement_names(text) for text in setup["options.extras_require"].values()))
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in pins)
    assert required - {"moextend"} <= requirement_names("\n".join(pins))


@pytest.fixture
def source_tree(tmp_path):
    """A copy of what building needs, so that nothing is written into the checkout."""
    tree = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(package, tree / package.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configuration", tree / "configuration")
    (tree / "examples").mkdir()
    shutil.copy(ROOT / "examples/answer.py", tree / "examples")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md", "model_card_template.md"):
        shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture
def new_python(tmp_path):
    """The interpreter of a new environment that sees the dependencies of this one, but no editable install."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return python


def run(*command, cwd):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(python, *arguments, cwd):
    return run(python, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--no-index", cwd=cwd)


def check_installed(python, cwd):
    """The package in `python` reads the same template as the one at the root; returns where it was imported from."""
    code = (
        "from importlib.metadata import version; from modeling_moextend.publishing import card;"
        "print(version('moextend')); print(card.__file__); print(card.read_template(), end='')"
    )
    version, place, template = run(python, "-c", code, cwd=cwd).split("\n", 2)
    assert version == read_setup()["metadata"]["version"]
    assert template == (ROOT / "model_card_template.md").read_text(encoding="utf-8")
    return Path(place)


@pytest.mark.slow
def test_wheel_holds_the_modules_and_the_template(source_tree, new_python, tmp_path):
    pip(sys.executable, "wheel", ".", "-w", tmp_path, cwd=source_tree)
    (wheel,) = tmp_path.glob("moextend-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in package.rglob("*.py")}
    typed = {"modeling_moextend/py.typed", "moextend/py.typed"}
    data = {f"modeling_moextend/training/recipe_files/{path.name}" for path in RECIPES}
    data |= {"modeling_moextend/publishing/model_card_template.md", "modeling_moextend/evaluation/moextend.mplstyle"}
    assert names == modules | typed | data
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())
    pip(new_python, "install", "--ignore-installed", wheel, cwd=tmp_path)
    assert check_installed(new_python, cwd=tmp_path).is_relative_to(tmp_path / "venv")
    assert run(new_python.with_name("moextend"), "--help", cwd=tmp_path).startswith("usage: moextend")


@pytest.mark.slow
def test_editable_install_reads_the_template(source_tree, new_python, tmp_path):
    pip(new_python, "install", "--ignore-installed", "-e", source_tree, cwd=tmp_path)
    assert check_installed(new_python, cwd=tmp_path).is_relative_to(source_tree)


def test_the_source_archive_holds_what_its_tests_need():
    """Every tracked top folder and file is named, or is of a kind that only a checkout has."""
    text = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    tops = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    packages = {path.name for path in PACKAGES}
    kept = packages | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", ".gitignore", ".github"}
    missing = sorted(name for name in tops - kept if not re.search(rf"(?<!\S){re.escape(name)}(?!\S)", text))
    assert not missing, f"MANIFEST.in does not name {missing}"


def test_the_workflow_runs_what_everybody_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["tests"]["steps"][-1] == {"run": ".ci/run"} and os.access(ROOT / ".ci/run", os.X_OK)
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"] and form["body"] and all(field["attributes"]["label"] for field in form["body"])


@pytest.mark.slow
def test_source_archive_builds_the_same_wheel(source_tree, tmp_path):
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source_tree)
    (archive,) = tmp_path.glob("moextend-*.tar.gz")
    with tarfile.open(archive) as tar:
        assert all(member.isfile() or member.isdir() for member in tar.getmembers())
    pip(sys.executable, "wheel", archive, "-w", tmp_path, cwd=tmp_path)
    (wheel,) = tmp_path.glob("moextend-*.whl")
    template = zipfile.ZipFile(wheel).read("modeling_moextend/publishing/model_card_template.md")
    assert template == (ROOT / "model_card_template.md").read_bytes()


# ---------------------------------------------------------------- README

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = list((ROOT / "docs").glob("*.md"))


def test_readme_is_a_page_and_its_tables_fit_a_laptop():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if line.startswith("|") and len(line) > 100]


def test_badges_are_true():
    setup = read_setup()
    requirements = setup["options"]["install_requires"]
    badges = dict(re.findall(r"img\.shields\.io/badge/(\w+)-([\w.+-]+?)-\w+\)", README))
    assert badges["licence"] == setup["metadata"]["license"].replace("-", "--")
    assert badges["python"] == setup["options"]["python_requires"].removeprefix(">=") + "+"
    assert badges["transformers"] == re.search(r"^transformers>=([\d.]+)", requirements, re.MULTILINE)[1] + "+"
    assert badges["arXiv"] in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_readme_counts_the_families_of_the_table():
    counted = re.search(
        r"^(\d+ of \d+ families)", (ROOT / "docs/families.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert f"[{counted[1]}](docs/families.md)" in README


def anchor(heading):
    """What GitHub and the site make of a heading: small letters and digits, `-` for blanks."""
    plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, fragment in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page}: {target} is not there"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page}: {target} has no #{fragment}"

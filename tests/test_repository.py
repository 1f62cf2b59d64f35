"""Rules of the repository: what may be imported, how long files are, what the wheel holds, what the README names."""

import ast
import configparser
import importlib
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

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_moextend"
SHIPPED = sorted(PACKAGE.glob("*_moextend.py"))
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


def test_importing_the_package_imports_nothing_of_the_extras():
    code = "import sys, modeling_moextend; print(*{'trl', 'datasets', 'evaluate', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert (PACKAGE / "__init__.py").is_file()


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


def test_readme_names_every_module_and_example():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = [*PACKAGE.glob("*.py"), *(ROOT / "examples").glob("*.py")]
    missing = [path.name for path in sorted(paths) if not re.search(rf"(?<!\w){re.escape(path.name)}", readme)]
    assert not missing, f"README.md does not name: {missing}"


def tracked_files():
    """Files under version control; without it (an unpacked archive), all files in folders that are not hidden."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
    if listed:
        return [ROOT / name for name in listed.split("\0") if name]
    return [path for path in ROOT.rglob("*") if not any(part[0] == "." for part in path.relative_to(ROOT).parts)]


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
    shutil.copytree(PACKAGE, tree / PACKAGE.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
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
    modules = {f"modeling_moextend/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    assert names == modules | {"modeling_moextend/publishing/model_card_template.md"}
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())
    pip(new_python, "install", "--ignore-installed", wheel, cwd=tmp_path)
    assert check_installed(new_python, cwd=tmp_path).is_relative_to(tmp_path / "venv")
    assert run(new_python.with_name("moextend"), "--help", cwd=tmp_path).startswith("usage: moextend")


@pytest.mark.slow
def test_editable_install_reads_the_template(source_tree, new_python, tmp_path):
    pip(new_python, "install", "--ignore-installed", "-e", source_tree, cwd=tmp_path)
    assert check_installed(new_python, cwd=tmp_path).is_relative_to(source_tree)


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


def test_the_readmes_python_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    imports = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert len(imports) >= 3
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)

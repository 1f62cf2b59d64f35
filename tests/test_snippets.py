"""Every snippet of README and docs/, run as it stands there: a reader pastes it, and it works.

A page's Python and shell snippets are run in their order, in a folder that looks like a checkout: `assets/`,
`examples/`, `configuration/`, ... are the repository's, and `me/my-adapter`, `me/law`, `me/medicine` stand for
adapters on the Hub. What can't run here says so on the page, in the line that begins it, and why:

    ```python title="not run here: needs Mixtral 8x7B"

Of these at least the names that they import, the arguments that they pass, and commands, options, files and extras
have to exist. README's are run by tests/walk.py, in processes of their own.
"""

import ast
import configparser
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import shake
from transformers import AutoTokenizer

from modeling_moextend import MoExtendForCausalLM, MoExtendProcessor, RouterShift
from modeling_moextend.training.trainer import MoExtendSFTTrainer
from moextend_cli.arguments import WrongUsage, build_parser

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?[ \t]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "text", "json", "yaml", "mermaid"}
NOT_RUN = "not run here: "
LINKED = ("assets", "benchmarks", "configuration", "examples", "modeling_moextend", "moextend", "moextend_cli")
ADAPTERS = ("my-adapter", "law", "medicine")
OBJECTS = {  # what these names are on every page
    "model": MoExtendForCausalLM,
    "processor": MoExtendProcessor,
    "shift": RouterShift,
    "trainer": MoExtendSFTTrainer,
}
PROGRAMS = {
    "pip",
    "make",
    "moextend",
    "python",
    "accelerate",
    "git",
    "cd",
    "transformers",
    "lm_eval",
    "trl",
    "vllm",
    "env",
}


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    title: str
    code: str

    @property
    def runs(self):
        return not self.title.startswith(NOT_RUN)

    def __str__(self):
        return f"{self.page}:{self.line}"


def snippets_of(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Snippet(page, text[: m.start()].count("\n") + 1, m[1], m[2] or "", m[3]) for m in FENCE.finditer(text)]


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SNIPPETS = [snippet for page in PAGES for snippet in snippets_of(page)]
PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]
SHELL = [snippet for snippet in SNIPPETS if snippet.language == "bash"]
RUN = [page for page in PAGES[1:] if any(s.page == page and s.runs for s in PYTHON + SHELL)]


# ---------------------------------------------------------------- all of them: what they name exists


def test_every_fence_says_its_language_and_why_it_is_not_run():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(snippets_of(page)), f"{page}: a fence is odd"
    for snippet in SNIPPETS:
        assert snippet.language in LANGUAGES, f"{snippet}: {snippet.language!r}"
        assert snippet.runs or len(snippet.title) > len(NOT_RUN) + 5, f"{snippet}: why is it not run?"
        assert not snippet.title or snippet.language in ("python", "bash"), f"{snippet}: {snippet.title}"
    assert len(PYTHON) + len(SHELL) > 30 and len(RUN) > 5


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.language in ("json", "yaml")], ids=str)
def test_data_is_well_formed(snippet):
    lines = snippet.code.splitlines() if snippet.language == "json" else [snippet.code]
    assert all((json.loads if snippet.language == "json" else yaml.safe_load)(part) for part in lines)


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_python_names_and_arguments_exist(snippet):
    tree = ast.parse(snippet.code)
    known = dict(OBJECTS)
    before = [other for other in PYTHON if other.page == snippet.page and other.line <= snippet.line]
    for node in [node for other in before for node in ast.walk(ast.parse(other.code))]:
        if isinstance(node, ast.ImportFrom):
            if importlib.util.find_spec(node.module.partition(".")[0]) is None:
                assert not snippet.runs, f"{snippet} runs, but {node.module} is not installed"
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                known[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OBJECTS:
            assert exists(OBJECTS[node.value.id], node.attr), f"{snippet}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            check_arguments(node, known, snippet)


def exists(kind, name):
    """Whether objects of `kind` have the attribute, by its class or by what its methods set."""
    sources = [inspect.getsource(base) for base in kind.__mro__ if base.__module__.startswith("modeling_moextend")]
    return hasattr(kind, name) or any(re.search(rf"self\.{name}\b|^    {name}:", s, re.MULTILINE) for s in sources)


def check_arguments(call, known, snippet):
    """A call of something imported, or of a method of one of `OBJECTS`, passes only arguments that it has."""
    path, target = ast.unparse(call.func).split("."), None
    if path[0] in known:
        target = known[path[0]]
        for name in path[1:]:
            target = getattr(target, name, None)
    if not callable(target):
        return
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = {keyword.arg for keyword in call.keywords if keyword.arg} - set(parameters)
        assert not unknown, f"{snippet}: {ast.unparse(call.func)} takes no {sorted(unknown)}"


def commands_of(code):
    """[words] of each command of a shell snippet, without variables set in front."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words:
            yield words


@pytest.mark.parametrize("snippet", SHELL, ids=str)
def test_commands_options_and_files_exist(snippet):
    for words in commands_of(snippet.code):
        program = Path(words[0]).name
        assert program in PROGRAMS, f"{snippet}: {program} is no program that these pages know"
        CHECKS.get(program, lambda words: None)(words)


def check_pip(words):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = set(setup["options.extras_require"])
    for found in re.findall(r"(?:^|moextend|\.)\[([\w,]+)\]", " ".join(words)):
        assert set(found.split(",")) <= extras, f"extras are {sorted(extras)}, not {found}"
    named = [words[index + 1] for index, word in enumerate(words) if word in ("-c", "-r")]
    assert all((ROOT / name).is_file() for name in named)


def check_make(words):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {word for word in words[1:] if "=" not in word} <= set(targets)


def check_moextend(words):
    try:
        build_parser().parse_args(words[1:])
    except (SystemExit, WrongUsage) as stopped:
        assert getattr(stopped, "code", 1) == 0, f"wrong usage: {shlex.join(words)}"


def check_script(words):
    script = next(word for word in words[1:] if word.endswith(".py"))
    assert (ROOT / script).is_file(), script
    options = [word for word in words[words.index(script) :] if word.startswith("--")]
    text = options_text(script)
    for option in options:
        assert re.search(rf"\b{option[2:].partition('=')[0]}\b", text), f"{script} has no {option}"
    files = [words[i + 1] for i, word in enumerate(words) if word in ("--config", "--config_file")]
    assert all((ROOT / name).is_file() for name in files), files


def options_text(script):
    """Where a script's options stand: itself, the stages' and the trainer's, TRL's."""
    from trl import SFTConfig

    own = [ROOT / script, ROOT / "examples/preference.py"]
    own += [ROOT / "modeling_moextend/training" / name for name in ("stages.py", "config.py")]
    own += sorted((ROOT / "moextend_cli").glob("*.py"))  # what scripts hand on
    return " ".join(path.read_text(encoding="utf-8") for path in own) + " ".join(SFTConfig.__dataclass_fields__)


CHECKS = {"pip": check_pip, "make": check_make, "moextend": check_moextend}
CHECKS |= {"python": lambda words: "-m" in words or check_script(words), "accelerate": check_script}


@pytest.mark.parametrize(
    ("code", "check"),
    [
        ("pip install '.[trian]'", "extras are"),
        ("moextend inspekt me/x", "wrong usage"),
        ("moextend plan --base x --layerz 3", "wrong usage"),
        ("python examples/train.py --lerning_rate 1", "has no --lerning_rate"),
        ("python examples/tran.py", "tran.py"),
    ],
)
def test_what_is_misspelt_is_found(code, check):
    with pytest.raises(AssertionError, match=check):
        test_commands_options_and_files_exist(Snippet("page", 1, "bash", "", code))


# ---------------------------------------------------------------- those that run


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like a checkout's, with adapters of the small base under `me/`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "outputs").mkdir()
    before = os.getcwd()
    os.chdir(folder)
    try:
        for seed, name in enumerate(ADAPTERS):
            model = MoExtendForCausalLM.from_base("assets/tiny-moe", {3: [0, 1]}, dtype="float32", deltas=())
            shake(model, seed, std=0.02).save_pretrained(f"me/{name}")
            AutoTokenizer.from_pretrained("assets/tiny-moe").save_pretrained(f"me/{name}")
    finally:
        os.chdir(before)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_snippets_run_from_the_first_to_the_last(page, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    names = {"__name__": "__main__"}
    for snippet in snippets_of(page):
        if snippet.runs and snippet.language == "python":
            exec(compile(snippet.code, str(snippet), "exec"), names)
        elif snippet.runs and snippet.language == "bash":
            run_shell(snippet.code)


def run_shell(code):
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    code = 'moextend() { python -m moextend_cli "$@"; }\n' + code
    done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"

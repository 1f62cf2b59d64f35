"""Public functions and methods of the package's folders, of examples and benchmarks, say what they take and give."""

import ast
import importlib
import inspect
import sys
import typing
from pathlib import Path

import pytest

import modeling_moextend

ROOT = Path(modeling_moextend.__file__).parent
FOLDERS = (  # of the package; "" would be what ships
    "attaching",
    "chat",
    "data",
    "evaluation",
    "extender",
    "metrics",
    "publishing",
    "quickstart",
    "tools",
    "training",
)
SCRIPTS = ("examples", "benchmarks")
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")) if not path.is_symlink()]
PATHS += [path for folder in SCRIPTS for path in sorted((ROOT.parent / folder).glob("*.py"))]

sys.path += [str(ROOT.parent / folder) for folder in SCRIPTS]


def module_of(path):
    if not path.is_relative_to(ROOT):
        return importlib.import_module(path.stem)  # which may need what only the extra `dev` brings
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return importlib.import_module(".".join(parts).removesuffix(".__init__"))


def functions_of(owner, module):
    """(name, function) of the public functions of a module, and of the methods of its public classes."""
    for name, value in vars(owner).items():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)  # of a class method
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) and owner is module:
            yield from ((f"{name}.{method}", function) for method, function in functions_of(value, module))
        elif inspect.isfunction(value):
            yield name, value


def names_for_type_checkers(module):
    """What the module imports under `if TYPE_CHECKING:`, imported."""
    blocks = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If)]
    blocks = [block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING"]
    names, package = {}, module.__name__ if hasattr(module, "__path__") else module.__package__
    for block in blocks:
        exec(compile(ast.Module(block.body, []), module.__file__, "exec"), {"__package__": package}, names)
    return names


def problems(function, names):
    """What a signature lacks, a line each."""
    signature = inspect.signature(function)
    parameters = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    found = [f"{p.name} has no annotation" for p in parameters if p.annotation is p.empty]
    found += ["no annotation of what it returns"] if signature.return_annotation is signature.empty else []
    try:
        typing.get_type_hints(inspect.unwrap(function), {**inspect.unwrap(function).__globals__, **names})
    except (NameError, TypeError, AttributeError) as error:
        found.append(f"an annotation is no type: {error}")
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_signatures_are_annotated(path):
    module = module_of(path)
    names = names_for_type_checkers(module)
    found = {name: problems(function, names) for name, function in functions_of(module, module)}
    assert not any(found.values()), {name: lines for name, lines in found.items() if lines}


def test_there_is_something_to_check():
    modules = [module_of(path) for path in PATHS]
    assert sum(len(list(functions_of(module, module))) for module in modules) > 400


class Sample:
    def plain(self, one: int, *more: int, two: "str | None" = None, **others: typing.Any) -> "Sample":
        return self

    def bare(self, one, *more, two: int = 0):
        return self

    def dead(self, one: "NoSuchName") -> None:  # noqa: F821
        pass

    @classmethod
    def made(cls, one: int) -> "Sample":
        return cls()

    @property
    def half(self):
        return 0.5


def test_what_counts_as_annotated():
    found = {name: problems(function, {}) for name, function in functions_of(Sample, inspect.getmodule(Sample))}
    missing = ["one has no annotation", "more has no annotation", "no annotation of what it returns"]
    assert found["plain"] == found["made"] == [] and found["bare"] == missing
    assert found["half"] == missing[-1:] and "NoSuchName" in found["dead"][0]


HANDED_ON = {
    f"{name} has no annotation"
    for name in ("args", "kwargs", "options", "model_args", "hub_kwargs", "batches", "inputs")
}


@pytest.mark.parametrize("name", modeling_moextend.__all__)
def test_public_names_are_annotated(name):
    """What a user imports: a function, or a class with the methods that it or a class of ours above it defines."""
    public = getattr(modeling_moextend, name)
    owners = (
        [one for one in public.__mro__ if one.__module__.startswith("modeling_moextend")]
        if inspect.isclass(public)
        else []
    )
    for owner in owners or [None]:
        module = sys.modules[(owner or public).__module__]
        functions = dict(functions_of(owner, module)) if owner else {name: public}
        found = {one: problems(function, names_for_type_checkers(module)) for one, function in functions.items()}
        found = {one: [line for line in lines if line not in HANDED_ON] for one, lines in found.items()}
        assert not any(found.values()), {one: lines for one, lines in found.items() if lines}

"""MoExtend by the name it is installed under: `moextend.X` is `modeling_moextend.X`, the same object for every X."""

import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

import modeling_moextend
from modeling_moextend import __all__ as __all__
from modeling_moextend import __version__ as __version__

if TYPE_CHECKING:  # at run time that would import what `modeling_moextend` imports only when asked for it
    from modeling_moextend import *  # noqa: F403


class SameModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets `import moextend.training` find `modeling_moextend.training`: the module itself, not a second one."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(f"{__name__}.") and importlib.util.find_spec(f"modeling_{name}"):
            return importlib.util.spec_from_loader(name, self)

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(f"modeling_{module.__name__}")


sys.meta_path.insert(0, SameModule())  # the first: others would load `moextend.chat.demo` anew from the folder of it


def __getattr__(name):
    try:
        return getattr(modeling_moextend, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__():
    return sorted({*globals(), *dir(modeling_moextend)})

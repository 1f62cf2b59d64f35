"""MoExtend by the name it is installed under: `moextend.X` is `modeling_moextend.X`, the same object for every X."""

from typing import TYPE_CHECKING

import modeling_moextend
from modeling_moextend import __all__ as __all__
from modeling_moextend import __version__ as __version__

if TYPE_CHECKING:  # at run time that would import what `modeling_moextend` imports only when asked for it
    from modeling_moextend import *  # noqa: F403


def __getattr__(name):
    try:
        return getattr(modeling_moextend, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__():
    return sorted({*globals(), *dir(modeling_moextend)})

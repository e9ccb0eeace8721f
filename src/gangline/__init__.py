"""gangline: Mixture-of-Experts language models on the memory and hardware a person has.

The public face is small: :func:`load`, :func:`attach`, :func:`plan` and the errors. Nothing heavy is imported
until one of them is used.
"""

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gangline.api import attach, detach, load, plan
    from gangline.core.errors import GanglineError

__version__ = "0.1.0"
__all__ = ["GanglineError", "__version__", "attach", "detach", "load", "plan"]

logging.getLogger("gangline").addHandler(logging.NullHandler())

_LAZY = {
    "attach": "gangline.api",
    "detach": "gangline.api",
    "load": "gangline.api",
    "plan": "gangline.api",
    "GanglineError": "gangline.core.errors",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        if _LAZY[name] == "gangline.api" and _LAZY[name] not in sys.modules:
            import_module("gangline.runtime.libraries").import_quickly()
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gangline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

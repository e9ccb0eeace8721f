"""The native CPU core, where it was built, and what this processor can do.

The extension ``_native`` is optional: an installation without a compiler has none, and the torch reference
does the work. Ask :func:`native` before use; nothing here raises because the extension is missing.
"""

import functools
import logging
import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from gangline.kernels.cpu.features import features_from_system

_log = logging.getLogger(__name__)
_EXTENSION = f"{__name__}._native"


@functools.cache
def native() -> ModuleType | None:
    """Return the native extension, or None where it was not built or cannot be loaded (logged once).

    None as well if the environment variable ``GANGLINE_CPU`` says ``torch``; its other values (``scalar``,
    ``avx2``, ``avx_vnni``, ``avx512``, ``avx512_vnni``, ``neon``) choose the native core's instruction set.
    """
    if os.environ.get("GANGLINE_CPU") == "torch" or find_spec(_EXTENSION) is None:
        return None
    try:
        return import_module(_EXTENSION)
    except ImportError as error:
        _log.warning(
            "the native CPU core is installed but does not load (%s); using the torch reference", error
        )
        return None


def cpu_features() -> dict[str, bool]:
    """Return instruction set extensions by name (``avx2``, ``fma``, ``avx512_vnni``, ``neon``, ...).

    A feature is true where the processor has it and the operating system allows it. Features of other
    architectures are absent, so read with ``.get(name, False)``. Without the native core the answer comes
    from the operating system.
    """
    core = native()
    return dict(core.cpu_features()) if core is not None else features_from_system()

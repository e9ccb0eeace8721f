"""Import torch and transformers as quickly as they can be: most of a short command's time goes into that.

Nothing is left out; a library that looks otherwise than expected is imported as it is.
"""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from gangline.runtime.deferred_imports import deferred_imports
from gangline.runtime.model_files import one_look_at_models

# What transformers imports first, and has shared libraries of its own: the system's linker works on one at a
# time, so that Python would wait for torch's at the first of them.
_WITH_LIBRARIES = (
    "regex",
    "numpy",
    "ctypes",
    "ssl",
    "_asyncio",
    "_csv",
    "_decimal",
    "_queue",
    "_uuid",
    "markupsafe",
    "PIL.Image",
    "yaml",
    "safetensors",
    "tokenizers",
)
# And what it imports then, which has none.
_WITHOUT = ("asyncio", "huggingface_hub.hf_api", "jinja2")
_THEIRS = (
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.tokenization_auto",
)


def import_torch_and_transformers(meanwhile: Callable[[], object]) -> None:
    """Import them, if they are not.

    Four things make it quicker than the plain statements: what no model on one machine needs is deferred,
    torch's shared library is mapped by a second thread while transformers does what needs no torch, it looks
    through its model files once or, if they are as they were the last time, not at all, and no garbage is
    looked for (there is none: modules stay).

    Args:
        meanwhile: called once, by the second thread when torch's library is mapped; by this one if it is.
    """
    if "torch" in sys.modules:
        meanwhile()
        mapped = None
    else:
        mapped = _begin_mapping(meanwhile)
    with one_look_at_models():
        for name in (*_WITHOUT, "transformers.models"):
            with suppress(ImportError):
                import_module(name)
    if mapped is not None:
        mapped.wait()
    import_module("torch")  # before the rest, so that what speaks to its compiler can be deferred
    with deferred_imports():
        for name in _THEIRS:
            import_module(name)
        # transformers imports it only when somebody asks for it.
        _ = sys.modules["transformers.generation"].GenerationMixin


def import_quickly() -> None:
    """Import them for a program of somebody else, which keeps its own garbage."""
    with uncollected():
        import_torch_and_transformers(lambda: None)


def _begin_mapping(meanwhile: Callable[[], object]) -> threading.Event:
    """Let a second thread map torch's library and then do something else; say when it is mapped."""
    mapped = threading.Event()

    def work() -> None:
        try:
            _map_torch()
        finally:
            mapped.set()
        meanwhile()

    for name in _WITH_LIBRARIES:
        with suppress(ImportError):
            import_module(name)
    threading.Thread(target=work, name="gangline-second", daemon=True).start()
    return mapped


@contextmanager
def uncollected(*, forever: bool = False) -> Iterator[None]:
    """Look for no garbage meanwhile; ``forever``: nor ever again among what there is then."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if forever:
            gc.freeze()
        if collecting:
            gc.enable()


def _map_torch() -> None:
    """Let the system load and link torch's largest library, without holding the interpreter.

    ``import torch`` then finds it in place. In the order of torch itself: first what all may share.
    """
    if sys.platform != "linux":
        return
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return
    folder = Path(torch.origin).parent / "lib"
    # ctypes.CDLL would hold the interpreter's lock while it links; a foreign function does not.
    dlopen = getattr(ctypes.CDLL(None), "dlopen", None)
    if dlopen is None:
        return
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for name, shared in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_LOCAL)):
        if (folder / name).is_file():
            dlopen(os.fsencode(folder / name), os.RTLD_NOW | shared)

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
from typing import Any

# What transformers imports first, and has shared libraries of its own: the system's linker works on one at a
# time, so that Python would wait for torch's at the first of them.
_WITH_LIBRARIES = (
    "regex",
    "numpy",
    "ctypes",
    "asyncio",
    "huggingface_hub.hf_api",
    "jinja2",
    "PIL.Image",
    "yaml",
)

_THEIRS = (
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.tokenization_auto",
)
_OURS = ("gangline.evaluation.generation", "gangline.evaluation.plain", "gangline.api")


def import_libraries(meanwhile: Callable[[], object] = lambda: None) -> None:
    """Import what every command needs that computes with a model.

    Args:
        meanwhile: called once, by a second thread when torch's library is mapped.
    """
    if "torch" in sys.modules:
        meanwhile()
        return
    with _uncollected():
        import_torch_and_transformers(meanwhile)
        for name in _OURS:
            import_module(name)


def import_torch_and_transformers(meanwhile: Callable[[], object]) -> None:
    """The part of :func:`import_libraries` that is not ours.

    Three things make it quicker than the plain statements: no garbage is looked for (there is none: modules
    stay), torch's shared library is mapped by a second thread while transformers looks through its model
    files, for which it needs no torch, and it looks through them once instead of twice.
    """

    def work() -> None:
        try:
            _map_torch()
        finally:
            mapped.set()
        meanwhile()

    mapped = threading.Event()
    second = threading.Thread(target=work, name="gangline-second", daemon=True)
    for name in _WITH_LIBRARIES:
        with suppress(ImportError):
            import_module(name)
    second.start()
    import transformers

    with _one_look_at_models(transformers):
        import transformers.models
    mapped.wait()
    for name in _THEIRS:
        import_module(name)
    # transformers imports it only when somebody asks for it.
    _ = transformers.generation.GenerationMixin  # type: ignore[attr-defined]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile, nor ever again among what there is then."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
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


@contextmanager
def _one_look_at_models(transformers: Any) -> Iterator[None]:
    """Let ``transformers.models`` have what transformers read in its model files a moment ago.

    Both ask the same cached function for the same folder, one by the folder and one by a file in it.
    """
    home = sys.modules.get("transformers.utils.import_utils")
    look: Any = getattr(home, "create_import_structure_from_path", None)
    if home is None or not hasattr(look, "cache_info"):
        yield
        return
    models = Path(transformers.__file__).parent / "models"

    def look_once(path: Any) -> Any:
        return look(models if Path(path) == models / "__init__.py" else path)

    home.create_import_structure_from_path = look_once  # type: ignore[attr-defined]
    try:
        yield
    finally:
        home.create_import_structure_from_path = look  # type: ignore[attr-defined]

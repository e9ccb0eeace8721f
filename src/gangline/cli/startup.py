"""Import what a command needs that computes with a model."""

import sys
from collections.abc import Callable
from importlib import import_module

from gangline.runtime.deferred_imports import deferred_imports
from gangline.runtime.libraries import import_torch_and_transformers, uncollected

_OURS = ("gangline.evaluation.generation", "gangline.evaluation.plain", "gangline.api")


def import_libraries(meanwhile: Callable[[], object] = lambda: None) -> None:
    """Import what every command needs that computes with a model.

    Args:
        meanwhile: called once, by a second thread when torch's library is mapped.
    """
    if "torch" in sys.modules:
        meanwhile()
        return
    with uncollected(forever=True):
        import_torch_and_transformers(meanwhile)
        with deferred_imports():
            for name in _OURS:
                import_module(name)

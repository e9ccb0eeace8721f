"""The header of a GGUF file."""

from types import ModuleType

from gangline.core.errors import CheckpointError


def require_gguf() -> ModuleType:
    """Return the ``gguf`` package.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError('GGUF files need the gguf package; run pip install "gangline[gguf]"') from error
    module: ModuleType = gguf
    return module

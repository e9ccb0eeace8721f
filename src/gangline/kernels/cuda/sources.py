"""Where the CUDA sources lie: inside the installed package, or in the checkout that it is imported from."""

import hashlib
from functools import cache
from pathlib import Path

from gangline.kernels.cuda.errors import CudaKernelError

_INSTALLED = Path(__file__).parents[2] / "csrc" / "cuda"
_CHECKOUT = Path(__file__).parents[4] / "csrc" / "cuda"


@cache
def source_folder() -> Path:
    """The folder of ``*.cu`` and ``*.cuh``; CudaKernelError if the installation has none."""
    for folder in (_INSTALLED, _CHECKOUT):
        if (folder / "ssmm.cu").is_file():
            return folder
    raise CudaKernelError("gangline's CUDA sources are not installed; install the package again")


@cache
def source_hash() -> str:
    """SHA-256 (hex) over names and contents of all sources: any change compiles everything anew."""
    digest = hashlib.sha256()
    for path in sorted(source_folder().glob("*.cu*")):
        digest.update(f"{path.name}:".encode() + path.read_bytes())
    return digest.hexdigest()

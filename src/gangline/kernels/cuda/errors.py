"""What can be wrong with CUDA kernels."""

from gangline.core.errors import GanglineError


class CudaKernelError(GanglineError):
    """A CUDA kernel cannot be compiled or run here; says what is missing."""

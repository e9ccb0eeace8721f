"""Which kernel computes the experts of a layer: the one place that decides."""

from gangline.core.layout import ExpertLayout
from gangline.kernels.reference import ExpertMath, ReferenceKernel


def expert_kernel(layout: ExpertLayout, math: ExpertMath) -> ReferenceKernel:
    """Return the kernel that computes experts of this layout on this machine."""
    return ReferenceKernel(layout, math)

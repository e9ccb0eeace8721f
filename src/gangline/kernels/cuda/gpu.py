"""Which GPU computes experts that shall lie on one, and why it cannot."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gangline.core.layout import ExpertLayout
from gangline.core.sizes import format_size
from gangline.kernels.cuda.choice import device_name
from gangline.kernels.cuda.launcher import CudaLauncher, Launcher, cuda_missing
from gangline.kernels.cuda.measured import Timing, is_measured, measured_timings
from gangline.kernels.cuda.samoyeds import SamoyedsKernel
from gangline.kernels.reference import ExpertMath

# Activations, one expert decoded to bf16, and what torch's libraries take for themselves.
_RESERVE = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU at hand.

    Attributes:
        device: for torch.
        free: bytes that can be allocated.
        launcher: starts kernels there.
    """

    device: torch.device
    free: int
    launcher: Launcher

    @property
    def name(self) -> str:
        """The vendor's name of it, as in the table of measured times."""
        return device_name(self.device)

    def refuses(
        self, layouts: Sequence[ExpertLayout], maths: Sequence[ExpertMath], nbytes: int
    ) -> str | None:
        """Why the experts of a model cannot lie and be computed here, or None if they can.

        Args:
            layouts: of each layer's experts.
            maths: what they compute.
            nbytes: of all of them.
        """
        for layer, (layout, math) in enumerate(zip(layouts, maths, strict=True)):
            reason = SamoyedsKernel.supports(layout, math)
            if reason is not None:
                return f"layer {layer}: {reason}"
        if nbytes + _RESERVE > self.free:
            return (
                f"the experts take {format_size(nbytes)} and {format_size(_RESERVE)} must stay free for "
                f"activations, but {self.name} has {format_size(self.free)} free"
            )
        return None

    def unmeasured(
        self, layouts: Sequence[ExpertLayout], timings: Sequence[Timing] | None = None
    ) -> str | None:
        """Which experts nobody has timed on such a GPU, or None if all were."""
        known = measured_timings() if timings is None else timings
        for layout in layouts:
            codec, sizes = layout.fields[-1].codec, layout.fields[-1].shape
            if not is_measured(known, self.name, codec, sizes):
                return f"{codec} of {sizes[0]} x {sizes[1]} was not timed on {self.name}"
        return None


def gpu_missing() -> str | None:
    """Why there is no GPU to compute experts on, or None if there is one."""
    return cuda_missing()


def open_gpu(device: str) -> Gpu:
    """Return a GPU by torch's name of it, ``cuda`` or ``cuda:1``.

    Raises:
        CudaKernelError: there is none, or it is too old.
    """
    found = torch.device(device)
    launcher = CudaLauncher(
        found if found.index is not None else torch.device("cuda", torch.cuda.current_device())
    )
    free, _ = torch.cuda.mem_get_info(launcher.device)
    return Gpu(launcher.device, int(free), launcher)

"""Sparse kernels or decompress-and-dense for a layer of Samoyeds experts: the faster by measurement.

Where no GPU has measured a shape, the layer is computed densely, which is always right, and says so once.

Shape suffixes: T tokens, K experts per token, D hidden.
"""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from gangline.core.layout import ExpertLayout
from gangline.kernels.cuda.launcher import CudaLauncher, Launcher, cuda_missing
from gangline.kernels.cuda.measured import Timing, Way, fastest, measured_timings
from gangline.kernels.cuda.samoyeds import SamoyedsKernel
from gangline.kernels.grouping import group_by_expert
from gangline.kernels.reference import ExpertMath, ReferenceKernel

_log = logging.getLogger(__name__)


class SamoyedsLayer:
    """All experts of one layer on one device, bound once.

    Attributes:
        sparse: the sparse kernel, or None where it cannot serve these experts or this device.
        reason: why there is none; None if there is.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        expert_math: ExpertMath,
        raws: Sequence[Sequence[Tensor]],
        *,
        timings: Sequence[Timing] | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        """Bind experts.

        Args:
            layout: of every expert.
            expert_math: what they compute besides their matrices.
            raws: bytes of every expert, one uint8 tensor per field; they decide the device.
            timings: what was measured; by default what comes with the package.
            launcher: starts kernels; by default on the GPU that holds ``raws``.
        """
        self._layout = layout
        self._timings = measured_timings() if timings is None else tuple(timings)
        self._device = raws[0][0].device
        self._dense = ReferenceKernel(layout, expert_math)
        self._dense_weights = [self._dense.bind(of_expert) for of_expert in raws]
        self.reason = SamoyedsKernel.supports(layout, expert_math)
        if self.reason is None and launcher is None:
            self.reason = cuda_missing() if self._device.type == "cuda" else "the experts are not on a GPU"
        self.sparse: SamoyedsKernel | None = None
        if self.reason is None:
            self.sparse = SamoyedsKernel(layout, expert_math, launcher or CudaLauncher(self._device))
            self._table = self.sparse.table([self.sparse.bind(of_expert) for of_expert in raws])

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return ``[T, D]`` in the dtype of ``x_TD``: weighted outputs, added in ascending expert id."""
        way = self.way(x_TD, ids_TK.shape[1])
        if self.sparse is None or way == "dense":
            return self.dense(x_TD, ids_TK, weights_TK)
        return self.sparse.forward(x_TD, ids_TK, weights_TK, self._table, wide=way == "wide")

    def way(self, x_TD: Tensor, top_k: int) -> Way:
        """What was measured to be the fastest for so many tokens; dense where nothing was."""
        if self.sparse is None or x_TD.dtype != torch.bfloat16 or not len(x_TD):
            return "dense"
        device = device_name(self._device)
        codecs = {spec.codec for spec in self._layout.fields}
        load = len(x_TD) * top_k / len(self._dense_weights)
        codec = codecs.pop() if len(codecs) == 1 else ""
        found = fastest(self._timings, device, codec, self._layout.fields[-1].shape, load)
        if found is None:
            _say_once(device, codec)
        # Another GPU of the same name may lack what the measured one had.
        usable = found is not None and (found != "wide" or self.sparse.wide is not None)
        return found if found is not None and usable else "dense"

    def dense(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The layer by decoding one expert after the other; right for every codec and device."""
        grouping = group_by_expert(ids_TK, weights_TK, len(self._dense_weights))
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for index, expert in enumerate(grouping.experts):
            y_ND = self._dense(x_TD[grouping.tokens(index)], self._dense_weights[expert], expert)
            grouping.add(index, y_ND, out_TD)
        return out_TD.to(x_TD.dtype)


def device_name(device: torch.device) -> str:
    """The name of a GPU in the table of measured times; kernels that run elsewhere are emulated."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "emulated"


@cache
def _say_once(device: str, codec: str) -> None:
    _log.warning(
        "%s on %s was not measured at this size: experts are decoded and computed densely; "
        "benchmarks/samoyeds/gpu_layer.py --table measures it",
        codec or "a mixture of codecs",
        device,
    )

"""Super experts: the few whose outputs are so large that the model breaks without them.

"Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279). ``a`` is the largest
absolute value that an expert's down-projection puts out, over tokens and channels, before the gate's weight.
Over all experts in the first three quarters of the decoder's layers: super is who exceeds both the 99.5th
percentile and a tenth of the maximum. Where we differ from the reference: a real division by ten (its integer
division switches the second threshold off where activations are small).

A trace holds no activations: measure them with :func:`gangline.traces.expert_outputs.measure_expert_outputs`.

Shape suffixes: L MoE layers, N experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gangline.traces.rows import Array

PERCENTILE = 99.5
DEPTH = 0.75


@dataclass(frozen=True)
class SuperExpert:
    """One expert: its layer (index among the MoE layers), its number (-1: shared), and its largest output."""

    layer: int
    expert: int
    output: float


@dataclass(frozen=True)
class SuperExperts:
    """What was found.

    Attributes:
        found: largest output first.
        percentile_threshold, tenth_threshold: both must be exceeded.
        layers: how many MoE layers were looked at.
    """

    found: tuple[SuperExpert, ...]
    percentile_threshold: float
    tenth_threshold: float
    layers: int


def super_experts(
    peaks: Sequence[Array],
    shared: Sequence[float] | None = None,
    depth: Sequence[int] | None = None,
    decoder_layers: int | None = None,
) -> SuperExperts | None:
    """Apply the rule; None if no layer lies in the first three quarters, or none was used.

    Args:
        peaks: for each MoE layer ``[N]``, the largest absolute outputs; nan for experts that no token used.
        shared: the same for the shared expert of each layer; nan where there is none.
        depth: each MoE layer's index among all decoder layers; by default all layers are MoE layers.
        decoder_layers: layers of the decoder.
    """
    depth = range(len(peaks)) if depth is None else depth
    shared = [np.nan] * len(peaks) if shared is None else shared
    decoder_layers = len(peaks) if decoder_layers is None else decoder_layers
    early = [number for number, at in enumerate(depth) if at < round(DEPTH * decoder_layers)]
    all_experts = {number: np.append(peaks[number], shared[number]) for number in early}
    pool = np.concatenate(list(all_experts.values())) if early else np.array([])
    pool = pool[np.isfinite(pool)]
    if not len(pool):
        return None
    first, second = float(np.percentile(pool, PERCENTILE)), float(pool.max()) / 10
    found = [
        SuperExpert(number, expert if expert < len(peaks[number]) else -1, float(outputs[expert]))
        for number, outputs in all_experts.items()
        for expert in np.flatnonzero(outputs > max(first, second)).tolist()
    ]
    found.sort(key=lambda item: -item.output)
    return SuperExperts(tuple(found), first, second, len(early))

"""Does routing say more than the similarity of the router's inputs? Needs the recorded inputs.

Over random pairs of tokens: overlap of their experts, regressed on the cosine of their inputs. What is left
between pairs of one group and pairs of two groups is specialisation that similar inputs do not explain; many
specialisation effects vanish here.

Shape suffixes: R rows, N experts, D hidden, P pairs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array


@dataclass(frozen=True)
class HiddenControl:
    """One layer.

    Attributes:
        explained: share of the variance of the overlap that the cosine explains (R squared).
        same, other: mean overlap of pairs of the same and of different groups.
        same_residual, other_residual: what is left of them after the regression; None with one group.
        pairs: drawn.
    """

    explained: float
    same: float
    other: float | None
    same_residual: float | None
    other_residual: float | None
    pairs: int


def hidden_control(
    used_RN: Array, inputs_RD: Array, group_R: Array, rng: Generator, pairs: int = 20_000
) -> HiddenControl:
    """Regress routing overlap on input similarity.

    Args:
        used_RN: experts of each token.
        inputs_RD: the router's inputs.
        group_R: groups to tell apart.
        rng: for the pairs.
        pairs: to draw.
    """
    a_P, b_P = rng.integers(len(used_RN), size=(2, pairs))
    a_P, b_P = a_P[a_P != b_P], b_P[a_P != b_P]
    x_RD = inputs_RD.astype(np.float32)
    x_RD /= np.maximum(np.linalg.norm(x_RD, axis=1, keepdims=True), 1e-12)
    cosine_P = np.einsum("pd,pd->p", x_RD[a_P], x_RD[b_P])
    common_P = (used_RN[a_P] & used_RN[b_P]).sum(axis=1)
    overlap_P = common_P / np.maximum(used_RN[a_P].sum(axis=1), 1)
    centred = cosine_P - cosine_P.mean()
    slope = float(centred @ (overlap_P - overlap_P.mean())) / max(float(centred @ centred), 1e-12)
    rest_P = overlap_P - overlap_P.mean() - slope * centred
    variance = float(overlap_P.var())
    explained = 1 - float(rest_P.var()) / variance if variance else 0.0
    same = group_R[a_P] == group_R[b_P]
    if same.all():
        return HiddenControl(explained, float(overlap_P.mean()), None, None, None, len(a_P))
    return HiddenControl(
        explained,
        float(overlap_P[same].mean()),
        float(overlap_P[~same].mean()),
        float(rest_P[same].mean()),
        float(rest_P[~same].mean()),
        len(a_P),
    )

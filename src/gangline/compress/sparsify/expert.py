"""One expert: its matrices under the pattern, each calibrated on what really reaches it.

Shapes: N tokens of the expert, D hidden, F intermediate, G columns of the gate/up product, O rows, I columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from gangline.compress.sparsify.moments import Moments
from gangline.compress.sparsify.permute import best_order
from gangline.compress.sparsify.prune import prune, saliency
from gangline.compress.sparsify.report import Calibration, ExpertReport, MatrixReport
from gangline.compress.sparsify.settings import SparsifySettings
from gangline.compress.sparsify.walk import Routing
from gangline.core.layout import ExpertLayout
from gangline.formats import DenseCodec, get_codec
from gangline.formats.samoyeds import SparseCodec
from gangline.kernels.reference import ExpertMath


@dataclass(frozen=True)
class ExpertInput:
    """What an expert is calibrated on.

    Attributes:
        x_ND: inputs.
        weight_N: how much the error of each token counts.
        calibration: which tokens these are.
        routed: how many tokens were routed to the expert.
    """

    x_ND: Tensor
    weight_N: Tensor
    calibration: Calibration
    routed: int


@dataclass(frozen=True)
class PrunedMatrix:
    """One matrix of an expert, ``(out, in)``.

    Attributes:
        raw: its bytes in the codec that was asked for.
        weight_OI: what these bytes stand for, in fp32.
    """

    raw: Tensor
    weight_OI: Tensor


class PackedExpert:
    """One pruned expert as its bytes, which are few; decoded when needed."""

    def __init__(self, matrices: Sequence[PrunedMatrix], codec: SparseCodec) -> None:
        self._codec = codec
        self.raws = [matrix.raw for matrix in matrices]
        self.shapes = [(matrix.weight_OI.shape[0], matrix.weight_OI.shape[1]) for matrix in matrices]

    @classmethod
    def of(
        cls, raws: Sequence[Tensor], shapes: Sequence[tuple[int, int]], codec: SparseCodec
    ) -> "PackedExpert":
        """An expert from its bytes and the shapes ``(out, in)`` of its matrices."""
        expert = cls((), codec)
        expert.raws, expert.shapes = list(raws), list(shapes)
        return expert

    def weights(self) -> list[Tensor]:
        """What the bytes stand for, ``(out, in)`` in fp32, down last."""
        decode = self._codec.decode
        return [decode(raw, shape, torch.float32) for raw, shape in zip(self.raws, self.shapes, strict=True)]

    def matrices(self) -> list[PrunedMatrix]:
        """The same with the bytes."""
        return [PrunedMatrix(raw, weight) for raw, weight in zip(self.raws, self.weights(), strict=True)]

    def replace(self, number: int, weight_OI: Tensor) -> None:
        """Put other weights (under the same mask) in the place of a matrix."""
        self.raws[number] = self._codec.encode(weight_OI)


class ExpertForm:
    """The arithmetic of the experts of a layer, on matrices ``(out, in)`` in fp32."""

    def __init__(self, names: Sequence[str], math: ExpertMath) -> None:
        self.names = tuple(names)
        self._math = math

    @property
    def free_channels(self) -> bool:
        """Whether intermediate channels may be put in another order: nothing but the matrices knows them."""
        math = self._math
        return "gate_up" not in self.names and not math.interleaved and math.gate_up_bias_EG is None

    def intermediate(self, firsts: Sequence[Tensor], x_ND: Tensor, expert: int) -> Tensor:
        """The inputs ``[N, F]`` of the down projection."""
        parts = [linear(x_ND, weight_OI) for weight_OI in firsts]
        if len(parts) == 2 and self._math.interleaved:
            h_NG = torch.stack(parts, dim=-1).flatten(-2)
        else:
            h_NG = torch.cat(parts, dim=-1)
        if self._math.gate_up_bias_EG is not None:
            h_NG = h_NG + self._math.gate_up_bias_EG[expert].to(h_NG.dtype)
        return self._math.apply_gate(h_NG)

    def output(self, down_DF: Tensor, h_NF: Tensor, expert: int) -> Tensor:
        """The expert's output ``[N, D]``, not yet weighted."""
        y_ND = linear(h_NF, down_DF)
        if self._math.down_bias_ED is not None:
            y_ND = y_ND + self._math.down_bias_ED[expert].to(y_ND.dtype)
        return y_ND if self._math.post_norm is None else self._math.post_norm(y_ND)

    @property
    def linear_output(self) -> bool:
        """Whether the output is linear in the down projection."""
        return self._math.post_norm is None

    def add_output(self, out_TD: Tensor, routing: Routing, weights: Sequence[Tensor], expert: int) -> None:
        """Add to ``out_TD`` what an expert puts out for the tokens routed to it, weighted."""
        token_N, slot_N = (routing.ids_TK == expert).nonzero(as_tuple=True)
        if len(token_N) == 0:
            return
        h_NF = self.intermediate(weights[:-1], routing.x_TD[token_N], expert)
        y_ND = self.output(weights[-1], h_NF, expert)
        y_ND = y_ND * routing.weights_TK[token_N, slot_N, None]
        out_TD.index_add_(0, token_N, y_ND.to(out_TD.dtype))


def decode_expert(layout: ExpertLayout, raws: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """An expert's matrices ``(out, in)`` from its bytes; with None in the dtype they are stored in."""
    weights = []
    for spec, raw in zip(layout.fields, raws, strict=True):
        codec = get_codec(spec.codec)
        kind = dtype or (codec.stored if isinstance(codec, DenseCodec) else torch.float32)
        weight = codec.decode(raw, spec.shape, kind)
        weights.append(weight.t().contiguous() if spec.transposed else weight)
    return weights


def sparsify_expert(
    weights: Sequence[Tensor], form: ExpertForm, expert: int, given: ExpertInput, settings: SparsifySettings
) -> tuple[list[PrunedMatrix], ExpertReport]:
    """Prune one expert.

    The down projection is calibrated on what the pruned gate and up projections give it, so that it makes
    good part of their error.

    Args:
        weights: its matrices ``(out, in)`` in fp32, down last.
        form: what they compute.
        expert: its id.
        given: the inputs that it is calibrated on; may be empty for the method ``magnitude``.
        settings: pattern, method and the rest.
    """
    permuted = None
    if settings.permute and form.free_channels:
        weights, permuted = _permuted(weights, form, expert, given, settings)
    *firsts, down_DF = weights
    seen = len(given.x_ND) > 0
    moments = Moments.of(given.x_ND, given.weight_N, settings.damping) if seen else None
    results = [_sparsify_matrix(weight, moments, settings) for weight in firsts]
    if seen:
        h_NF = form.intermediate([matrix.weight_OI for matrix, _ in results], given.x_ND, expert)
        moments = Moments.of(h_NF, given.weight_N, settings.damping)
    results.append(_sparsify_matrix(down_DF, moments, settings))
    reports = tuple(report(name) for name, (_, report) in zip(form.names, results, strict=True))
    found = ExpertReport(expert, given.routed, given.calibration, reports, permuted)
    return [matrix for matrix, _ in results], found


def _sparsify_matrix(
    weight_OI: Tensor, moments: Moments | None, settings: SparsifySettings
) -> tuple[PrunedMatrix, Callable[[str], MatrixReport]]:
    codec = settings.codec
    pruned_OI = prune(weight_OI, codec.pattern, settings.method, moments)
    raw = codec.encode(pruned_OI)
    stored_OI = codec.decode(raw, (weight_OI.shape[0], weight_OI.shape[1]), torch.float32)
    square_OI = weight_OI.square()
    kept = float((square_OI * (stored_OI != 0)).sum() / square_OI.sum().clamp(min=1e-30))
    error = None
    if moments is not None:
        error = moments.error(stored_OI - weight_OI) / max(moments.error(weight_OI), 1e-30)
    return PrunedMatrix(raw, stored_OI), lambda name: MatrixReport(name, kept, error)


def _permuted(
    weights: Sequence[Tensor], form: ExpertForm, expert: int, given: ExpertInput, settings: SparsifySettings
) -> tuple[list[Tensor], tuple[float, float]]:
    *firsts, down_DF = weights
    first = last = None
    if len(given.x_ND) and settings.needs_tokens:
        first = Moments.of(given.x_ND, given.weight_N, settings.damping)
        h_NF = form.intermediate(firsts, given.x_ND, expert)
        last = Moments.of(h_NF, given.weight_N, settings.damping)
    scores = [saliency(weight, first).square() for weight in firsts]
    order_F, before, after = best_order(scores, saliency(down_DF, last).square(), settings.codec.pattern)
    return [*(weight[order_F] for weight in firsts), down_DF[:, order_F]], (before, after)

"""Sparsify all MoE layers in order: one expert's weights in memory at a time, each layer calibrated behind
the sparse layers before it.

Shapes: T calibration tokens, K experts of a token, N tokens of one expert, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gangline.checkpoint.source import ExpertSource
from gangline.compress.sparsify.expert import ExpertForm, ExpertInput, PrunedMatrix, sparsify_expert
from gangline.compress.sparsify.report import ExpertReport, LayerReport
from gangline.compress.sparsify.settings import SparsifySettings
from gangline.compress.sparsify.walk import LayerWalk, Routing
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertLayout
from gangline.formats import get_codec
from gangline.models import expert_math

Sink = Callable[[ExpertKey, Sequence[PrunedMatrix]], None]
"""Takes the matrices of one expert, in the order of the source's fields."""


def sparsify_layers(
    walk: LayerWalk,
    source: ExpertSource,
    settings: SparsifySettings,
    sink: Sink,
    on_expert: Callable[[], object] = lambda: None,
) -> Iterator[LayerReport]:
    """Sparsify every expert of a model; yields a report per MoE layer.

    Args:
        walk: the model and the hidden states of the calibration text.
        source: its experts.
        settings: pattern, method and the rest.
        sink: called with every expert in order.
        on_expert: called after each.
    """
    for block, step in walk:
        layout, routing = source.layouts[block.layer], step.routing
        form = ExpertForm([spec.name for spec in layout.fields], expert_math(block))
        out_TD = torch.zeros_like(routing.x_TD)
        reports: list[ExpertReport] = []
        for expert, raws in source.read_layer(block.layer):
            weights = _decode(layout, raws)
            given = expert_input(routing, expert, settings)
            with torch.no_grad():
                matrices, report = sparsify_expert(weights, form, expert, given, settings)
                _add_output(out_TD, routing, form, [matrix.weight_OI for matrix in matrices], expert)
            sink(ExpertKey(block.layer, expert), matrices)
            reports.append(report)
            on_expert()
        step.give(out_TD)
        yield LayerReport(block.layer, block.name, tuple(reports))


def expert_input(routing: Routing, expert: int, settings: SparsifySettings) -> ExpertInput:
    """What an expert is calibrated on: the tokens routed to it, each by the square of its routing weight.

    With fewer than ``min_tokens`` of them: tokens of the whole layer, evenly spread and all of one weight,
    four times ``min_tokens`` where there are so many.
    """
    token_N, slot_N = (routing.ids_TK == expert).nonzero(as_tuple=True)
    if len(token_N) >= settings.min_tokens:
        weight_N = routing.weights_TK[token_N, slot_N].square()
        return ExpertInput(routing.x_TD[token_N], weight_N, "routed", len(token_N))
    if not settings.needs_tokens:
        return ExpertInput(routing.x_TD[:0], routing.weights_TK[:0, 0], "none", len(token_N))
    total = len(routing.x_TD)
    count = min(total, 4 * settings.min_tokens)
    spread_N = torch.arange(count) * total // count
    return ExpertInput(routing.x_TD[spread_N], torch.ones(count), "layer", len(token_N))


def _decode(layout: ExpertLayout, raws: Sequence[Tensor]) -> list[Tensor]:
    weights = [
        get_codec(spec.codec).decode(raw, spec.shape, torch.float32)
        for spec, raw in zip(layout.fields, raws, strict=True)
    ]
    return [
        weight.t().contiguous() if spec.transposed else weight
        for spec, weight in zip(layout.fields, weights, strict=True)
    ]


def _add_output(
    out_TD: Tensor, routing: Routing, form: ExpertForm, weights: Sequence[Tensor], expert: int
) -> None:
    token_N, slot_N = (routing.ids_TK == expert).nonzero(as_tuple=True)
    if len(token_N) == 0:
        return
    h_NF = form.intermediate(weights[:-1], routing.x_TD[token_N], expert)
    y_ND = form.output(weights[-1], h_NF, expert)
    out_TD.index_add_(0, token_N, y_ND * routing.weights_TK[token_N, slot_N, None])

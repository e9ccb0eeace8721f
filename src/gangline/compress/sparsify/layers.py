"""Sparsify all MoE layers in order: one expert's weights in memory at a time (with ``reconstruct`` also
those of its layer, packed), each layer calibrated behind the sparse layers before it.

Shapes: T calibration tokens, K experts of a token, N tokens of one expert, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gangline.checkpoint.source import ExpertSource
from gangline.compress.sparsify.expert import (
    ExpertForm,
    ExpertInput,
    PackedExpert,
    PrunedMatrix,
    decode_expert,
    sparsify_expert,
)
from gangline.compress.sparsify.reconstruct import Goal, reconstruct
from gangline.compress.sparsify.report import ExpertReport, LayerReport
from gangline.compress.sparsify.settings import SparsifySettings
from gangline.compress.sparsify.walk import LayerWalk, Routing, Step
from gangline.core.errors import UnsupportedModelError
from gangline.core.keys import ExpertKey
from gangline.models import MoEBlock, expert_math

Sink = Callable[[ExpertKey, Sequence[PrunedMatrix]], None]
"""Takes the matrices of one expert, in the order of the source's fields."""


def walk_texts(ids_SC: Tensor, settings: SparsifySettings) -> Tensor:
    """The texts that the walk must be made with: twice where the model before pruning goes beside."""
    return torch.cat([ids_SC, ids_SC]) if settings.reconstruct else ids_SC


@torch.no_grad()
def sparsify_layers(
    walk: LayerWalk,
    source: ExpertSource,
    settings: SparsifySettings,
    sink: Sink,
    on_expert: Callable[[], object] = lambda: None,
) -> Iterator[LayerReport]:
    """Sparsify every expert of a model; yields a report per MoE layer.

    Args:
        walk: the model and the hidden states of the calibration text, made with :func:`walk_texts`.
        source: its experts.
        settings: pattern, method and the rest.
        sink: called with every expert in order.
        on_expert: called after each.

    Raises:
        UnsupportedModelError: its layers cannot be reconstructed, which was asked for.
    """
    for block, step in walk:
        form = ExpertForm([spec.name for spec in source.layouts[block.layer].fields], expert_math(block))
        if not settings.reconstruct:
            out_TD = torch.zeros_like(step.routing.x_TD)
            reports = []
            for expert, matrices, report in _pruned(source, block, form, step.routing, settings):
                form.add_output(out_TD, step.routing, [matrix.weight_OI for matrix in matrices], expert)
                sink(ExpertKey(block.layer, expert), matrices)
                reports.append(report)
                on_expert()
            step.give(out_TD)
            yield LayerReport(block.layer, block.name, tuple(reports))
            continue
        yield _reconstructed(source, block, form, step, settings, sink, on_expert)


def _reconstructed(
    source: ExpertSource,
    block: MoEBlock,
    form: ExpertForm,
    step: Step,
    settings: SparsifySettings,
    sink: Sink,
    on_expert: Callable[[], object],
) -> LayerReport:
    """Sparsify one layer, its packed experts in memory, and fit their down projections."""
    if not form.linear_output:
        raise UnsupportedModelError(
            f"{block.name}: its experts normalise what they put out, so their down projections cannot be "
            "fitted; leave reconstruct out"
        )
    sparse, dense = step.routing.halves()
    dense_TD = torch.zeros_like(dense.x_TD)
    for expert, weights in _weights(source, block):
        form.add_output(dense_TD, dense, weights, expert)
    experts, reports = [], []
    for _, matrices, report in _pruned(source, block, form, sparse, settings):
        experts.append(PackedExpert(matrices, settings.codec))
        reports.append(report)
        on_expert()
    out_TD, errors = reconstruct(
        experts,
        form,
        sparse,
        Goal.of(step, dense_TD),
        sweeps=settings.reconstruct,
        min_tokens=settings.min_tokens,
    )
    for expert, packed in enumerate(experts):
        sink(ExpertKey(block.layer, expert), packed.matrices())
    step.give(torch.cat([out_TD, dense_TD]))
    return LayerReport(block.layer, block.name, tuple(reports), errors)


def _pruned(
    source: ExpertSource, block: MoEBlock, form: ExpertForm, routing: Routing, settings: SparsifySettings
) -> Iterator[tuple[int, list[PrunedMatrix], ExpertReport]]:
    for expert, weights in _weights(source, block):
        given = expert_input(routing, expert, settings)
        yield expert, *sparsify_expert(weights, form, expert, given, settings)


def _weights(source: ExpertSource, block: MoEBlock) -> Iterator[tuple[int, list[Tensor]]]:
    layout = source.layouts[block.layer]
    for expert, raws in source.read_layer(block.layer):
        yield expert, decode_expert(layout, raws, torch.float32)


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

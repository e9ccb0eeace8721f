"""Prove at load that the native decode step computes what the model's own modules compute.

Each part is compared by itself on the same input, with experts that give nothing, so that no expert is read:
attention with its cache (left padding, positions with gaps), shared and dense networks, router inputs and
choices, the head.

Shape suffixes: B sequences, S prompt tokens, D hidden, E experts, K chosen experts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from gangline.kernels.cpu.decoder import NativeDecoder, NotNativeError
from gangline.models import MoEBlock, MoEView, install, select
from gangline.runtime.native_cache import GrowingLayer, adopt_cache

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative difference (L2) of one part; int8 activations of packed weights are granted bfloat16's."""

_SEQUENCES, _PROMPT, _PADDING = 2, 12, 3
_NEAR_TIES = 0.75  # share of rows that must be routed alike where the model rounds its logits to 16 bits


def check_native(model: PreTrainedModel, view: MoEView, decoder: NativeDecoder, seed: int = 0) -> None:
    """Compare one decode step of ``decoder`` with the model's modules on a short random prompt.

    Raises:
        NotNativeError: naming the part that differs, and by how much.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in view.blocks:
            _check_rule(decoder, block, generator)
        seen = _run_modules(model, view, decoder, generator)
        _compare(decoder, seen)


@dataclass
class _Seen:
    """What the modules did in one decode step.

    ``inputs`` and ``outputs`` are of each decoder layer; ``added`` what it added to the residual stream.
    """

    embedded_BD: Tensor
    positions_B: Tensor
    first_B: Tensor
    layers: list[GrowingLayer]
    inputs: list[Tensor] = field(default_factory=list)
    added: list[Tensor] = field(default_factory=list)
    routed: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    stored: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    last: Tensor | None = None
    logits_BV: Tensor | None = None


def _check_rule(decoder: NativeDecoder, block: MoEBlock, generator: torch.Generator) -> None:
    """Compare native routing with the family's rule on random logits."""
    spec, experts = block.router_spec, block.geometry.experts
    rule = decoder.rules[block.layer]
    assert spec is not None
    z_TE = torch.randn(16, experts, generator=generator)
    ids_TK = torch.empty(16, spec.k, dtype=torch.int64)
    weights_TK = torch.empty(16, spec.k)
    decoder.parts.core.route(rule, z_TE.data_ptr(), 16, ids_TK.data_ptr(), weights_TK.data_ptr())
    theirs = select(z_TE, spec)
    ours_TE, theirs_TE = (
        _spread(ids_TK, weights_TK, experts),
        _spread(theirs.ids_TK, theirs.weights_TK, experts),
    )
    if not torch.allclose(ours_TE, theirs_TE, atol=1e-6, rtol=1e-5):
        raise NotNativeError(f"routing of {block.parent_name} ({spec.kind}) differs")


def _run_modules(
    model: PreTrainedModel, view: MoEView, decoder: NativeDecoder, generator: torch.Generator
) -> _Seen:
    config = model.config
    ids_BS = torch.randint(decoder.classes, (_SEQUENCES, _PROMPT + 1), generator=generator)
    longest = int(getattr(config, "max_position_embeddings", 0) or 4096)
    gaps_BS = torch.randint(1, max(2, min(16, longest // (2 * _PROMPT))), ids_BS.shape, generator=generator)
    positions_BS = gaps_BS.cumsum(1)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :_PADDING] = 0
    cache = DynamicCache(config=config)
    if not adopt_cache(cache, len(decoder.plans), None):
        raise NotNativeError(f"a cache of {', '.join(sorted({type(x).__name__ for x in cache.layers}))}")
    seen = _Seen(
        embed(model, decoder, ids_BS[:, -1:]),
        positions_BS[:, -1].contiguous(),
        torch.tensor([_PADDING, 0]),
        cast("list[GrowingLayer]", cache.layers),
    )

    def run(part: slice, until: int) -> Any:
        return model.forward(
            input_ids=ids_BS[:, part],
            attention_mask=mask_BS[:, :until],
            position_ids=positions_BS[:, part],
            past_key_values=cache,
            use_cache=True,
        )

    with _evaluating(model), ExitStack() as stack:
        for block in view.blocks:
            stack.callback(install(block, _nothing(seen, block.layer)))
        run(slice(0, _PROMPT), _PROMPT)
        _watch(model, seen, stack)
        seen.logits_BV = run(slice(_PROMPT, None), _PROMPT + 1).logits[:, -1].float()
    for layer in seen.layers:
        assert layer.keys is not None and layer.values is not None
        seen.stored.append((layer.keys[:, :, -1].clone(), layer.values[:, :, -1].clone()))
        layer.crop(-1)
    return seen


def embed(model: PreTrainedModel, decoder: NativeDecoder, ids_B1: Tensor) -> Tensor:
    """Return the embeddings ``[B, D]`` of one token a sequence, looked up by the model's own module."""
    x_B1D: Tensor = model.get_input_embeddings()(ids_B1)
    return x_B1D.reshape(len(ids_B1), -1).to(decoder.dtype).contiguous()


def _nothing(seen: _Seen, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        seen.routed[layer] = (x_TD, ids_TK, weights_TK)
        return torch.zeros_like(x_TD)

    return forward


def _watch(model: PreTrainedModel, seen: _Seen, stack: ExitStack) -> None:
    """Note what every decoder layer reads and adds."""

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.inputs.append(hidden[:, -1].float())
        seen.added.append(torch.zeros_like(seen.inputs[-1]))

    def adding(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        seen.added[-1] = seen.added[-1] + value.reshape(len(seen.embedded_BD), -1).float()

    def leaving(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.last = args[0][:, -1].float()

    body = cast(Any, model).model
    for layer in body.layers:
        stack.callback(layer.register_forward_pre_hook(entering, with_kwargs=True).remove)
        stack.callback(layer.self_attn.register_forward_hook(adding).remove)
        stack.callback(layer.mlp.register_forward_hook(adding).remove)
    stack.callback(body.norm.register_forward_pre_hook(leaving).remove)


def _compare(decoder: NativeDecoder, seen: _Seen) -> None:
    rows = len(seen.embedded_BD)
    length = seen.layers[0].get_seq_length()
    tolerance = TOLERANCE[torch.bfloat16 if decoder.rounds_activations else decoder.dtype]
    buffers = decoder.begin(seen.embedded_BD, seen.positions_B, seen.first_B, length, seen.layers)
    hidden_BD = decoder.hidden_rows(rows)
    _close(hidden_BD, seen.inputs[0], tolerance, "the token embedding")
    nothing_BD = torch.zeros(rows, decoder.hidden)
    alike: list[bool] = []
    for index, plan in enumerate(decoder.plans):
        hidden_BD.copy_(seen.inputs[index])
        decoder.native.front(index)
        if plan.moe_layer is not None:
            x_BD, ids_BK, weights_BK = seen.routed[plan.moe_layer]
            _close(buffers.x_BD, x_BD.float(), tolerance, f"the experts' input of layer {index}")
            alike += _alike(buffers.routing.of(plan.moe_layer), (ids_BK, weights_BK), tolerance)
            decoder.native.back(index, nothing_BD.data_ptr())
        layer, stored = seen.layers[index], seen.stored[index]
        layer.appended()
        for name, ours_BHSd, theirs in (("keys", layer.keys, stored[0]), ("values", layer.values, stored[1])):
            assert ours_BHSd is not None
            _close(ours_BHSd[:, :, -1].float(), theirs.float(), tolerance, f"{name} of layer {index}")
        _close(hidden_BD - seen.inputs[index], seen.added[index], tolerance, f"layer {index}")
    if alike and sum(alike) < len(alike) * (1.0 if tolerance < 1e-3 else _NEAR_TIES):
        raise NotNativeError(
            f"routers choose other experts for {len(alike) - sum(alike)} of {len(alike)} rows"
        )
    assert seen.last is not None and seen.logits_BV is not None
    hidden_BD.copy_(seen.last)
    decoder.native.head()
    _close(buffers.logits_BV.float(), seen.logits_BV, tolerance, "the output head")


def _alike(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float) -> list[bool]:
    """Return for each row whether both give all experts the same weight."""
    experts = 1 + int(max(ours[0].max(), theirs[0].max()))
    difference_B = (_spread(*ours, experts) - _spread(*theirs, experts)).abs().amax(1)
    return [bool(value) for value in difference_B <= tolerance]


def _spread(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> Tensor:
    """Return weights by expert ``[T, E]``."""
    return torch.zeros(len(ids_TK), experts).scatter_add_(1, ids_TK.long(), weights_TK.float())


def _close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    size = float(theirs.norm())
    worst = float((ours - theirs).norm())
    if not worst <= tolerance * size + 1e-6:
        raise NotNativeError(f"{what} differs by {worst / max(size, 1e-30):.2e} (allowed {tolerance:.0e})")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""Prove at load that the native step computes what the model's own modules compute.

A short prompt and the token behind it, a step each. Every part is compared by itself on the same input, with
experts that give nothing, so that no expert is read: attention with its cache (left padding, positions with
gaps), shared and dense networks, router inputs and choices, the head.

Shape suffixes: B sequences, S tokens of one step, R = B * S rows, P positions, D hidden, E experts, K chosen
experts, V vocabulary.
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
    """Compare two steps of ``decoder``, a short random prompt and one token, with the model's modules.

    Raises:
        NotNativeError: naming the part that differs, and by how much.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in view.blocks:
            _check_rule(decoder, block, generator)
        _, layers = _cache(model, decoder)
        for layer, plan in zip(layers, decoder.plans, strict=True):
            layer.start(_SEQUENCES, plan.kv_heads, plan.head_dim, decoder.dtype)
        for seen in _run_modules(model, view, decoder, generator):
            _compare(decoder, seen, layers)


@dataclass
class _Seen:
    """What the modules did in one step.

    ``inputs`` and ``outputs`` are of each decoder layer; ``added`` what it added to the residual stream.
    ``real_BS`` is False for padding, of which nothing is compared.
    """

    embedded_RD: Tensor
    positions_BS: Tensor
    first_B: Tensor
    real_BS: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    added: list[Tensor] = field(default_factory=list)
    routed: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    stored: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    last_RD: Tensor | None = None
    logits_BV: Tensor | None = None

    @property
    def real_R(self) -> Tensor:
        return self.real_BS.reshape(-1)


def _cache(model: PreTrainedModel, decoder: NativeDecoder) -> tuple[DynamicCache, list[GrowingLayer]]:
    """Return an empty cache that keeps every position, also behind a sliding window, and its layers."""
    cache = DynamicCache(config=model.config)
    if not adopt_cache(cache, len(decoder.plans), None):
        raise NotNativeError(f"a cache of {', '.join(sorted({type(x).__name__ for x in cache.layers}))}")
    return cache, cast("list[GrowingLayer]", cache.layers)


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
) -> list[_Seen]:
    config = model.config
    ids_BP = torch.randint(decoder.classes, (_SEQUENCES, _PROMPT + 1), generator=generator)
    longest = int(getattr(config, "max_position_embeddings", 0) or 4096)
    gaps_BP = torch.randint(1, max(2, min(16, longest // (2 * _PROMPT))), ids_BP.shape, generator=generator)
    positions_BP = gaps_BP.cumsum(1)
    mask_BP = torch.ones_like(ids_BP)
    mask_BP[0, :_PADDING] = 0
    cache, layers = _cache(model, decoder)
    steps = []
    with _evaluating(model):
        for begin, end in ((0, _PROMPT), (_PROMPT, _PROMPT + 1)):
            seen = _Seen(
                embed(model, decoder, ids_BP[:, begin:end]),
                positions_BP[:, begin:end].contiguous(),
                torch.tensor([_PADDING, 0]),
                mask_BP[:, begin:end] == 1,
            )
            with ExitStack() as watching:
                for block in view.blocks:
                    watching.callback(install(block, _nothing(seen, block.layer)))
                _watch(model, seen, watching)
                out = model.forward(
                    input_ids=ids_BP[:, begin:end],
                    attention_mask=mask_BP[:, :end],
                    position_ids=positions_BP[:, begin:end],
                    past_key_values=cache,
                    use_cache=True,
                )
            seen.logits_BV = out.logits[:, -1].float()
            for layer in layers:
                assert layer.keys is not None and layer.values is not None
                new = slice(begin - end, None)
                seen.stored.append((layer.keys[:, :, new].clone(), layer.values[:, :, new].clone()))
            steps.append(seen)
    return steps


def embed(model: PreTrainedModel, decoder: NativeDecoder, ids_BS: Tensor) -> Tensor:
    """Return the embeddings ``[R, D]`` of some tokens, looked up by the model's own module."""
    x_BSD: Tensor = model.get_input_embeddings()(ids_BS)
    return x_BSD.flatten(0, 1).to(decoder.dtype).contiguous()


def _nothing(seen: _Seen, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        seen.routed[layer] = (x_TD, ids_TK, weights_TK)
        return torch.zeros_like(x_TD)

    return forward


def _watch(model: PreTrainedModel, seen: _Seen, stack: ExitStack) -> None:
    """Note what every decoder layer reads and adds."""

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.inputs.append(hidden.flatten(0, 1).float())
        seen.added.append(torch.zeros_like(seen.inputs[-1]))

    def adding(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        seen.added[-1] = seen.added[-1] + value.reshape(seen.added[-1].shape).float()

    def leaving(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.last_RD = args[0].flatten(0, 1).float()

    body = cast(Any, model).model
    for layer in body.layers:
        stack.callback(layer.register_forward_pre_hook(entering, with_kwargs=True).remove)
        stack.callback(layer.self_attn.register_forward_hook(adding).remove)
        stack.callback(layer.mlp.register_forward_hook(adding).remove)
    stack.callback(body.norm.register_forward_pre_hook(leaving).remove)


def _compare(decoder: NativeDecoder, seen: _Seen, layers: list[GrowingLayer]) -> None:
    rows, tokens, real_R = len(seen.embedded_RD), seen.real_BS.shape[1], seen.real_R
    tolerance = TOLERANCE[torch.bfloat16 if decoder.rounds_activations else decoder.dtype]
    length = layers[0].get_seq_length()
    buffers = decoder.begin(seen.embedded_RD, seen.positions_BS, seen.first_B, length, layers)
    hidden_RD = decoder.hidden_rows(rows)
    what = "of a prompt" if tokens > 1 else "of a token"
    _close(hidden_RD, seen.inputs[0], tolerance, "the token embedding")
    nothing_RD = torch.zeros(rows, decoder.hidden)
    alike: list[bool] = []
    for index, plan in enumerate(decoder.plans):
        input_RD = torch.where(real_R[:, None], seen.inputs[index], 0.0)
        hidden_RD.copy_(input_RD)
        decoder.native.front(index)
        if plan.moe_layer is not None:
            x_RD, ids_RK, weights_RK = (value[real_R] for value in seen.routed[plan.moe_layer])
            _close(
                buffers.x_RD[real_R], x_RD.float(), tolerance, f"the experts' input of layer {index} {what}"
            )
            ours_ids_RK, ours_weights_RK = buffers.routing.of(plan.moe_layer)
            alike += _alike((ours_ids_RK[real_R], ours_weights_RK[real_R]), (ids_RK, weights_RK), tolerance)
            decoder.native.back(nothing_RD.data_ptr())
        layer = layers[index]
        layer.appended(tokens)
        for name, ours_BHPd, theirs_BHSd in zip(
            ("keys", "values"), (layer.keys, layer.values), seen.stored[index], strict=True
        ):
            assert ours_BHPd is not None
            both = (ours_BHPd[:, :, -tokens:], theirs_BHSd)
            ours, theirs = (x_BHSd.transpose(1, 2)[seen.real_BS].float() for x_BHSd in both)
            _close(ours, theirs, tolerance, f"{name} of layer {index} {what}")
        _close((hidden_RD - input_RD)[real_R], seen.added[index][real_R], tolerance, f"layer {index} {what}")
    if alike and sum(alike) < len(alike) * (1.0 if tolerance < 1e-3 else _NEAR_TIES):
        raise NotNativeError(
            f"routers choose other experts for {len(alike) - sum(alike)} of {len(alike)} rows"
        )
    assert seen.last_RD is not None and seen.logits_BV is not None
    hidden_RD.copy_(torch.where(real_R[:, None], seen.last_RD, 0.0))
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

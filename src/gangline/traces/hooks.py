"""Show the routing of any transformers MoE to an observer: by the engine, or by forward hooks.

A model whose decoding is native tells of itself, so that recording neither changes nor slows it. All others
are hooked.

Shape suffixes: B sequences, S tokens of one pass, T rows, K slots per token, E experts, D hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gangline.models import MoEBlock, MoEView, find_moe
from gangline.traces.header import TraceError
from gangline.traces.observer import LayerRouting, RoutingObserver

Stack = Literal["model", "encoder", "decoder"]

# In these families the module that we can hook routes by itself, so its router is asked once more.
_ROUTES_INSIDE = {"llama4": "parent", "jetmoe": "experts"}


@contextmanager
def observe(model: nn.Module, observer: RoutingObserver, stack: Stack | None = None) -> Iterator[None]:
    """Tell ``observer`` of every pass of ``model`` inside this block.

    Args:
        model: plain, loaded or attached; on any device.
        observer: for example a :class:`~gangline.traces.recorder.Recorder`.
        stack: ``encoder`` or ``decoder`` of a model that has both; their passes have different rows.

    Raises:
        UnsupportedModelError: the model's experts are not understood.
        TraceError: an encoder-decoder model without ``stack``, or the other way round.
    """
    root, blocks = observed_part(model, stack)
    with ExitStack() as hooks:
        watcher = _Watcher(observer)
        hooks.callback(root.register_forward_pre_hook(watcher.before, with_kwargs=True).remove)
        if stack != "encoder":
            hooks.callback(model.register_forward_hook(watcher.after).remove)
        runtime = getattr(model, "gangline", None)
        if runtime is not None and runtime.decodes_natively and not runtime.rerouted:
            hooks.enter_context(_told_by_engine(model, blocks, watcher))
            yield
            return
        for number, block in enumerate(blocks):
            for handle in _watch(block, number, watcher):
                hooks.callback(handle.remove)
        yield


def observed_part(model: nn.Module, stack: Stack | None = None) -> tuple[nn.Module, list[MoEBlock]]:
    """Return the module that is given the tokens, and its MoE layers in order.

    Raises:
        UnsupportedModelError, TraceError: as for :func:`observe`.
    """
    blocks = moe_view(model).blocks
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if not both:
        if stack not in (None, "model"):
            raise TraceError(f"{type(model).__name__} has no separate {stack}; leave stack out")
        return model, blocks
    if stack not in ("encoder", "decoder"):
        raise TraceError(
            f"{type(model).__name__} has an encoder and a decoder, which see different tokens; "
            "record one of them: stack='encoder' or 'decoder'"
        )
    root = cast(Any, model).get_encoder() if stack == "encoder" else cast(Any, model).get_decoder()
    inside = set(map(id, root.modules()))
    blocks = [block for block in blocks if id(block.experts) in inside]
    if not blocks:
        raise TraceError(f"the {stack} of {type(model).__name__} has no MoE layer; record the other part")
    return root, blocks


def moe_view(model: nn.Module) -> MoEView:
    """Return the MoE layers of a model, also of one whose experts gangline holds.

    Raises:
        UnsupportedModelError: the model's experts are not understood.
    """
    runtime = getattr(model, "gangline", None)
    return find_moe(model) if runtime is None else cast(MoEView, runtime.view)


class _Watcher:
    """Turns what hooks see into calls of the observer."""

    def __init__(self, observer: RoutingObserver) -> None:
        self.observer = observer
        self.token_ids_T: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            ids = None
        given = ids if ids is not None else kwargs.get("inputs_embeds")
        if given is None:
            raise TraceError(f"{type(module).__name__} was called without tokens; pass input_ids=")
        shape = (int(given.shape[0]), int(given.shape[1]))
        self.token_ids_T = None if ids is None else ids.reshape(-1)
        self.observer.on_pass(ids, _real(kwargs.get("attention_mask"), shape), shape)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a pass: the likeliest next tokens."""
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.dim() == 3:
            self.observer.on_predicted(logits.argmax(dim=-1))

    def routed(self, block: MoEBlock, number: int, routing: LayerRouting, x_TD: Tensor) -> None:
        """One layer has routed."""
        wants = self.observer.wants
        if "inputs" in wants:
            routing = routing._replace(inputs_TD=x_TD)
        if "logits" in wants and routing.logits_TE is None:
            routing = routing._replace(logits_TE=self.route(block, x_TD).logits_TE)
        self.observer.on_routing(number, routing)

    def route(self, block: MoEBlock, x_TD: Tensor) -> LayerRouting:
        """Ask the block's own router."""
        if block.router is None:
            raise TraceError(f"{block.name} has no router module; record it without logits")
        tokens_T = self.token_ids_T
        if tokens_T is None:
            tokens_T = torch.zeros(len(x_TD), dtype=torch.long, device=x_TD.device)
        with torch.no_grad():
            logits_TE, weights_TK, ids_TK = block.adapter.route(block, x_TD, tokens_T)
        return LayerRouting(ids_TK, weights_TK, logits_TE)


def _told_by_engine(model: Any, blocks: list[MoEBlock], watcher: _Watcher) -> Any:
    """Let the engine of a loaded model tell of its events, whole steps at once if nobody wants inputs."""
    observer, dtype = watcher.observer, model.dtype

    def routed(layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
        x_TD = x_TD.to(dtype) if observer.wants else x_TD  # the native step hands over fp32
        watcher.routed(blocks[layer], layer, LayerRouting(ids_TK, weights_TK), x_TD)

    return model.gangline.observed(routed, None if observer.wants else observer.on_step)


def _real(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """The part of a two-dimensional attention mask that speaks of this pass; None if it hides nothing."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < shape[1]:
        return None
    return mask[:, -shape[1] :] != 0


def _watch(block: MoEBlock, number: int, watcher: _Watcher) -> list[Any]:
    """Hook one block; returns the handles."""
    inside = _ROUTES_INSIDE.get(block.adapter.name)
    if inside is not None:
        module = block.parent if inside == "parent" else block.experts

        def before_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            x_TD = hidden.reshape(-1, hidden.shape[-1])
            watcher.routed(block, number, watcher.route(block, x_TD), x_TD)

        return [module.register_forward_pre_hook(before_block, with_kwargs=True)]
    seen: dict[str, Tensor] = {}

    def before_router(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        seen["x_TD"] = hidden.reshape(-1, hidden.shape[-1])

    def note(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        watcher.routed(block, number, LayerRouting(ids_TK, weights_TK), seen.pop("x_TD", x_TD))
        return x_TD

    # The adapter knows how this family calls its experts; it translates the call, and computes nothing.
    translate: Callable[..., Tensor] = cast(Any, block.adapter).wrap(block, note)

    def before_experts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        translate(*args, *kwargs.values())

    handles = [block.experts.register_forward_pre_hook(before_experts, with_kwargs=True)]
    if block.router is not None and watcher.observer.wants:
        handles.append(block.router.register_forward_pre_hook(before_router, with_kwargs=True))
    return handles

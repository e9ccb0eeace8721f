"""The native decode step in front of a model's own ``forward``.

``generate()`` stays transformers'. A prompt runs through transformers' modules into a cache with room to
grow; every further token of sequences that have such a cache runs through the native step. Whatever is asked
for that the step does not do (attentions, hidden states, a loss, another cache, gradients, ...) runs through
the modules.

Shape suffixes: B sequences, S positions, T rows, D hidden, K chosen experts.
"""

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from gangline.kernels.cpu.decoder import NativeDecoder, NotNativeError, Routing
from gangline.models import MoEView
from gangline.runtime.native_cache import GrowingLayer, adopt_cache, growing_layers
from gangline.runtime.native_check import check_native, embed
from gangline.runtime.native_session import NativeSession
from gangline.runtime.native_skeleton import native_decoder
from gangline.runtime.proofs import Proofs
from gangline.runtime.torch_threads import pause_torch_threads

logger = logging.getLogger(__name__)

_CAPTURE = "transformers.utils.output_capturing"  # its hooks do nothing unless outputs are asked for


class MoE(Protocol):
    """What the step needs of the engine."""

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the experts' weighted sum ``[T, D]``; all but the ids are fp32, ``x_TD`` is reused."""
        ...

    @property
    def observed(self) -> bool:
        """Whether every layer must go through ``forward``, though all experts are in memory."""
        ...

    @property
    def guided(self) -> bool:
        """Whether somebody must be told of every pass before it begins, or of what it chose."""
        ...

    def stepped(self, routing: Routing) -> None:
        """Be told of the choices of a step whose experts the native core has computed itself."""
        ...


def enable_native_decode(
    model: PreTrainedModel,
    view: MoEView,
    moe: MoE,
    *,
    context: int | None = None,
    proofs: Proofs | None = None,
) -> "NativeDecode | None":
    """Put the native step in front of ``model.forward``, if it is proved to compute what the modules compute.

    Args:
        model: loaded, on the CPU, with its experts installed or not: the proof reads none.
        view: its MoE layers.
        moe: computes the experts.
        context: tokens over all sequences that the memory plan has room for; caches grow no further.
        proofs: checks that the model passed before; None checks it now.

    Returns:
        The running step (``close()`` takes it out again), or None with one logged line that says why not.
    """
    try:
        decoder = native_decoder(model, view)
        (proofs or Proofs()).once("native decode", lambda: check_native(model, view, decoder))
    except NotNativeError as reason:
        logger.info("%s decodes through transformers' modules: %s", type(model).__name__, reason)
        return None
    return NativeDecode(model, decoder, moe, context)


class NativeDecode:
    """Serves ``model.forward`` for one-token steps; everything else goes to the model's own.

    Attributes:
        decoder: the native step.
        enabled: False sends everything through the modules.
        steps: steps served since the model was loaded.
    """

    def __init__(
        self, model: PreTrainedModel, decoder: NativeDecoder, moe: MoE, context: int | None = None
    ) -> None:
        self.decoder = decoder
        self.model = model
        self.enabled = True
        self.steps = 0
        self.lock = threading.Lock()
        self._moe = moe
        self._context = context
        self._undo: list[Callable[[], object]] = []
        self._replaced = _replaced_forwards(model)
        self._sound = True
        self._original = model.forward
        model.forward = self._wrapper()

    def close(self) -> None:
        """Give the model its own ``forward`` back."""
        self.model.__dict__.pop("forward", None)
        while self._undo:
            self._undo.pop()()
        self.decoder.set_experts(None)

    def on_close(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` when the model gets its own ``forward`` back."""
        self._undo.append(undo)

    @property
    def serves_sessions(self) -> bool:
        """Whether :meth:`session` may give one: every expert is in memory and nobody watches."""
        hooks = len(self.model._forward_pre_hooks) + len(self.model._forward_hooks)
        watched = hooks > 1 or self._moe.observed or self._moe.guided  # one hook is the engine's
        return self.enabled and self.decoder.resident and not watched

    def session(
        self, kwargs: dict[str, Any], before_step: Callable[[int, int], None]
    ) -> NativeSession | None:
        """Return steps that begin with the one that a call of ``forward`` with ``kwargs`` would be.

        None if the modules must serve it. ``before_step``: see :class:`NativeSession`.
        """
        found = self._step_of(kwargs) if self.serves_sessions else None
        if found is None:
            return None
        return NativeSession(self, found.layers, found.first_B, found.positions_B, before_step)

    def count_step(self, routing: Routing) -> None:
        """Count a step that was computed in one native call, and tell the engine of its choices."""
        self.steps += 1
        self._moe.stepped(routing)

    def _wrapper(self) -> Callable[..., Any]:
        original = self._original

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled or torch.is_grad_enabled() or len(args) > 1:
                return original(*args, **kwargs)
            if args:
                kwargs["input_ids"] = args[0]
            step = self._step_of(kwargs)
            if step is not None:
                return self._run(step)
            self._adopt(kwargs)
            return original(**kwargs)

        return forward

    def _adopt(self, kwargs: dict[str, Any]) -> None:
        """Give a prompt a cache with room to grow, if the native step may go on from it."""
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache", self.model.config.use_cache) is False or kwargs.get("labels") is not None:
            return
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        elif type(cache) is not DynamicCache or cache.get_seq_length():
            return
        self._sound = not (self.decoder.parts.moved() or self._is_watched())
        if self._sound and adopt_cache(cache, len(self.decoder.plans), self._context):
            kwargs["past_key_values"] = cache

    def _is_watched(self) -> bool:
        """Whether somebody hooked or replaced a part of the model, and expects it to be called."""
        for module in self.model.modules():
            if module is self.model:
                continue
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                if any(getattr(hook, "__module__", "") != _CAPTURE for hook in hooks.values()):
                    return True
        return _replaced_forwards(self.model) != self._replaced

    def _step_of(self, kwargs: dict[str, Any]) -> "_Step | None":
        """Return the native step for a call of ``forward``, or None if the modules must serve it."""
        cache, ids_BT = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if cache is None or ids_BT is None or ids_BT.dim() != 2 or ids_BT.shape[1] != 1:
            return None
        layers = growing_layers(cache)
        if (
            layers is None
            or not self._sound
            or not self._plain(kwargs)
            or len(layers) != len(self.decoder.plans)
        ):
            return None
        rows, length = len(ids_BT), layers[0].get_seq_length()
        if length == 0 or layers[0].batch != rows or layers[0].dtype != self.decoder.dtype:
            return None
        first_B = _first_visible(kwargs.get("attention_mask"), rows, length + 1)
        positions_B = _positions(kwargs.get("position_ids"), rows, length)
        if first_B is None or positions_B is None:
            return None
        return _Step(cache, layers, ids_BT, positions_B, first_B, length)

    def _plain(self, kwargs: dict[str, Any]) -> bool:
        """Whether nothing is asked for but the logits of the new token."""
        model, settings = self.model, vars(self.model.config)  # its own attribute access is slow
        if model.training or torch.is_autocast_enabled("cpu"):
            return False
        asked = {
            name: value
            for name, value in kwargs.items()
            if name not in ("input_ids", "attention_mask", "position_ids", "past_key_values")
            and value is not None
        }
        if (
            asked.pop("use_cache", settings.get("use_cache")) is False
            or asked.pop("return_dict", True) is False
        ):
            return False
        keep = asked.pop("logits_to_keep", 0)
        if not isinstance(keep, int) or keep not in (0, 1):
            return False
        outputs = [
            asked.pop(name, settings.get(name) or settings.get(f"_{name}"))
            for name in ("output_attentions", "output_hidden_states", "output_router_logits")
        ]
        return not any(outputs) and not asked and settings.get("return_dict", True) is not False

    def _run(self, step: "_Step") -> MoeCausalLMOutputWithPast:
        decoder = self.decoder
        pause_torch_threads()
        with self.lock:
            embedded_BD = embed(self.model, decoder, step.ids_B1)
            buffers = decoder.begin(embedded_BD, step.positions_B, step.first_B, step.length, step.layers)
            if decoder.resident and not self._moe.observed:
                logits_BV = decoder.step_all(buffers)
                self.count_step(buffers.routing)
            else:
                logits_BV = decoder.step(buffers, self._moe.forward)
                self.steps += 1
        for rows in step.layers:
            rows.appended()
        return MoeCausalLMOutputWithPast(logits=logits_BV.unsqueeze(1), past_key_values=step.cache)


@dataclass(frozen=True)
class _Step:
    """One call of ``forward`` that the native step serves.

    Attributes:
        cache: of which ``layers`` are the layers, all of ``length`` positions.
        ids_B1: the tokens. positions_B: their rotary positions.
        first_B: where each sequence begins in the cache.
    """

    cache: DynamicCache
    layers: list[GrowingLayer]
    ids_B1: Tensor
    positions_B: Tensor
    first_B: Tensor
    length: int


def _first_visible(mask_BS: Any, rows: int, length: int) -> Tensor | None:
    """Return where each sequence begins, if the mask hides nothing but positions before that."""
    if mask_BS is None:
        return torch.zeros(rows, dtype=torch.int64)
    if not isinstance(mask_BS, Tensor) or mask_BS.shape != (rows, length):
        return None
    if mask_BS.dtype not in (torch.int64, torch.int32, torch.bool):
        return None
    mask_BS = mask_BS.to(torch.int64)
    first_B = mask_BS.argmax(1)
    # All ones from the first on: then the last is visible, and nothing between is hidden.
    return first_B if torch.equal(mask_BS.sum(1), length - first_B) and int(mask_BS.max()) == 1 else None


def _positions(position_ids: Any, rows: int, length: int) -> Tensor | None:
    if position_ids is None:
        return torch.full((rows,), length, dtype=torch.int64)
    if not isinstance(position_ids, Tensor) or position_ids.shape not in ((rows, 1), (1, 1)):
        return None
    return position_ids.reshape(-1).to(torch.int64).expand(rows).contiguous()


def _replaced_forwards(model: nn.Module) -> set[int]:
    """Return the modules below the model whose ``forward`` somebody has shadowed."""
    return {id(module) for module in model.modules() if module is not model and "forward" in module.__dict__}

"""The native step in front of a model's own ``forward``.

``generate()`` stays transformers'. A prompt goes into a cache with room to grow, natively where all weights
are packed, else through transformers' modules, whose products of plain numbers are faster at many rows. Every
further token of sequences that have such a cache runs through the native step. Whatever is asked for that the
step does not do (logits of many positions, attentions, hidden states, a loss, another cache, gradients, ...)
runs through the modules.

Shape suffixes: B sequences, S new tokens of each, P positions, T rows, D hidden, K chosen experts.
"""

import functools
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from gangline.core.errors import UsageError
from gangline.kernels.cpu.decoder import NativeDecoder, NotNativeError, Routing
from gangline.models import MoEView
from gangline.runtime.native_cache import GrowingLayer, adopt_cache, growing_layers, unused_layers
from gangline.runtime.native_check import check_native, embed
from gangline.runtime.native_session import NativeSession
from gangline.runtime.native_skeleton import native_decoder
from gangline.runtime.proofs import Proofs
from gangline.runtime.torch_threads import TorchThreads, pause_torch_threads

logger = logging.getLogger(__name__)

KEPT_ROWS = 64
"""Rows of a step up to which its memory is kept for the next one within a budget."""
KEPT_ROWS_UNBOUNDED = 2048
"""The same without a budget: taking new memory for every prompt costs the system's time."""

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
        """Whether somebody must be told of every pass before it begins, or of what it chose.

        Where nobody must, and all experts are in memory, the last layer of a prompt routes and computes no
        token but the last of each sequence: the logits need nothing else of it.
        """
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
    """Serves ``model.forward`` where only the next token is asked for; the rest goes to the model's own.

    Attributes:
        decoder: the native step.
        enabled: False sends everything through the modules.
        alone: refuse what the modules would have to serve: no memory is kept for that.
        serves_prompts: whether it serves first tokens, and several tokens a sequence.
        steps: passes over one further token a sequence served since the model was loaded.
        prompts: other passes served.
    """

    def __init__(
        self, model: PreTrainedModel, decoder: NativeDecoder, moe: MoE, context: int | None = None
    ) -> None:
        self.decoder = decoder
        self.model = model
        self.enabled = True
        self.alone = self.serves_prompts = False
        self.steps = self.prompts = 0
        self.lock = threading.Lock()
        self._moe = moe
        self._context = context
        self._torch_threads = TorchThreads()
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
        if found is None or found.ids_BS.shape[1] > 1 or found.length == 0:
            return None
        return NativeSession(self, found.layers, found.first_B, found.positions_BS.view(-1), before_step)

    def generating(self) -> AbstractContextManager[None]:
        """For the time of one ``generate()``: torch computes alone from the first native pass on."""
        return self._torch_threads.lent()

    def compute_alone(self) -> None:
        """Let the native core have the cores for itself until :meth:`generating`, or else the pass, ends."""
        self._torch_threads.one()

    def count_step(self, routing: Routing) -> None:
        """Count a step that was computed in one native call, and tell the engine of its choices."""
        self.steps += 1
        self._moe.stepped(routing)

    def _wrapper(self) -> Callable[..., Any]:
        original = self._original

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled or torch.is_grad_enabled() or len(args) > 1:
                self._refuse_if_alone()
                return original(*args, **kwargs)
            if args:
                kwargs["input_ids"] = args[0]
            step = self._step_of(kwargs)
            if step is None and self._adopt(kwargs):
                step = self._step_of(kwargs)
            if step is not None:
                return self._run(step)
            self._refuse_if_alone()
            self._torch_threads.many()
            return original(**kwargs)

        return forward

    def _refuse_if_alone(self) -> None:
        if self.alone:
            raise UsageError(
                "this call needs more than the next token's logits without gradients, for which a model "
                "loaded with native_only has no memory; load it without native_only"
            )

    def _adopt(self, kwargs: dict[str, Any]) -> bool:
        """Give a prompt a cache with room to grow, if the native step may go on from it."""
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache", self.model.config.use_cache) is False or kwargs.get("labels") is not None:
            return False
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        elif type(cache) is not DynamicCache or cache.get_seq_length():
            return False
        self._sound = self._is_sound()
        if not self._sound or not adopt_cache(cache, len(self.decoder.plans), self._context):
            return False
        kwargs["past_key_values"] = cache
        return True

    def _is_sound(self) -> bool:
        """Whether the modules are still what the native step stands for."""
        return not (self.decoder.parts.moved() or self._is_watched())

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
        cache, ids_BS = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if cache is None or ids_BS is None or ids_BS.dim() != 2 or ids_BS.numel() == 0:
            return None
        (batch, tokens), unused = ids_BS.shape, unused_layers(cache)
        layers = unused or growing_layers(cache)
        if layers is None or len(layers) != len(self.decoder.plans) or not self._plain(kwargs, tokens):
            return None
        length = layers[0].get_seq_length()
        if length == 0 or tokens > 1:
            if not self.serves_prompts:
                return None
            self._sound = self._is_sound()
        if not unused and (layers[0].batch != batch or layers[0].dtype != self.decoder.dtype):
            return None
        first_B = _first_visible(kwargs.get("attention_mask"), batch, length + tokens)
        positions_BS = _positions(kwargs.get("position_ids"), batch, tokens, length)
        if not self._sound or first_B is None or positions_BS is None:
            return None
        if unused:
            for layer, plan in zip(layers, self.decoder.plans, strict=True):
                layer.start(batch, plan.kv_heads, plan.head_dim, self.decoder.dtype)
        return _Step(cache, layers, ids_BS, positions_BS, first_B, length)

    def _plain(self, kwargs: dict[str, Any], tokens: int) -> bool:
        """Whether nothing is asked for but the logits of the last token."""
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
        if not isinstance(keep, int) or keep not in ((0, 1) if tokens == 1 else (1,)):
            return False
        outputs = [
            asked.pop(name, settings.get(name) or settings.get(f"_{name}"))
            for name in ("output_attentions", "output_hidden_states", "output_router_logits")
        ]
        return not any(outputs) and not asked and settings.get("return_dict", True) is not False

    def _run(self, step: "_Step") -> MoeCausalLMOutputWithPast:
        tokens = step.ids_BS.shape[1]
        with self._torch_threads.lent():
            self.compute_alone()
            pause_torch_threads()
            with self.lock:
                logits_BV = self._logits(step)
        if tokens == 1 and step.length:
            self.steps += 1
        else:
            self.prompts += 1
        for rows in step.layers:
            rows.appended(tokens)
        return MoeCausalLMOutputWithPast(logits=logits_BV.unsqueeze(1), past_key_values=step.cache)

    def _logits(self, step: "_Step") -> Tensor:
        """Compute the step, through the engine where not every expert is in memory."""
        decoder, moe = self.decoder, self._moe
        through_engine = not decoder.resident or moe.observed
        embedded_TD = embed(self.model, decoder, step.ids_BS)
        buffers = decoder.begin(
            embedded_TD,
            step.positions_BS,
            step.first_B,
            step.length,
            step.layers,
            last_only=not (through_engine or moe.guided),
        )
        try:
            if through_engine:
                return decoder.step(buffers, moe.forward)
            logits_BV = decoder.step_all(buffers)
            moe.stepped(buffers.routing)
            return logits_BV
        finally:
            if len(embedded_TD) > (KEPT_ROWS_UNBOUNDED if self._context is None else KEPT_ROWS):
                decoder.release()


@dataclass(frozen=True)
class _Step:
    """One call of ``forward`` that the native step serves.

    Attributes:
        cache: of which ``layers`` are the layers, all of ``length`` positions.
        ids_BS: the tokens. positions_BS: their rotary positions.
        first_B: where each sequence begins in the cache.
    """

    cache: DynamicCache
    layers: list[GrowingLayer]
    ids_BS: Tensor
    positions_BS: Tensor
    first_B: Tensor
    length: int


def _first_visible(mask_BP: Any, rows: int, length: int) -> Tensor | None:
    """Return where each sequence begins, if the mask hides nothing but positions before that."""
    if mask_BP is None:
        return torch.zeros(rows, dtype=torch.int64)
    if not isinstance(mask_BP, Tensor) or mask_BP.shape != (rows, length):
        return None
    if mask_BP.dtype not in (torch.int64, torch.int32, torch.bool):
        return None
    shown_BP = mask_BP.to(torch.int64)
    first_B = length - shown_BP.sum(1)
    # As many ones as there are positions from the first on, and all of them there.
    as_counted_BP = (torch.arange(length) >= first_B[:, None]).to(torch.int64)
    return first_B if torch.equal(shown_BP, as_counted_BP) else None


def _positions(position_ids: Any, rows: int, tokens: int, length: int) -> Tensor | None:
    if position_ids is None:
        position_ids = torch.arange(length, length + tokens).view(1, -1)
    if not isinstance(position_ids, Tensor) or position_ids.shape not in ((rows, tokens), (1, tokens)):
        return None
    return position_ids.to(torch.int64).expand(rows, tokens).contiguous()


def _replaced_forwards(model: nn.Module) -> set[int]:
    """Return the modules below the model whose ``forward`` somebody has shadowed."""
    return {id(module) for module in model.modules() if module is not model and "forward" in module.__dict__}

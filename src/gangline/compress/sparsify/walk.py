"""Walk a model decoder layer by decoder layer, with the hidden states of all calibration texts at hand.

Works for any transformers model whose MoE layers all belong to one list of layers: what each layer is called
with beside the hidden states (positions, masks) is recorded by letting the model call layers that do nothing.

Shapes: B texts at a time (1), C tokens of a text, D hidden, T = all tokens, K experts of a token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gangline.core.errors import UnsupportedModelError
from gangline.models import MoEBlock, MoEView, install


@dataclass(frozen=True)
class Call:
    """What one layer is called with for one text, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Routing:
    """What reaches the experts of one layer, all texts one after another.

    Attributes:
        x_TD: inputs, fp32.
        ids_TK: chosen experts.
        weights_TK: their routing weights.
    """

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor

    def halves(self) -> tuple["Routing", "Routing"]:
        """The first and the second half of the texts."""
        half = len(self.x_TD) // 2
        first, last = slice(half), slice(half, None)
        return (
            Routing(self.x_TD[first], self.ids_TK[first], self.weights_TK[first]),
            Routing(self.x_TD[last], self.ids_TK[last], self.weights_TK[last]),
        )


class LayerWalk:
    """The hidden states of some texts, taken through a model one layer at a time.

    Args:
        model: the model; the parameters of its experts are not needed.
        view: its MoE layers. Their experts are replaced for good: this model is for walking only.
        ids_SC: token ids, texts of equal length.

    Raises:
        UnsupportedModelError: the MoE layers are not part of one list of layers.
    """

    def __init__(self, model: Any, view: MoEView, ids_SC: Tensor) -> None:
        self._layers = _layer_list(model, view)
        self._block_of = {self._index(block, name): block for block, name in _located(view, self._layers[0])}
        self._taps = {block.layer: _Tap() for block in view.blocks}
        for block in view.blocks:
            install(block, self._taps[block.layer])
        with torch.inference_mode():
            recorded = [_record(model, self._layers[1], ids_1C) for ids_1C in ids_SC.split(1)]
        self.hidden = [hidden for hidden, _ in recorded]
        self._calls = [calls for _, calls in recorded]

    def __iter__(self) -> Iterator[tuple[MoEBlock, "Step"]]:
        """Yield every MoE layer with what reaches it; give its outputs before the next is asked for."""
        for number, layer in enumerate(self._layers[1]):
            block = self._block_of.get(number)
            if block is None:
                self.hidden = self._run(number, layer)
                continue
            tap = self._taps[block.layer]
            tap.listen()
            silent = self._run(number, layer)
            step = Step(tap.heard(), silent, partial(self._adds, number, layer, tap, silent[-1]))
            yield block, step
            self.hidden = self._after(number, layer, tap, silent, step.outputs())

    def _after(
        self, number: int, layer: nn.Module, tap: "_Tap", silent: list[Tensor], out_TD: Tensor
    ) -> list[Tensor]:
        """The hidden states behind a layer whose experts put out ``out_TD``.

        A layer that turns out, on the last text, to add them to what it says without them, to the last bit,
        need not run again.
        """
        last_1CD, added_1CD = self._last(number, layer, tap, out_TD), _added(silent[-1], out_TD)
        if torch.equal(last_1CD, added_1CD):
            parts = out_TD.split([hidden.shape[-2] for hidden in silent])
            after = [_added(hidden, out_CD) for hidden, out_CD in zip(silent, parts, strict=True)]
        else:
            tap.play(out_TD)
            after = self._run(number, layer)
        tap.listen()  # outputs are as large as the hidden states of all texts: let go of them
        return after

    def _last(self, number: int, layer: nn.Module, tap: "_Tap", out_TD: Tensor) -> Tensor:
        """The hidden states of the last text behind a layer whose experts put out ``out_TD``."""
        tap.play(out_TD[-self.hidden[-1].shape[-2] :])
        call = self._calls[-1][number]
        with torch.inference_mode():
            return _first(layer(self.hidden[-1], *call.args, **call.kwargs))

    def _adds(self, number: int, layer: nn.Module, tap: "_Tap", silent_1CD: Tensor, out_TD: Tensor) -> bool:
        out_CD = out_TD[-silent_1CD.shape[-2] :]
        after_1CD = self._last(number, layer, tap, out_TD)
        difference_CD = (after_1CD - silent_1CD).view(out_CD.shape) - out_CD
        return float(difference_CD.norm()) <= 0.01 * float(out_CD.norm())

    def _run(self, number: int, layer: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            return [
                _first(layer(hidden, *calls[number].args, **calls[number].kwargs))
                for hidden, calls in zip(self.hidden, self._calls, strict=True)
            ]

    @staticmethod
    def _index(block: MoEBlock, name: str) -> int:
        return int(block.name.removeprefix(f"{name}.").partition(".")[0])


class Step:
    """One MoE layer of a walk.

    Attributes:
        routing: what reaches its experts.
        adds: called with outputs of the experts, tells (tried on the last text) whether the layer does
            nothing with them but add them to its hidden states.
    """

    def __init__(self, routing: Routing, silent: Sequence[Tensor], adds: Callable[[Tensor], bool]) -> None:
        self.routing = routing
        self.adds = adds
        self._silent = silent
        self._out_TD: Tensor | None = None

    def silent_TD(self) -> Tensor:
        """The layer's hidden states if its experts put out nothing, fp32."""
        return torch.cat([hidden.flatten(0, -2) for hidden in self._silent]).to(torch.float32)

    def give(self, out_TD: Tensor) -> None:
        """Set what the experts put out, summed over a token's experts, for all tokens."""
        self._out_TD = out_TD

    def outputs(self) -> Tensor:
        """What :meth:`give` was given."""
        assert self._out_TD is not None, "the outputs of a layer must be given before the next layer"
        return self._out_TD


class _Tap:
    """Stands for the experts of a layer: first it notes what comes in, then it plays what was made of it."""

    def __init__(self) -> None:
        self._heard: list[tuple[Tensor, Tensor, Tensor]] = []
        self._plays: Tensor | None = None
        self._at = 0

    def listen(self) -> None:
        self._heard, self._plays = [], None

    def heard(self) -> Routing:
        xs, ids, weights = zip(*self._heard, strict=True)
        self._heard = []
        return Routing(torch.cat(xs), torch.cat(ids), torch.cat(weights))

    def play(self, out_TD: Tensor) -> None:
        self._plays, self._at = out_TD, 0

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if self._plays is None:
            self._heard.append((x_TD.to(torch.float32), ids_TK.clone(), weights_TK.to(torch.float32)))
            return torch.zeros_like(x_TD)
        self._at += len(x_TD)
        return self._plays[self._at - len(x_TD) : self._at].to(x_TD.dtype)


def _layer_list(model: nn.Module, view: MoEView) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        inside = isinstance(module, nn.ModuleList) and all(
            block.name.startswith(f"{name}.") for block in view.blocks
        )
        if inside:
            assert isinstance(module, nn.ModuleList)
            return name, module
    raise UnsupportedModelError(
        f"{view.family}: its MoE layers are not in one list of layers (an encoder and a decoder?), "
        "so they cannot be walked one by one; use a decoder-only model"
    )


def _located(view: MoEView, name: str) -> list[tuple[MoEBlock, str]]:
    numbers = [block.name.removeprefix(f"{name}.").partition(".")[0] for block in view.blocks]
    if len(set(numbers)) < len(numbers):
        raise UnsupportedModelError(
            f"{view.family}: a layer holds two groups of experts, which cannot be walked; use another model"
        )
    return [(block, name) for block in view.blocks]


def _record(model: Any, layers: nn.ModuleList, ids_1C: Tensor) -> tuple[Tensor, list[Call]]:
    """The hidden states that reach the first layer, and what every layer is called with."""
    calls: list[Call] = []
    first: list[Tensor] = []

    def stand_in(*args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        assert isinstance(hidden, Tensor)
        first.append(hidden)
        calls.append(Call(args[1:], kwargs))
        return hidden

    for layer in layers:
        layer.__dict__["forward"] = stand_in
    try:
        base = getattr(model, model.base_model_prefix, model)
        base(input_ids=ids_1C, use_cache=False)
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
    return first[0], calls


def _added(hidden_1CD: Tensor, out_TD: Tensor) -> Tensor:
    """Hidden states of a text with the last of the outputs added."""
    out_CD = out_TD[-hidden_1CD.shape[-2] :]
    return hidden_1CD + out_CD.to(hidden_1CD.dtype).view(hidden_1CD.shape)


def _first(out: Any) -> Tensor:
    hidden = out[0] if isinstance(out, tuple) else out
    assert isinstance(hidden, Tensor)
    return hidden

"""Measure how large the outputs of every expert become: what a trace cannot show and super experts need.

Shape suffixes: T tokens, D hidden, K slots, N experts.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gangline.models import MoEBlock
from gangline.traces.files import write_whole
from gangline.traces.header import TraceError
from gangline.traces.hooks import Stack, observed_part

OUTPUTS = "expert_outputs.json"


@dataclass(frozen=True)
class ExpertOutputs:
    """The largest absolute outputs, before the gate's weight.

    Attributes:
        peaks: for each MoE layer one number per expert; nan for experts that no token used.
        shared: for each MoE layer the shared experts' largest; nan where there are none.
        depth: each MoE layer's place among all layers of the model.
        decoder_layers: how many layers the model has.
        tokens: seen.
    """

    peaks: tuple[tuple[float, ...], ...]
    shared: tuple[float, ...]
    depth: tuple[int, ...]
    decoder_layers: int
    tokens: int

    def save(self, folder: Path) -> None:
        """Write the numbers beside a trace, where ``gangline report`` finds them."""
        text = json.dumps(asdict(self)) + "\n"
        write_whole(folder / OUTPUTS, lambda path: path.write_text(text, encoding="utf-8"))


def load_expert_outputs(folder: Path) -> ExpertOutputs | None:
    """Read what was saved beside a trace; None if nothing was.

    Raises:
        TraceError: the file is damaged.
    """
    path = folder / OUTPUTS
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        peaks = tuple(tuple(map(float, layer)) for layer in data["peaks"])
        shared, depth = tuple(map(float, data["shared"])), tuple(map(int, data["depth"]))
        return ExpertOutputs(peaks, shared, depth, int(data["decoder_layers"]), int(data["tokens"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path} is damaged ({error}); remove it and measure again") from error


def measure_expert_outputs(
    model: nn.Module, documents: Iterable[Sequence[int]], stack: Stack | None = None
) -> ExpertOutputs:
    """Run documents through a model and note the largest absolute output of every expert.

    Args:
        model: a plain transformers model, whose expert weights are in memory.
        documents: token ids, one pass each. A few long ones are enough.
        stack: of an encoder-decoder model.

    Raises:
        TraceError: gangline holds the experts, or there was no document.
        UnsupportedModelError: the model's experts are not understood.
    """
    if getattr(model, "gangline", None) is not None:
        raise TraceError("the experts of this model lie in gangline's store; load it with transformers alone")
    root, blocks = observed_part(model, stack)
    peaks = [np.full(block.geometry.experts, np.nan) for block in blocks]
    shared = np.full(len(blocks), np.nan)
    tokens = 0
    with _watched(blocks, peaks, shared), torch.inference_mode():
        for ids in documents:
            device = next(model.parameters()).device
            root(input_ids=torch.tensor([list(ids)], device=device))
            tokens += len(ids)
    if not tokens:
        raise TraceError("no document to measure expert outputs on; give at least one")
    config = cast(Any, model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return ExpertOutputs(
        tuple(tuple(layer.tolist()) for layer in peaks),
        tuple(shared.tolist()),
        tuple(_place(block) for block in blocks),
        int(config.num_hidden_layers),
        tokens,
    )


@contextmanager
def _watched(blocks: Sequence[MoEBlock], peaks: list[Any], shared: Any) -> Iterator[None]:
    with ExitStack() as hooks:
        for number, block in enumerate(blocks):
            before = _before_experts(block, peaks[number])
            hooks.callback(block.experts.register_forward_pre_hook(before, with_kwargs=True).remove)
            for _, module in block.shared:
                hooks.callback(module.register_forward_hook(_after_shared(shared, number)).remove)
        yield


def _before_experts(block: MoEBlock, peaks_N: Any) -> Any:
    def note(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        for expert in range(len(peaks_N)):
            rows = (ids_TK == expert).any(dim=1)
            if rows.any():
                x_ED = x_TD[rows]
                ids_E1 = torch.full((len(x_ED), 1), expert, dtype=ids_TK.dtype, device=x_TD.device)
                ones_E1 = torch.ones((len(x_ED), 1), dtype=weights_TK.dtype, device=x_TD.device)
                peak = block.adapter.compute(block, x_ED, ids_E1, ones_E1).abs().amax().item()
                peaks_N[expert] = np.fmax(peaks_N[expert], peak)
        return x_TD

    # The adapter knows how this family calls its experts.
    translate = cast(Any, block.adapter).wrap(block, note)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        translate(*args, *kwargs.values())

    return before


def _after_shared(shared: Any, number: int) -> Any:
    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            shared[number] = np.fmax(shared[number], output.abs().amax().item())

    return after


def _place(block: MoEBlock) -> int:
    """The layer's number in the model: the first number in its path."""
    found = re.search(r"\d+", block.name)
    return block.layer if found is None else int(found[0])

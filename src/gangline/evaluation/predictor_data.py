"""What predictors learn from and are judged by: texts with the routing that the model gave them.

Legend: T tokens of one document, K chosen experts per token, E experts, D hidden.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gangline.core.errors import UsageError
from gangline.traces import Trace, TraceWriter, open_trace
from gangline.traces.describe import describe_recording
from gangline.traces.header import Extra
from gangline.traces.hooks import Stack
from gangline.traces.record import record_text
from gangline.traces.recorder import Recorder
from gangline.traces.texts import Item, text_items


@dataclass(frozen=True)
class RoutedText:
    """One document.

    Attributes:
        source: file and place, in words.
        ids_T: its tokens.
        chosen: for each layer the experts ``[T, K]``, heaviest first; -1 in an empty slot.
        logits: for each layer the router's logits ``[T, E]``, if they were recorded.
        inputs: for each layer the router's inputs ``[T, D]``, if they were recorded.
    """

    source: str
    ids_T: Tensor
    chosen: tuple[Tensor, ...]
    logits: tuple[Tensor, ...] | None = None
    inputs: tuple[Tensor, ...] | None = None

    @property
    def file(self) -> str:
        """The file that it was cut from."""
        return self.source.rpartition(", tokens from ")[0] or self.source


@contextmanager
def recorded(
    model: Any,
    name: str,
    items: Sequence[Item],
    *,
    extras: Sequence[Extra] = (),
    tokenizer: Any = None,
    on_item: Callable[[int, int], None] | None = None,
) -> Iterator[Trace]:
    """Run documents through a model and yield their trace, which is gone when the block ends.

    Args:
        model: plain, loaded or attached; of an encoder-decoder model the encoder runs.
        name: what the user calls it.
        items: the documents.
        extras: what the trace must hold beside experts and weights.
        tokenizer: that made the tokens.
        on_item: told after each document how many of how many tokens are done.
    """
    total = sum(len(item.ids) for item in items)
    stack: Stack | None = "encoder" if model.config.is_encoder_decoder else None
    header = describe_recording(model, name, extras=extras, stack=stack, tokenizer=tokenizer)
    done = 0

    def count(item: Item) -> None:
        nonlocal done
        done += len(item.ids)
        if on_item is not None:
            on_item(done, total)

    with tempfile.TemporaryDirectory(prefix="gangline-predict-") as folder:
        with TraceWriter(Path(folder) / "trace", header) as writer:
            record_text(model, Recorder(writer), items, stack=stack, on_item=count)
        yield open_trace(Path(folder) / "trace")


def texts_within(paths: Sequence[Path], tokenizer: Any, *, window: int, tokens: int) -> list[Item]:
    """Cut text files into documents; each file gives an equal part of ``tokens``, from its beginning.

    Raises:
        UsageError: a file cannot be read, or holds no text.
    """
    out: list[Item] = []
    for number, path in enumerate(paths):
        budget = (tokens - sum(len(item.ids) for item in out)) // (len(paths) - number)
        for item in text_items([path], tokenizer, window=window):
            if budget <= 0:
                break
            out.append(item)
            budget -= len(item.ids)
    return out


def routed_texts(trace: Trace) -> list[RoutedText]:
    """Return the documents of a trace, each in the order of its text.

    Raises:
        UsageError: the tokens of the trace are not known.
    """
    if (trace.tokens.input_id < 0).any():
        raise UsageError(f"{trace.name} does not know its tokens; record it with 'gangline trace'")
    layers = [trace.layer(number) for number in trace.layers]
    out = []
    for document in trace.documents:
        (rows,) = np.nonzero(trace.tokens.doc == document.number)
        rows = rows[np.argsort(trace.tokens.position[rows], kind="stable")]
        if not len(rows):
            continue
        chosen = tuple(_heaviest_first(layer.take(rows)) for layer in layers)
        out.append(
            RoutedText(
                document.source,
                torch.from_numpy(trace.tokens.input_id[rows].astype(np.int64)),
                chosen,
                _floats([layer.logits_RN for layer in layers], rows),
                _floats([layer.inputs_RD for layer in layers], rows),
            )
        )
    return out


def _heaviest_first(layer: Any) -> Tensor:
    ids_TK = layer.ids_RK.astype(np.int64)
    if layer.keep_RK is not None:
        ids_TK = np.where(layer.keep_RK, ids_TK, -1)
    if layer.weights_RK is not None:
        order_TK = np.argsort(-layer.weights_RK.astype(np.float32), axis=1, kind="stable")
        ids_TK = np.take_along_axis(ids_TK, order_TK, axis=1)
    return torch.from_numpy(ids_TK)


def _floats(layers: Sequence[Any], rows: Any) -> tuple[Tensor, ...] | None:
    if any(values is None for values in layers):
        return None
    return tuple(torch.from_numpy(values[rows].astype(np.float32)) for values in layers)


def split_by_place(
    documents: Sequence[RoutedText], held_out: float = 0.1
) -> tuple[list[RoutedText], list[RoutedText]]:
    """Return the documents to learn from and those held out: the last part of every file.

    A part of each file is never seen, so neighbours of held-out text are known only at the one cut.

    Raises:
        UsageError: no file has two documents.
    """
    files: dict[str, list[RoutedText]] = {}
    for document in documents:
        files.setdefault(document.file, []).append(document)
    learn, test = [], []
    for mine in files.values():
        kept = len(mine) - max(1, round(held_out * len(mine))) if len(mine) > 1 else 1
        learn += mine[:kept]
        test += mine[kept:]
    if not test:
        raise UsageError(
            f"{len(documents)} documents are too few to hold some out; give a longer text, "
            "a smaller --window, or another text with --eval-data"
        )
    return learn, test


def embed(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the model's token embeddings ``[B, T, D]`` in fp32."""
    with torch.inference_mode():
        found = model.get_input_embeddings()(ids_BT.to(model.device)).float().cpu()
    return torch.as_tensor(found).clone()

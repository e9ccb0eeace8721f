"""The experts of a safetensors checkpoint, delivered as bytes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gangline.checkpoint.convert import Conversion
from gangline.checkpoint.inplace import FieldPlan
from gangline.checkpoint.safetensors_index import SafetensorsIndex, open_for_reads, read_into
from gangline.core.errors import CheckpointError
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog, ExpertLayout, Extent


@dataclass(frozen=True)
class LayerPlan:
    """How the experts of one layer are made.

    Attributes:
        name: path of the experts module.
        experts: number of experts E.
        fields: the fields in slot order.
        conversions: for each field without byte ranges, by its position, what makes it.
    """

    name: str
    experts: int
    fields: tuple[FieldPlan, ...]
    conversions: dict[int, Conversion]


class SafetensorsSource:
    """An :class:`~gangline.checkpoint.source.ExpertSource` over safetensors files."""

    def __init__(self, index: SafetensorsIndex, layers: Sequence[LayerPlan], where: Path) -> None:
        self._index = index
        self._layers = tuple(layers)
        self._where = where
        self.layouts = tuple(ExpertLayout(tuple(field.spec for field in layer.fields)) for layer in layers)
        self.experts = tuple(layer.experts for layer in layers)
        self.catalog = self._catalog()
        self.notes = self._notes()

    def _catalog(self) -> ExpertCatalog | None:
        extents: dict[ExpertKey, tuple[Extent, ...]] = {}
        for number, layer in enumerate(self._layers):
            for expert in range(layer.experts):
                pieces = [field.pieces[expert] for field in layer.fields if field.pieces is not None]
                if len(pieces) < len(layer.fields) or any(len(piece) != 1 for piece in pieces):
                    return None
                extents[ExpertKey(number, expert)] = tuple(piece[0] for piece in pieces)
        return ExpertCatalog(self._index.files, self.layouts, extents)

    def _notes(self) -> tuple[str, ...]:
        kinds: dict[str, int] = {}
        for layer in self._layers:
            made = {conversion.note for conversion in layer.conversions.values()}
            if any(field.spec.codec == "mxfp4" for field in layer.fields):
                made.add("MXFP4 blocks and scales, stored apart, brought together")
            for note in made:
                kinds[note] = kinds.get(note, 0) + 1
        return tuple(f"experts of {count} layers are converted: {note}" for note, count in kinds.items())

    def read_layer(self, layer: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield ``(expert, fields)``: see :class:`~gangline.checkpoint.source.ExpertSource`.

        Raises:
            CheckpointError: a file ends too early or cannot be read, or only the headers are at hand.
        """
        if not self._index.local:
            raise CheckpointError(
                f"{self._where}: only the headers are here; download the checkpoint to read experts"
            )
        plan = self._layers[layer]
        made = {
            at: _rows(conversion.run(self._index), plan.fields[at].spec.nbytes)
            for at, conversion in plan.conversions.items()
        }
        with ExitStack() as stack:
            wanted = {
                piece.file for field in plan.fields for pieces in field.pieces or () for piece in pieces
            }
            streams = {file: stack.enter_context(open_for_reads(self._index.files[file])) for file in wanted}
            for expert in range(plan.experts):
                fields = []
                for at, field in enumerate(plan.fields):
                    if field.pieces is None:
                        fields.append(made[at][expert])
                        continue
                    buffer = torch.empty(field.spec.nbytes, dtype=torch.uint8)
                    done = 0
                    for piece in field.pieces[expert]:
                        path = self._index.files[piece.file]
                        read_into(streams[piece.file], piece.offset, buffer[done : done + piece.nbytes], path)
                        done += piece.nbytes
                    fields.append(buffer)
                yield expert, tuple(fields)


def _rows(parameter: Tensor, nbytes: int) -> Tensor:
    """The bytes of a parameter, one row per expert; flat parameters keep their experts one after another."""
    return parameter.contiguous().view(-1).view(torch.uint8).view(-1, nbytes)

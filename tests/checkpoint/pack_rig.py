"""A small source of experts for the tests of expert packs, and helpers that look into a pack."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gangline.checkpoint.pack import write_pack
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog, ExpertLayout, FieldSpec

Fields = tuple[Tensor, ...]


class TinySource:
    """Random bf16 experts in memory: layers of different sizes, one transposed field."""

    def __init__(self, seed: int = 0, layers: int = 3, hidden: int = 64, on_expert=None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.experts = tuple(3 + layer for layer in range(layers))
        self.layouts = tuple(self._layout(hidden, 64 * (layer + 1)) for layer in range(layers))
        self.catalog = None
        self.notes = ()
        self.reads: list[int] = []
        self._on_expert = on_expert
        self._data = [
            [
                tuple(torch.randn(f.shape, generator=generator).bfloat16() for f in layout.fields)
                for _ in range(count)
            ]
            for layout, count in zip(self.layouts, self.experts, strict=True)
        ]

    @staticmethod
    def _layout(hidden: int, inner: int) -> ExpertLayout:
        nbytes = hidden * inner * 2
        return ExpertLayout(
            (
                FieldSpec("gate", (inner, hidden), "bf16", nbytes),
                FieldSpec("up", (inner, hidden), "bf16", nbytes),
                FieldSpec("down", (inner, hidden), "bf16", nbytes, transposed=True),
            )
        )

    def weights(self, layer: int, expert: int) -> Fields:
        """The matrices as stored."""
        return self._data[layer][expert]

    def raw(self, layer: int, expert: int) -> bytes:
        """All bytes of one expert."""
        return b"".join(w.view(torch.uint8).numpy().tobytes() for w in self.weights(layer, expert))

    def read_layer(self, layer: int) -> Iterator[tuple[int, Fields]]:
        self.reads.append(layer)
        for expert in range(self.experts[layer]):
            if self._on_expert is not None:
                self._on_expert(layer, expert)
            yield expert, tuple(w.reshape(-1).view(torch.uint8) for w in self.weights(layer, expert))


def record(catalog: ExpertCatalog, layer: int, expert: int) -> bytes:
    """One expert's bytes, read through a catalog."""
    extents = catalog.extents[ExpertKey(layer, expert)]
    data = catalog.files[0].read_bytes()
    return b"".join(data[e.offset : e.offset + e.nbytes] for e in extents)


def same(catalog: ExpertCatalog, source: TinySource) -> bool:
    """Whether a pack holds exactly the bytes of its source."""
    return all(
        record(catalog, layer, expert) == source.raw(layer, expert)
        for layer, count in enumerate(source.experts)
        for expert in range(count)
    )


def visible(folder: Path) -> list[str]:
    """Names in a folder that are not hidden."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def pack_in_a_process(folder: str, started, results, go_on=None) -> None:
    """Make a pack slowly; report how many layers were read here and whether the pack is right.

    ``started`` is set at the second layer; there it waits until it may ``go_on``, if that is given.
    """

    def pause(layer, expert):
        time.sleep(0.05)
        if layer == 1 and expert == 0:
            started.set()
            if go_on is not None:
                go_on.wait(timeout=120)

    source = TinySource(7, on_expert=pause)
    catalog = write_pack(source, folder, key="k")
    results.put((len(source.reads), same(catalog, source)))

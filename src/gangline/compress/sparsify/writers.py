"""Write sparse experts: into a copy of the checkpoint that any loader reads, or packed in our own format.

Both write a complete folder or nothing; see ``complete_folder``.
"""

import json
import shutil
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from gangline.checkpoint.packed import packed_name, quantization_entry
from gangline.checkpoint.safetensors_header import TensorEntry
from gangline.checkpoint.safetensors_index import INDEX_FILE, SafetensorsIndex
from gangline.checkpoint.source import ExpertSource
from gangline.compress.sparsify.expert import PrunedMatrix
from gangline.core.errors import UnsupportedModelError
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog
from gangline.formats import DenseCodec, get_codec

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}


@dataclass(frozen=True)
class Origin:
    """The checkpoint that is sparsified.

    Attributes:
        folder: where it lies.
        index: its tensors.
        catalog: where its experts lie in its files.
        names: path of the experts module of every MoE layer, as the files have it.
    """

    folder: Path
    index: SafetensorsIndex
    catalog: ExpertCatalog
    names: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, source: ExpertSource, names: Sequence[str], name: str) -> "Origin":
        """Refuse what cannot be written back; ``name`` is what the user called the model.

        Raises:
            UnsupportedModelError: the experts are quantized already, or must be converted to be read, or two
                layers share them.
        """
        catalog = source.catalog
        plain = all(
            isinstance(get_codec(spec.codec), DenseCodec)
            for layout in source.layouts
            for spec in layout.fields
        )
        if catalog is None or not plain:
            raise UnsupportedModelError(
                f"{name}: its experts do not lie in its files as plain bf16, fp16 or fp32 matrices, so "
                "sparse ones cannot take their place; start from the unquantized safetensors checkpoint"
            )
        if len(set(names)) < len(names):
            raise UnsupportedModelError(
                f"{name}: two layers share the same experts, which cannot be sparsified; use another model"
            )
        return cls(folder, SafetensorsIndex.from_folder(folder), catalog, tuple(names))

    @cached_property
    def expert_tensors(self) -> set[str]:
        """Names of the tensors that hold experts."""
        starts = sorted(
            {(extent.file, extent.offset) for extents in self.catalog.extents.values() for extent in extents}
        )

        def holds(entry: TensorEntry) -> bool:
            at = bisect_left(starts, (entry.file, entry.offset))
            return at < len(starts) and starts[at] < (entry.file, entry.offset + entry.nbytes)

        return {entry.name for entry in self.index if holds(entry)}

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of this name and shape, not an expert's, lies here in a plain float dtype."""
        entry = self.index.tensors.get(name)
        if entry is None or entry.shape != tuple(shape) or name in self.expert_tensors:
            return False
        return entry.dtype in ("BF16", "F16", "F32")

    def tensor(self, name: str, changed: Mapping[str, Tensor]) -> Tensor:
        """A tensor as it is to be written: what it has become, in the dtype that it is stored in."""
        stored = self.index.read(name)
        return changed[name].detach().to(stored.dtype).contiguous() if name in changed else stored

    def copy_rest(self, folder: Path) -> None:
        """Copy everything but weights: configuration, tokenizer, chat template, licence."""
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS and path.name != INDEX_FILE:
                shutil.copyfile(path, folder / path.name)


class DenseWriter:
    """A copy of the checkpoint, byte for byte, with zeros and corrected weights in the experts' place.

    Args:
        origin: the checkpoint.
        folder: where the copy goes.
        changed: other tensors that are no longer what they were, by name.
    """

    def __init__(self, origin: Origin, folder: Path, changed: Mapping[str, Tensor] | None = None) -> None:
        self._catalog = origin.catalog
        origin.copy_rest(folder)
        if (origin.folder / INDEX_FILE).is_file():
            shutil.copyfile(origin.folder / INDEX_FILE, folder / INDEX_FILE)
        with ExitStack() as stack:
            self._streams: list[BinaryIO] = []
            for path in origin.catalog.files:
                shutil.copyfile(path, folder / path.name)
                self._streams.append(stack.enter_context((folder / path.name).open("r+b")))
            self._stack = stack.pop_all()
        for name in changed or {}:
            entry, tensor = origin.index.entry(name), origin.tensor(name, changed or {})
            with (folder / origin.index.files[entry.file].name).open("r+b") as stream:
                stream.seek(entry.offset)
                stream.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())

    def add(self, key: ExpertKey, matrices: Sequence[PrunedMatrix]) -> None:
        """Write one expert over the original."""
        layout = self._catalog.layouts[key.layer]
        for spec, extent, matrix in zip(layout.fields, self._catalog.extents[key], matrices, strict=True):
            weight = matrix.weight_OI.t() if spec.transposed else matrix.weight_OI
            raw = get_codec(spec.codec).encode(weight.contiguous())
            stream = self._streams[extent.file]
            stream.seek(extent.offset)
            stream.write(raw.numpy().tobytes())

    def finish(self) -> None:
        """Close the files."""
        self._stack.close()


class PackedWriter:
    """A checkpoint in our own format: packed experts, one file a layer; everything else as it was.

    Args:
        origin: the checkpoint that it is made from.
        folder: where it goes.
        codec: of the experts.
        changed: other tensors that are no longer what they were, by name.
    """

    def __init__(
        self, origin: Origin, folder: Path, codec: str, changed: Mapping[str, Tensor] | None = None
    ) -> None:
        self._origin, self._folder, self._codec = origin, folder, codec
        self._names = origin.names
        self._pending: dict[str, Tensor] = {}
        self._layer = 0
        self._shards: list[list[str]] = []
        self._bytes = 0
        origin.copy_rest(folder)
        _set_entry(folder / "config.json")
        experts = origin.expert_tensors
        for file in range(len(origin.index.files)):
            names = [entry.name for entry in origin.index if entry.file == file and entry.name not in experts]
            if names:
                self._save({name: origin.tensor(name, changed or {}) for name in names})

    def add(self, key: ExpertKey, matrices: Sequence[PrunedMatrix]) -> None:
        """Take one expert; experts come layer by layer."""
        if key.layer != self._layer:
            self._flush()
            self._layer = key.layer
        fields = self._origin.catalog.layouts[key.layer].fields
        for spec, matrix in zip(fields, matrices, strict=True):
            self._pending[packed_name(self._names[key.layer], key.expert, spec.name, self._codec)] = (
                matrix.raw
            )

    def finish(self) -> None:
        """Write what is left, name the shards and write their index."""
        self._flush()
        total = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{total:05d}.safetensors"
            (self._folder / _part(number - 1)).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", "utf-8")

    def _flush(self) -> None:
        if self._pending:
            self._save(self._pending)
            self._pending = {}

    def _save(self, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, self._folder / _part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(tensors))
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _set_entry(path: Path) -> None:
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    config["quantization_config"] = quantization_entry()
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")

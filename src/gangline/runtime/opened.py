"""A model whose files are found and whose headers are read: what both planning and loading start from."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gangline.checkpoint.locate import LocalCheckpoint, RemoteCheckpoint
from gangline.checkpoint.recode import TILED, recode_layout
from gangline.checkpoint.resolve import resolve_index
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.checkpoint.source import ExpertsModule, ExpertSource
from gangline.core.errors import UsageError
from gangline.core.layout import ExpertCatalog, ExpertLayout
from gangline.formats import codec_names
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.models import MoEView, expert_math
from gangline.policies.precision import Mixed
from gangline.runtime.arrival import slot_layout
from gangline.runtime.copies import measure_copies, precision_of_copies
from gangline.runtime.dense import (
    build_skeleton,
    load_dense,
    model_class,
    read_config,
    refuse_dtype,
    strip_quantization,
)
from gangline.runtime.dense_packing import (
    keep_stored_linears,
    linear_codecs,
    pack_linears,
    stored_linears,
    with_packed_linears,
)
from gangline.runtime.files import ALIGN
from gangline.runtime.footprint import Copies, Footprint, measure_footprint
from gangline.runtime.read_plan import read_sizes
from gangline.runtime.scratch import native_scratch

if TYPE_CHECKING:
    from gangline.checkpoint.gguf import GGUFCheckpoint

# 8.125, 6.25, 4.25, 3.25 and 2.25 bits per weight, and a scale of each row. Byte scales (the letter d) cost
# half of what fp16 ones do, which buys smaller groups.
PRECISIONS = {
    "stored": None,
    "int8": "tile16:int8g64d",
    "int6": "tile16:int6g32d",
    "int4": "tile16:int4g32d",
    "int3": "tile16:int3g32d",
    "int2": "tile16:int2g32d",
}


def codec_of(precision: str) -> str | None:
    """Return the codec of a precision: None for ``stored``, else tiles (``gangline.formats.tiled``).

    Args:
        precision: ``stored``, ``int8``, ``int6``, ``int4``, ``int3``, ``int2``, or a width with its group
            and perhaps a letter: ``int4g32`` with fp16 scales, ``int4g32d`` with byte scales, ``int4g32z``
            with a zero point for every group as well.

    Raises:
        UsageError: another name.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision]
    codec = f"tile16:{precision}"
    if precision.startswith("int") and codec in codec_names():
        return codec
    raise UsageError(
        f"unknown precision {precision!r}; choose {', '.join(PRECISIONS)}, or for example int4g32d, int4g32z"
    )


@dataclass(frozen=True)
class OpenedModel:
    """Configuration, skeleton and expert source of one checkpoint; no weight has been read.

    Attributes:
        name: what the user called it.
        config: its configuration, without quantization entries.
        cls: its transformers class.
        dtype: number format of the dense weights and of the computation.
        skeleton: the model on ``meta`` without expert matrices.
        view: its MoE layers.
        source: its experts.
        folder: its folder, None for a model that is only known by its headers.
        gguf: the GGUF checkpoint, if it is one.
        mapped: dense weights that are used as the file has them (see :func:`_mapped`).
        sparse_as_stored: whether sparse experts stay in the order of GPU kernels.
    """

    name: str
    config: PreTrainedConfig
    cls: type[PreTrainedModel]
    dtype: torch.dtype
    skeleton: PreTrainedModel
    view: MoEView
    source: ExpertSource
    folder: Path | None
    gguf: "GGUFCheckpoint | None"
    mapped: frozenset[str] = frozenset()
    sparse_as_stored: bool = False

    def layouts(self, codec: str | None) -> tuple[ExpertLayout, ...]:
        """Return how experts will lie in their slots at a precision."""
        codec = self.expert_codec(codec)
        return tuple(recode_layout(layout, codec) for layout in self.source.layouts)

    def expert_codec(self, codec: str | None) -> str | None:
        """Return the codec of the experts: what was asked for; or the order in which the native core reads
        sparse ones that shall stay as stored, if it can compute all of them.
        """
        as_stored = codec is not None or self.sparse_as_stored or not self._sparse_in_native_core
        return codec if as_stored else TILED

    @cached_property
    def _sparse_in_native_core(self) -> bool:
        layouts = self.source.layouts
        if not any(field.codec.startswith("samoyeds:") for layout in layouts for field in layout.fields):
            return False
        return all(
            NativeKernel.supports(recode_layout(layout, TILED), expert_math(block)) is None
            for layout, block in zip(layouts, self.view.blocks, strict=True)
        )

    def in_place(self, codec: str | None) -> ExpertCatalog | None:
        """Return where experts can be read as the files are, or None if they need a pack."""
        return self.source.catalog if self.layouts(codec) == tuple(self.source.layouts) else None

    def footprint(self, codec: str | None) -> Footprint:
        """Return the model's sizes at a precision."""
        layouts, catalog = self.layouts(codec), self.in_place(codec)
        if catalog is not None:
            sizes = largest_reads(catalog, ALIGN)
        else:  # an expert pack: one aligned record an expert
            sizes = _level([_up(layout.nbytes, ALIGN) for layout in layouts])
        layouts = tuple(slot_layout(layout) for layout in layouts)
        plain = measure_footprint(
            self.skeleton,
            self.dtype,
            self.view.geometry,
            layouts,
            tuple(sizes),
            self.mapped,
            scratch=native_scratch(self.view, layouts),
        )
        if codec is not None:
            codecs = linear_codecs(self.skeleton, self.view, codec)
            return with_packed_linears(plain, self.skeleton, self.view, codecs)
        return with_packed_linears(plain, self.skeleton, self.view, self._stored_linears, expanded=False)

    def copies(self, precision: str, mixed: Mixed) -> tuple[str, Copies]:
        """Return codec and sizes of the copies in low precision of experts at a precision.

        Raises:
            UsageError: there is no such precision, or it takes no fewer bytes.
        """
        high = self.layouts(codec_of(precision))
        name = precision_of_copies(self.view, high, mixed)
        codec = codec_of(name)
        return measure_copies(self.view, high, self.layouts(codec), codec, mixed, self.dtype)

    def load_dense(self, codec: str | None) -> tuple[PreTrainedModel, MoEView]:
        """Load everything but the experts; with a codec, its linear layers are packed.

        Without one, those of a GGUF file stay packed as they are stored, where the native core can compute
        with them.
        """
        if self.gguf is not None:
            stored = self._stored_linears if codec is None else {}
            tensors = dict(self.gguf.dense_tensors(self.dtype, {f"{name}.weight" for name in stored}))
            model, view = load_dense(self.cls, self.config, self.dtype, tensors=tensors)
            keep_stored_linears(model, view, self.gguf, stored)
        else:
            assert self.folder is not None
            model, view = load_dense(self.cls, self.config, self.dtype, folder=self.folder)
        if codec is not None:
            pack_linears(model, view, linear_codecs(model, view, codec))
        return model, view

    @cached_property
    def _stored_linears(self) -> dict[str, str]:
        """The linear layers of a GGUF file that stay packed, with their codecs."""
        return {} if self.gguf is None else stored_linears(self.skeleton, self.view, self.gguf)

    @cached_property
    def identity(self) -> str:
        """A hash of the files' names, sizes and times: the key of everything derived from them."""
        digest = hashlib.sha256()
        for path in self._files():
            stat = path.resolve().stat()
            digest.update(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:24]

    def _files(self) -> Iterator[Path]:
        if self.gguf is not None:
            yield from self.gguf.files
        elif self.folder is not None:
            yield from sorted(self.folder.glob("*.safetensors"))


def open_model(checkpoint: LocalCheckpoint | RemoteCheckpoint, dtype: torch.dtype | None) -> OpenedModel:
    """Read the headers of a model.

    Args:
        checkpoint: its files, or its place on the Hub (then only a plan can be made).
        dtype: number format of the dense weights and of the computation; None keeps the checkpoint's.

    Raises:
        CheckpointError, UnsupportedModelError: the model cannot be read, or not by us.
    """
    if isinstance(checkpoint, LocalCheckpoint) and checkpoint.gguf is not None:
        return _open_gguf(checkpoint, dtype)
    if isinstance(checkpoint, RemoteCheckpoint):
        folder, config = None, read_config(checkpoint.config.parent, checkpoint.name)
        index = SafetensorsIndex.from_hub(checkpoint.repo, checkpoint.revision)
        where = Path(checkpoint.repo)
    else:
        folder, config = checkpoint.folder, read_config(checkpoint.folder, checkpoint.name)
        index = SafetensorsIndex.from_folder(checkpoint.folder)
        where = checkpoint.folder
    kind = dtype or _config_dtype(config)
    refuse_dtype(config, kind, checkpoint.name)
    cls = model_class(config, checkpoint.name)
    skeleton, view = build_skeleton(cls, config, kind)
    source = resolve_index(index, where, skeleton, experts_modules(view), kind)
    mapped = _mapped(skeleton, index, kind)
    return OpenedModel(checkpoint.name, config, cls, kind, skeleton, view, source, folder, None, mapped)


def _open_gguf(checkpoint: LocalCheckpoint, dtype: torch.dtype | None) -> OpenedModel:
    from gangline.checkpoint.gguf import GGUFCheckpoint

    assert checkpoint.gguf is not None
    gguf = GGUFCheckpoint.open(checkpoint.gguf)
    config = strip_quantization(gguf.config, checkpoint.name)
    kind = dtype or torch.bfloat16
    refuse_dtype(config, kind, checkpoint.name)
    cls = model_class(config, checkpoint.name)
    skeleton, view = build_skeleton(cls, config, kind)
    source = gguf.expert_source(experts_modules(view), kind)
    return OpenedModel(checkpoint.name, config, cls, kind, skeleton, view, source, checkpoint.folder, gguf)


def _config_dtype(config: PreTrainedConfig) -> torch.dtype:
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _mapped(skeleton: PreTrainedModel, index: SafetensorsIndex, dtype: torch.dtype) -> frozenset[str]:
    """Return the dense weights that the file holds under the model's own name, in its shape and its dtype."""
    stored = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}.get(dtype)
    return frozenset(
        name
        for name, weight in skeleton.named_parameters()
        if (entry := index.tensors.get(name)) is not None
        and entry.dtype == stored
        and entry.shape == tuple(weight.shape)
    )


def experts_modules(view: MoEView) -> list[ExpertsModule]:
    """Describe a view's experts modules for the checkpoint readers, which know no modules."""
    return [
        ExpertsModule(
            prefix=block.stored_name or block.name,
            experts=block.geometry.experts,
            params=block.param_shapes,
            transposed=block.transposed,
            has_gate=block.has_gate,
            interleaved=block.interleaved,
            matrices=block.fields,
        )
        for block in view.blocks
    ]


def largest_reads(catalog: ExpertCatalog, align: int) -> list[int]:
    """Return, for each layer, the bytes of the slots that its experts get."""
    return _level(read_sizes(catalog, align))


def _level(sizes: Sequence[int]) -> list[int]:
    """Round sizes that differ by alignment only up to one, so that their layers share a pool."""
    levels: list[int] = []
    result = []
    for size in sizes:
        near = next((level for level in levels if 0 <= level - size <= 4 * ALIGN), None)
        if near is None:
            near = max(s for s in sizes if 0 <= s - size <= 4 * ALIGN)
            levels.append(near)
        result.append(near)
    return result


def _up(size: int, align: int) -> int:
    return -(-size // align) * align

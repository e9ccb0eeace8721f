"""Codecs in tiles of 16 rows (``tile_layout.py``), the order in which the native kernels read weights.

``tile16:int{bits}g{group}``: ``w_hat = scale * (code - 2^(bits-1))``, the same codes and scales as those of
``int{bits}g{group}`` (``grouped.py``). With the suffix ``z`` every group has a zero point as well: ``w_hat
= scale * (code - zero)``. With the suffix ``d`` the scales are quantized once more (double quantization of
"QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3, but linear): a signed byte for
each group under one fp32 scale a row, ``w_hat = row_scale * byte * (code - 2^(bits-1))``. The largest scale
of a row is the byte 127 or -127. ``tile16:mxfp4``: E2M1 codes under E8M0 exponents (``mx.py``).

Shapes: O rows, I columns, R row blocks, S the 16 rows of one, G groups of a row, L weights of a group, C
columns filled up to whole groups, N groups in all.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gangline.core.errors import FormatError
from gangline.formats.clip import search_range, search_scale
from gangline.formats.codec import CHUNK, Shape, check_raw, check_rows, check_shape, check_weight
from gangline.formats.grouped import GROUPS, WIDTHS
from gangline.formats.mx import BLOCK, decode_e2m1, encode_e2m1, exponent_scale
from gangline.formats.tile_layout import ROWS, TileLayout, TileParts, row_blocks

_LARGEST_BYTE = 127


@dataclass(frozen=True)
class Groups:
    """Quantized groups of some row blocks.

    Attributes:
        codes_RSC: uint8.
        scales_RGS: fp16, uint8 exponents, or int8 in units of the rows' scales.
        zeros_RGS: uint8 zero points, or None.
        row_scales_RS: fp32, or None.
    """

    codes_RSC: Tensor
    scales_RGS: Tensor
    zeros_RGS: Tensor | None = None
    row_scales_RS: Tensor | None = None


@dataclass(frozen=True)
class TiledCodec(ABC):
    """What both kinds of tiles share; a kind says how groups are quantized and what codes stand for."""

    name: str
    layout: TileLayout

    @property
    def bits(self) -> float:
        """Code and its share of the scale (and zero point), without the scales of whole rows."""
        layout = self.layout
        return layout.width + 8 * (layout.scale.itemsize + layout.has_zeros) / layout.group

    def nbytes(self, shape: Shape) -> int:
        """Bytes of whole row blocks."""
        return self.layout.nbytes(check_shape(self.name, shape))

    def decode(self, raw: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See ``Codec.decode``; computed in fp32, rounded once to ``dtype``."""
        raw_RB = self.row_blocks(raw, shape)
        out_OI = torch.empty(shape, dtype=dtype, device=raw.device)
        for blocks, rows in self._chunks(shape):
            w_RSGL = self._dequantize(self._groups(raw_RB[blocks], shape[1]), dtype)
            out_OI[rows] = w_RSGL.flatten(0, 1).flatten(1)[: rows.stop - rows.start, : shape[1]]
        return out_OI

    def encode(self, weight: Tensor) -> Tensor:
        """See ``Codec.encode``; FormatError if a weight is nan, infinite or too large for the scales."""
        shape = check_weight(self.name, weight)
        raw = torch.zeros(self.nbytes(shape), dtype=torch.uint8, device=weight.device)
        raw_RB = self.row_blocks(raw, shape)
        for blocks, rows in self._chunks(shape):
            w_OI = weight[rows].detach().to(torch.float32)
            fill = self.layout.columns(shape[1]) - shape[1]
            w_SGL = pad(w_OI, (0, fill, 0, -len(w_OI) % ROWS)).unflatten(1, (-1, self.layout.group))
            try:
                found = self._quantize(w_SGL.unflatten(0, (-1, ROWS)))
            except FormatError as error:
                raise FormatError(f"{self.name}: {error}") from error
            found.scales_RGS.transpose(1, 2).flatten(0, 1)[len(w_OI) :] = 0
            if found.row_scales_RS is not None:
                found.row_scales_RS.view(-1)[len(w_OI) :] = 0
            self._store(raw_RB[blocks], shape[1], found)
        return raw

    def slice_rows(self, raw: Tensor, shape: Shape, start: int, stop: int) -> Tensor:
        """See ``Codec.slice_rows``; a view where the range is made of whole row blocks."""
        check_rows(self.name, shape, start, stop)
        if start % ROWS == 0 and (stop % ROWS == 0 or stop == shape[0]):
            raw = check_raw(self.name, raw, shape, self.nbytes(shape))
            step = self.layout.block_bytes(shape[1])
            return raw[start // ROWS * step : row_blocks(stop) * step]
        blocks = slice(start // ROWS, row_blocks(stop))
        whole = self._groups(self.row_blocks(raw, shape)[blocks], shape[1])
        rows = slice(start - blocks.start * ROWS, stop - blocks.start * ROWS)

        def cut(part_RSX: Tensor) -> Tensor:
            return part_RSX.flatten(0, 1)[rows]

        zeros_RGS = whole.zeros_RGS
        zeros_OG = None if zeros_RGS is None else cut(zeros_RGS.transpose(1, 2))
        scales_OG = cut(whole.scales_RGS.transpose(1, 2))
        rows_RS = whole.row_scales_RS
        row_scales_O = None if rows_RS is None else rows_RS.flatten()[rows]
        return self.assemble(cut(whole.codes_RSC)[:, : shape[1]], scales_OG, zeros_OG, row_scales_O)

    def assemble(
        self,
        codes_OI: Tensor,
        scales_OG: Tensor,
        zeros_OG: Tensor | None = None,
        row_scales_O: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Bytes of a matrix that is quantized already.

        Args:
            codes_OI: uint8, none past the width.
            scales_OG: fp16, uint8 exponents, or int8 in units of the rows' scales.
            zeros_OG: uint8 zero points, of codecs that have them.
            row_scales_O: fp32, of codecs that have them.
            out: zeroed bytes to write into instead of new ones.
        """
        shape = (codes_OI.shape[0], codes_OI.shape[1])
        raw = out
        if raw is None:
            raw = torch.zeros(self.nbytes(shape), dtype=torch.uint8, device=codes_OI.device)
        raw_RB = self.row_blocks(raw, shape)
        for blocks, rows in self._chunks(shape):
            codes_OC = self._fill_columns(codes_OI[rows], None if zeros_OG is None else zeros_OG[rows])
            found = Groups(
                _by_block(codes_OC, self._zero),
                _by_block(scales_OG[rows], 0).transpose(1, 2),
                None if zeros_OG is None else _by_block(zeros_OG[rows], 0).transpose(1, 2),
                None if row_scales_O is None else _by_block(row_scales_O[rows, None], 0).squeeze(2),
            )
            self._store(raw_RB[blocks], shape[1], found)
        return raw

    def row_blocks(self, raw: Tensor, shape: Shape) -> Tensor:
        """A view of ``raw`` with the bytes of each row block in a row."""
        return check_raw(self.name, raw, shape, self.nbytes(shape)).view(row_blocks(shape[0]), -1)

    @property
    @abstractmethod
    def _zero(self) -> int:
        """The code of zero in a group without zero point."""

    @abstractmethod
    def _dequantize(self, groups: Groups, dtype: torch.dtype) -> Tensor:
        """Weights ``(R, 16, G, L)`` in ``dtype``."""

    @abstractmethod
    def _quantize(self, w_RSGL: Tensor) -> Groups: ...

    def _chunks(self, shape: Shape) -> Iterator[tuple[slice, slice]]:
        """Runs of row blocks and their rows."""
        step = max(1, CHUNK // (ROWS * shape[1]))
        for start in range(0, row_blocks(shape[0]), step):
            stop = min(start + step, row_blocks(shape[0]))
            yield slice(start, stop), slice(start * ROWS, min(stop * ROWS, shape[0]))

    def _groups(self, raw_RB: Tensor, columns: int) -> Groups:
        parts = self.layout.read(raw_RB, columns)
        codes_RSC = self.layout.unpack(parts.words_RW)
        return Groups(codes_RSC, parts.scales_RGS, parts.zeros_RGS, parts.row_scales_RS)

    def _store(self, raw_RB: Tensor, columns: int, groups: Groups) -> None:
        words_RW = self.layout.pack(groups.codes_RSC)
        self.layout.write(
            raw_RB, columns, TileParts(groups.scales_RGS, groups.zeros_RGS, words_RW, groups.row_scales_RS)
        )

    def _fill_columns(self, codes_OI: Tensor, zeros_OG: Tensor | None) -> Tensor:
        fill = self.layout.columns(codes_OI.shape[1]) - codes_OI.shape[1]
        if fill == 0:
            return codes_OI
        if zeros_OG is None:
            return pad(codes_OI, (0, fill), value=self._zero)
        return torch.cat([codes_OI, zeros_OG[:, -1:].expand(-1, fill)], dim=1)


class TiledIntCodec(TiledCodec):
    """``tile16:int{bits}g{group}``, with ``z`` if it has zero points."""

    @property
    def _zero(self) -> int:
        return 0 if self.layout.has_zeros else 2 ** (self.layout.width - 1)

    def _dequantize(self, groups: Groups, dtype: torch.dtype) -> Tensor:
        q_RSGL = groups.codes_RSC.to(torch.float32).unflatten(2, (-1, self.layout.group))
        if groups.zeros_RGS is None:
            q_RSGL.sub_(self._zero)
        else:
            q_RSGL.sub_(groups.zeros_RGS.transpose(1, 2).to(torch.float32)[..., None])
        scales_RSG = groups.scales_RGS.transpose(1, 2).to(torch.float32)
        out_RSGL = torch.empty_like(q_RSGL, dtype=dtype)
        return torch.mul(q_RSGL, scales_RSG[..., None], out=out_RSGL)

    def _quantize(self, w_RSGL: Tensor) -> Groups:
        width, has_zeros = self.layout.width, self.layout.has_zeros
        w_NL = w_RSGL.reshape(-1, self.layout.group)
        if has_zeros:
            scale_N, zero_N = search_range(w_NL, width)
        else:
            scale_N = search_scale(w_NL, width)
            zero_N = torch.full_like(scale_N, self._zero)
        q_NL = (w_NL / scale_N[:, None]).round_().add_(zero_N[:, None]).clamp_(0, 2**width - 1)
        by_row = (*w_RSGL.shape[:2], -1)
        scales_RGS = scale_N.to(torch.float16).view(by_row).transpose(1, 2)
        zeros_RGS = zero_N.to(torch.uint8).view(by_row).transpose(1, 2) if has_zeros else None
        return Groups(q_NL.to(torch.uint8).view(by_row), scales_RGS, zeros_RGS)


class TiledByteScaledCodec(TiledIntCodec):
    """``tile16:int{bits}g{group}d``."""

    def _dequantize(self, groups: Groups, dtype: torch.dtype) -> Tensor:
        assert groups.row_scales_RS is not None
        q_RSGL = groups.codes_RSC.to(torch.float32).unflatten(2, (-1, self.layout.group)).sub_(self._zero)
        # Exact: at most 127 times 128.
        q_RSGL.mul_(groups.scales_RGS.transpose(1, 2).to(torch.float32)[..., None])
        out_RSGL = torch.empty_like(q_RSGL, dtype=dtype)
        return torch.mul(q_RSGL, groups.row_scales_RS[..., None, None], out=out_RSGL)

    def _quantize(self, w_RSGL: Tensor) -> Groups:
        scale_N = search_scale(w_RSGL.reshape(-1, self.layout.group), self.layout.width)
        scales_RSG = scale_N.view(w_RSGL.shape[:3])
        row_scales_RS = scales_RSG.abs().amax(2) / _LARGEST_BYTE
        bytes_RSG = (scales_RSG.abs() / row_scales_RS[..., None]).round_().clamp_(1, _LARGEST_BYTE)
        bytes_RSG = torch.copysign(bytes_RSG, scales_RSG)
        steps_RSG = bytes_RSG * row_scales_RS[..., None]
        q_RSGL = (w_RSGL / steps_RSG[..., None]).round_().add_(self._zero)
        codes_RSGL = q_RSGL.clamp_(0, 2**self.layout.width - 1).to(torch.uint8)
        scales_RGS = bytes_RSG.to(torch.int8).transpose(1, 2)
        return Groups(codes_RSGL.flatten(2), scales_RGS, None, row_scales_RS)


class TiledMXFP4Codec(TiledCodec):
    """``tile16:mxfp4``."""

    @property
    def _zero(self) -> int:
        return 0

    def _dequantize(self, groups: Groups, dtype: torch.dtype) -> Tensor:
        x_RSGL = decode_e2m1(groups.codes_RSC).unflatten(2, (-1, BLOCK))
        scales_RSG = exponent_scale(groups.scales_RGS.transpose(1, 2))
        out_RSGL = torch.empty_like(x_RSGL, dtype=dtype)
        return torch.mul(x_RSGL, scales_RSG[..., None], out=out_RSGL)

    def _quantize(self, w_RSGL: Tensor) -> Groups:
        codes_NL, exponent_N = encode_e2m1(w_RSGL.reshape(-1, BLOCK))
        by_row = (*w_RSGL.shape[:2], -1)
        return Groups(codes_NL.view(by_row), exponent_N.view(by_row).transpose(1, 2))


def _by_block(part_OX: Tensor, fill: int) -> Tensor:
    """Rows by row blocks ``(R, 16, X)``, missing rows filled."""
    filled_RSX: Tensor = pad(part_OX, (0, 0, 0, -len(part_OX) % ROWS), value=fill).unflatten(0, (-1, ROWS))
    return filled_RSX


def tiled_codecs() -> list[TiledCodec]:
    """Every width with every group size: plain, with zero points, with byte scales; and MXFP4."""
    codecs: list[TiledCodec] = []
    for width in WIDTHS:
        for group in GROUPS:
            for suffix in ("", "z"):
                layout = TileLayout(width, group, torch.float16, bool(suffix))
                codecs.append(TiledIntCodec(f"tile16:int{width}g{group}{suffix}", layout))
            layout = TileLayout(width, group, torch.int8, False)
            codecs.append(TiledByteScaledCodec(f"tile16:int{width}g{group}d", layout))
    return [*codecs, TiledMXFP4Codec("tile16:mxfp4", TileLayout(4, BLOCK, torch.uint8, False))]

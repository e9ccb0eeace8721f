"""Samoyeds matrices in tiles of 16 compressed rows: the order in which the CPU kernels read, front to back.

``samoyeds16:N:M:V/VALUES`` holds exactly what ``samoyeds:N:M:V/VALUES`` holds (``samoyeds.py``: pattern,
values, meaning of ``sub`` and of positions). ``retile.py`` turns one into the other without a change of any
value.

Lane ``r`` (0-15) of a tile is one compressed row. With ``B = floor(16 / N)`` blocks of M rows a tile holds
the compressed rows of blocks ``tile * B ... tile * B + B - 1``, so that every output row belongs to one tile:
tile ``t`` makes the output rows ``t * B * M ... + B * M - 1``. Lanes past ``B * N`` (N = 3, 5, ...) add
nothing.

With K = in filled up to a multiple of V and of 64, S = K / V segments, G = ceil(K / 2 / group) groups, a tile
is

1. scales: G times 16 fp16 numbers, one a lane; only with codes;
2. shifts: S times 16 bytes, one a lane; only if N < M. In segment ``s`` lane ``r`` adds to the output row

       (r / N) * M + r % N + shift[s][r]      (of the tile; integer division),   shift = sub - r % N

   which is 0 ... M - N. A kernel keeps M - N + 1 accumulators a lane, starts every segment at zero and adds
   its sum to accumulator ``shift``; at the end accumulator ``a`` of lane ``r`` goes to row ``(r / N) * M + r
   % N + a`` (where N = 1 or N = M no two meet in a row; else they are added). For N:M = 1:2: two
   accumulators, the byte is the mask, and the rows of accumulators 0 and 1 alternate;
3. zeros up to a multiple of 64 bytes;
4. for every step of 32 columns (8 groups of four, called quads 0 ... 7; 16 values a lane):

   a. 64 bytes of positions: one 32-bit word a lane. The nibble ``i0 | i1 << 2`` of quad ``j`` is at bit
      ``8 * (j % 4) + 4 * (j / 4)``. So byte ``j`` of a word is quads ``j`` and ``j + 4``, and
      ``(word >> 2p) & 0x03030303`` is plane ``p``: four positions, one a byte;
   b. the values. bf16, fp16: 8 times 64 bytes, quad after quad: a 32-bit word a lane, slot 0 in its low half,
      slot 1 in its high half. 8-bit codes: 4 times 64 bytes, plane after plane: byte ``c`` of a lane's word
      is

          plane 0: slot 0 of quad c     plane 1: slot 1 of quad c
          plane 2: slot 0 of quad 4 + c   plane 3: slot 1 of quad 4 + c

      4-bit codes: 2 times 64 bytes; the first holds plane 0 in the low nibbles and plane 1 in the high ones,
      the second planes 2 and 3.

Group ``g`` of the scales is the steps ``g * group / 16 ... + group / 16 - 1`` (the last may have fewer);
segment ``s`` the columns ``s * V ... + V - 1``: a step is two segments where V = 16.

How it is meant to be read (x is the activation vector, zero past ``in``; the dense matrix is never made):

- fp32 arithmetic, AVX2 and AVX-512: broadcast the four x of quad j to every 128 bits; ``vpermilps`` by ``word
  >> (8 * (j % 4) + 4 * (j / 4))`` (it reads the two low bits) gives every lane its x for slot 0, two bits
  further the one for slot 1; two FMAs with the halves of the value word.
- bf16 arithmetic, AVX-512 BF16: a table of 16 words, entry ``i0 | i1 << 2`` = (x[i0], x[i1]), made once for a
  token and quad; ``vpermd`` by ``word >> (8 * (j % 4) + 4 * (j / 4))`` (it reads the four low bits),
  ``vdpbf16ps``.
- integer arithmetic: the 16 int8 activations of planes 2h and 2h + 1 (quads 4h ... 4h + 3) in every 128 bits;
  ``vpshufb`` by ``plane | 0x0C080400`` gives the four activations that belong to the four codes of a lane's
  word; ``vpdpbusd``. Codes are ``value + 2^(bits-1)``; the excess is ``2^(bits-1)`` times the sum of the
  activations *that were picked*, which differs from lane to lane (a second ``vpdpbusd`` with ones gives it).

Every tile, every step and every vector starts at a multiple of 64 bytes of the matrix. Bytes: those of
``samoyeds:`` but for what fills up the last tile, and less than 64 for each head. Filling lanes have values 0
(codes ``2^(bits-1)``), words 0x44444444, scales 0, shifts 0.

Shapes: T tiles, R the 16 lanes of one, H values of a lane, G groups, S segments, C steps, J quads of a step,
Q quads of a row, P planes, W words.
"""

import torch
from torch import Tensor

from gangline.formats.codec import Shape, check_raw, check_shape
from gangline.formats.samoyeds import TILE, SparseCodec, SparseContent, fill_rows

_STEP = 32
_ALIGN = 64
_EMPTY = 0b0100
# Bit of quad j in a word.
_SHIFTS = [8 * (quad % 4) + 4 * (quad // 4) for quad in range(8)]


class SamoyedsTileCodec(SparseCodec):
    """``samoyeds16:N:M:V/VALUES``; see the top of the file for the bytes."""

    @property
    def name(self) -> str:
        """For example ``samoyeds16:1:2:32/bf16``."""
        return f"samoyeds16:{self.pattern}/{self.values.name}"

    @property
    def lanes(self) -> int:
        """Lanes of a tile that hold compressed rows."""
        return TILE // self.pattern.n * self.pattern.n

    @property
    def tile_rows(self) -> int:
        """Output rows of a tile."""
        return TILE // self.pattern.n * self.pattern.m

    def nbytes(self, shape: Shape) -> int:
        """Bytes of whole tiles."""
        rows, columns = check_shape(self.name, shape)
        return -(-rows // self.tile_rows) * self.tile_bytes(columns)

    def head_bytes(self, columns: int) -> int:
        """Bytes of a tile before its first step."""
        scales, shifts = self._head(columns)
        return -(-(scales + shifts) // _ALIGN) * _ALIGN

    def step_bytes(self) -> int:
        """Bytes of 32 columns: positions and values."""
        return _ALIGN + TILE * self.values.width * _STEP // 16

    def tile_bytes(self, columns: int) -> int:
        """Bytes of a tile: a multiple of 64."""
        return self.head_bytes(columns) + self.pattern.columns(columns) // _STEP * self.step_bytes()

    def read(self, raw: Tensor, shape: Shape) -> SparseContent:
        """See ``SparseCodec.read``; everything is copied."""
        raw_TB = (
            check_raw(self.name, raw, shape, self.nbytes(shape)).clone().view(-1, self.tile_bytes(shape[1]))
        )
        head_TB, body_TB = raw_TB[:, : self.head_bytes(shape[1])], raw_TB[:, self.head_bytes(shape[1]) :]
        body_TCB = body_TB.view(len(raw_TB), -1, self.step_bytes())
        words_TCR = body_TCB[:, :, :_ALIGN].view(torch.int32)
        quads_TCJR = torch.stack([(words_TCR >> shift) & 15 for shift in _SHIFTS], dim=2).to(torch.uint8)
        values_TRH = self._unpack(body_TCB[:, :, _ALIGN:])
        scales_RG = None
        scales, shifts = self._head(shape[1])
        if scales:
            scales_TGR = head_TB[:, :scales].view(torch.float16).unflatten(1, (-1, TILE))
            scales_RG = self._rows(scales_TGR.transpose(1, 2), shape)
        order_R = torch.arange(TILE, device=raw.device) % self.pattern.n
        if shifts:
            shift_TSR = head_TB[:, scales : scales + shifts].unflatten(1, (-1, TILE))
        else:
            shift_TSR = raw.new_zeros(len(raw_TB), self.pattern.columns(shape[1]) // self.pattern.v, TILE)
        sub_RS = self._rows((shift_TSR + order_R.to(torch.uint8)).transpose(1, 2), shape)
        meta_RQ = self._rows(quads_TCJR.permute(0, 3, 1, 2).flatten(2), shape)
        return SparseContent(self._rows(values_TRH, shape), scales_RG, sub_RS.t(), meta_RQ)

    def write(self, content: SparseContent, shape: Shape) -> Tensor:
        """See ``SparseCodec.write``."""
        raw = torch.zeros(self.nbytes(shape), dtype=torch.uint8, device=content.values_RH.device)
        raw_TB = raw.view(-1, self.tile_bytes(shape[1]))
        head = self.head_bytes(shape[1])
        tiles = len(raw_TB)
        content = fill_rows(content, self.values, self.pattern, tiles * self.lanes - len(content.values_RH))
        body_TCB = raw_TB[:, head:].unflatten(1, (-1, self.step_bytes()))
        quads_TRCJ = self._lanes(content.meta_RQ, _EMPTY).unflatten(2, (-1, 8)).to(torch.int32)
        shifts_J = torch.tensor(_SHIFTS, dtype=torch.int32, device=raw.device)
        words_TRC = (quads_TRCJ << shifts_J).sum(dim=3, dtype=torch.int32)
        body_TCB[:, :, :_ALIGN] = _bytes(words_TRC.transpose(1, 2))
        body_TCB[:, :, _ALIGN:] = self._pack(self._lanes(content.values_RH, self.values.zero))
        scales, shifts = self._head(shape[1])
        if content.scales_RG is not None:
            scales_TRG = self._lanes(content.scales_RG, 0)
            raw_TB[:, :scales] = _bytes(scales_TRG.transpose(1, 2)).flatten(1)
        if shifts:
            order_R = (torch.arange(content.sub_SR.shape[1], device=raw.device) % self.pattern.n).to(
                torch.uint8
            )
            shift_TRS = self._lanes((content.sub_SR - order_R).t(), 0)
            raw_TB[:, scales : scales + shifts] = shift_TRS.transpose(1, 2).flatten(1)
        return raw

    def _head(self, columns: int) -> tuple[int, int]:
        """Bytes of scales and of shifts."""
        filled = self.pattern.columns(columns)
        segments = filled // self.pattern.v if self.pattern.n < self.pattern.m else 0
        return self.values.groups(filled // 2) * TILE * 2, segments * TILE

    def _lanes(self, part_RX: Tensor, empty: int) -> Tensor:
        """Rows of whole tiles as ``(T, 16, X)``."""
        part_TRX: Tensor = part_RX.unflatten(0, (-1, self.lanes))
        if self.lanes == TILE:
            return part_TRX
        more = part_TRX.new_full((len(part_TRX), TILE - self.lanes, part_TRX.shape[2]), empty)
        return torch.cat([part_TRX, more], dim=1)

    def _rows(self, part_TRX: Tensor, shape: Shape) -> Tensor:
        """The opposite of :meth:`_lanes`, without what fills up."""
        real = self.pattern.blocks(shape[0]) * self.pattern.n
        return part_TRX[:, : self.lanes].flatten(0, 1)[:real]

    def _pack(self, values_TRH: Tensor) -> Tensor:
        """Bytes ``(T, C, values of a step)``."""
        if self.values.width == 16:
            words_TRCJ2 = values_TRH.unflatten(2, (-1, 8, 2))
            return _bytes(words_TRCJ2.permute(0, 2, 3, 1, 4).flatten(2))
        # Half h of a step, quad c of the half, slot b: plane 2h + b, byte c.
        codes_TRChcb = values_TRH.unflatten(2, (-1, 2, 4, 2))
        planes_TChbRc: Tensor = codes_TRChcb.permute(0, 2, 3, 5, 1, 4)
        if self.values.width == 4:
            planes_TChbRc = planes_TChbRc[:, :, :, 0] | (planes_TChbRc[:, :, :, 1] << 4)
        return planes_TChbRc.flatten(2)

    def _unpack(self, body_TCB: Tensor) -> Tensor:
        """Values ``(T, 16, H)``."""
        body_TCB = body_TCB.contiguous()
        if self.values.width == 16:
            words_TCJR2: Tensor = body_TCB.view(self.values.dtype).unflatten(2, (8, TILE, 2))
            return words_TCJR2.permute(0, 3, 1, 2, 4).flatten(2)
        if self.values.width == 4:
            pairs_TChRc = body_TCB.unflatten(2, (2, TILE, 4))
            planes_TChbRc: Tensor = torch.stack([pairs_TChRc & 15, pairs_TChRc >> 4], dim=3)
        else:
            planes_TChbRc = body_TCB.unflatten(2, (2, 2, TILE, 4))
        return planes_TChbRc.permute(0, 4, 1, 2, 5, 3).flatten(2)


def _bytes(part: Tensor) -> Tensor:
    """Bytes of the last size."""
    return part.contiguous().view(torch.uint8)

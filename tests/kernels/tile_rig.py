"""Matrices in tiles for tests: packed here from the words of the layout, apart from codec and kernels.

Shape suffixes: O rows, I columns, C columns filled up to whole groups, G groups, P rows filled up to 16s,
T tokens.
"""

from dataclasses import dataclass

import numpy as np

ROWS = 16
DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])


@dataclass(frozen=True)
class Kind:
    """What a codec's name says."""

    name: str
    bits: int
    group: int
    has_zeros: bool
    is_mx: bool
    byte_scales: bool = False

    @classmethod
    def of(cls, name: str) -> "Kind":
        rest = name.removeprefix("tile16:")
        if rest == "mxfp4":
            return cls(name, 4, 32, False, True)
        bits, _, group = rest.removeprefix("int").rstrip("zd").partition("g")
        return cls(name, int(bits), int(group), rest.endswith("z"), False, rest.endswith("d"))


CODECS = [
    *(
        f"tile16:int{bits}g{group}{z}"
        for bits in (2, 3, 4, 6, 8)
        for group in (32, 64, 128)
        for z in ("", "z", "d")
    ),
    "tile16:mxfp4",
]


@dataclass(frozen=True)
class Tiled:
    """A matrix as integers and scales, and packed."""

    kind: Kind
    rows: int
    cols: int
    integers_OC: np.ndarray  # zero points taken away; mxfp4: doubled values
    scales_OG: np.ndarray  # fp32
    raw: np.ndarray

    @property
    def weight_OI(self) -> np.ndarray:
        """The matrix as fp64."""
        scales_OC = np.repeat(self.scales_OG, self.kind.group, axis=1)
        return (self.integers_OC * scales_OC.astype(np.float64))[:, : self.cols]


def make(name: str, rows: int, cols: int, rng: np.random.Generator, codes: str = "random") -> Tiled:
    """A random matrix; ``codes`` is random, zero (the least code everywhere) or full (the greatest)."""
    kind = Kind.of(name)
    rows_P: np.ndarray | None = None
    groups = -(-cols // kind.group)
    padded_rows, padded_cols = -(-rows // ROWS) * ROWS, groups * kind.group
    top = 2**kind.bits
    codes_PC = rng.integers(top, size=(padded_rows, padded_cols))
    if codes != "random":
        codes_PC[:] = 0 if codes == "zero" else top - 1
    zeros_PG = np.full((padded_rows, groups), top // 2)
    if kind.has_zeros:
        zeros_PG = rng.integers(top, size=(padded_rows, groups))
    blank_PC = np.zeros_like(codes_PC) if kind.is_mx else np.repeat(zeros_PG, kind.group, axis=1)
    codes_PC[:, cols:] = blank_PC[:, cols:]
    if kind.is_mx:
        stored_PG = rng.integers(118, 130, size=(padded_rows, groups)).astype(np.uint8)
        stored_PG[rows:] = 0
        scales_PG = np.ldexp(np.float32(1), stored_PG.astype(np.int32) - 128).astype(np.float32)
        integers_PC = DOUBLED_E2M1[codes_PC]
    elif kind.byte_scales:
        stored_PG = rng.integers(-127, 128, size=(padded_rows, groups)).astype(np.int8)
        rows_P = (rng.uniform(0.2, 2, padded_rows) / top / 127).astype(np.float32)
        stored_PG[rows:], rows_P[rows:] = 0, 0
        scales_PG = stored_PG.astype(np.float64) * rows_P[:, None]
        integers_PC = codes_PC - np.repeat(zeros_PG, kind.group, axis=1)
    else:
        stored_PG = (rng.uniform(0.2, 2, (padded_rows, groups)) / top).astype(np.float16)
        stored_PG[rows:] = 0
        scales_PG = stored_PG.astype(np.float32)
        integers_PC = codes_PC - np.repeat(zeros_PG, kind.group, axis=1)
    raw = pack(kind, codes_PC, stored_PG, zeros_PG if kind.has_zeros else None, rows_P)
    return Tiled(kind, rows, cols, integers_PC[:rows], scales_PG[:rows], raw)


def pack(
    kind: Kind,
    codes_PC: np.ndarray,
    stored_PG: np.ndarray,
    zeros_PG: np.ndarray | None,
    rows_P: np.ndarray | None = None,
) -> np.ndarray:
    """The bytes of a matrix: row blocks of stripes of four groups, each with its head before its codes."""
    parts = []
    for row in range(0, len(codes_PC), ROWS):
        block = slice(row, row + ROWS)
        if rows_P is not None:
            parts.append(rows_P[block].tobytes())
        for group in range(0, stored_PG.shape[1], 4):
            stripe = slice(group, min(group + 4, stored_PG.shape[1]))
            head = stored_PG[block, stripe].T.tobytes()
            if zeros_PG is not None:
                head += zeros_PG[block, stripe].T.astype(np.uint8).tobytes()
            parts.append(head + bytes(-len(head) % 64))
            for column in range(stripe.start * kind.group, stripe.stop * kind.group, kind.group):
                parts.append(pack_group(kind.bits, codes_PC[block, column : column + kind.group]))
    return np.frombuffer(b"".join(parts), np.uint8)


def pack_group(bits: int, codes: np.ndarray) -> bytes:
    """The codes ``[16, group]`` of one group."""
    quads = codes.reshape(ROWS, -1, 4).transpose(1, 0, 2).reshape(-1, 64)
    if bits == 3:
        return combine(quads & 3, 2) + combine(quads >> 2, 1)
    if bits == 6:
        return combine(quads & 15, 4) + combine(quads >> 4, 2)
    return combine(quads, bits)


def combine(quads: np.ndarray, bits: int) -> bytes:
    """Bytes that hold ``8 / bits`` quads each, the first in the lowest bits."""
    per_byte = 8 // bits
    shifts = bits * np.arange(per_byte)[:, None]
    return (quads.reshape(-1, per_byte, 64) << shifts).sum(axis=1).astype(np.uint8).tobytes()


def quantize(x_TI: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations as the kernels round them: integers ``[T, C]`` and fp32 scales ``[T, G]``."""
    tokens, cols = x_TI.shape
    x_TC = np.pad(x_TI, ((0, 0), (0, -cols % group))).astype(np.float32)
    x_TGL = x_TC.reshape(tokens, -1, group)
    most_TG = np.abs(x_TGL).max(axis=2)
    inverse_TG = np.divide(np.float32(127), most_TG, out=np.zeros_like(most_TG), where=most_TG > 0)
    q_TGL = np.rint(x_TGL * inverse_TG[..., None])
    return q_TGL.reshape(tokens, -1), most_TG / np.float32(127)


def expected(w: Tiled, x_TI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product with rounded activations in fp64, and the sum of magnitudes that bounds its error."""
    group = w.kind.group
    q_TC, scale_TG = quantize(x_TI, group)
    q_TGL = q_TC.reshape(len(x_TI), -1, group)
    integers_OGL = w.integers_OC.reshape(w.rows, -1, group).astype(np.float64)
    terms_TOG = np.einsum("tgl,ogl->tog", q_TGL, integers_OGL)
    terms_TOG *= scale_TG[:, None].astype(np.float64) * w.scales_OG[None].astype(np.float64)
    return terms_TOG.sum(axis=2), np.abs(terms_TOG).sum(axis=2)

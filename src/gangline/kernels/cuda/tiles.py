"""Sizes of the SSMM kernel: which are compiled, and which serve how many tokens.

What ``csrc/cuda/ssmm.cuh`` computes from the same numbers (bytes of a stage, threads) is computed here too,
for the launch; emulated kernels run with exactly so much shared memory.
"""

from dataclasses import dataclass

from gangline.formats.samoyeds import SamoyedsCodec

_STEP = 32
_PAD = 16
# Shared memory that one block may have, and what a small block should stay under so that several share a
# multiprocessor.
_SHARED = {"sm_80": 163 * 1024, "sm_87": 163 * 1024, "sm_90": 227 * 1024, "sm_90a": 227 * 1024}
_SHARED_ELSEWHERE = 99 * 1024
_SHARED_OF_SMALL = 56 * 1024
# Blocks of small tiles that a multiprocessor should have, and stages that a part of the columns has at least.
_BLOCKS_EACH = 2
_STAGES_OF_SPLIT = 2
_VALUES = {16: "Bf16", 8: "Int8", 4: "Int4"}


@dataclass(frozen=True)
class Tile:
    """What one block makes.

    Attributes:
        wm: warps along the rows, 32 compressed rows each.
        wn: warps along the tokens.
        nt: groups of eight tokens of a warp.
    """

    wm: int
    wn: int
    nt: int

    @property
    def rows(self) -> int:
        """Compressed rows."""
        return 32 * self.wm

    @property
    def tokens(self) -> int:
        """Token slots."""
        return 8 * self.nt * self.wn

    @property
    def threads(self) -> int:
        """CUDA threads."""
        return 32 * self.wm * self.wn

    @property
    def small(self) -> bool:
        """Whether it is for decoding: bound by the bytes of the weights."""
        return self.tokens <= 16


DECODE_8 = Tile(2, 1, 1)
DECODE_16 = Tile(2, 1, 2)
SOME = Tile(4, 2, 4)
MANY = Tile(4, 2, 8)
TILES = (DECODE_8, DECODE_16, SOME, MANY)


def choose_tile(tokens: int, pairs: int, experts: int) -> Tile:
    """The tile for so many tokens of which ``pairs`` (token, expert) pairs go to ``experts`` experts.

    No expert has more than ``tokens`` pairs; past the decoding sizes the average decides.
    """
    if tokens <= DECODE_8.tokens:
        return DECODE_8
    average = pairs / experts
    if tokens <= DECODE_16.tokens or average <= DECODE_16.tokens:
        return DECODE_16
    return SOME if average <= SOME.tokens else MANY


@dataclass(frozen=True)
class Stage:
    """The columns of a stage and what it takes in shared memory.

    Attributes:
        columns: BK.
        unit: steps of 32 columns whose sum is added to the accumulators at once.
        nbytes: bytes of one stage.
        count: stages.
    """

    columns: int
    unit: int
    nbytes: int
    count: int

    def shared_bytes(self, tile: Tile) -> int:
        """Bytes of a block: all stages and a row number for every token slot."""
        return self.nbytes * self.count + 4 * tile.tokens

    def fits(self, tile: Tile, arch: str) -> bool:
        """Whether a block may have that much."""
        return self.shared_bytes(tile) <= _shared(arch)


def choose_splits(tile: Tile, blocks: int, stages: int, multiprocessors: int) -> int:
    """Into how many parts the columns of a product go, so that a few blocks keep every multiprocessor busy.

    Args:
        tile: only the small ones are split; the others have work enough.
        blocks: of rows and tokens.
        stages: of all columns; a part has at least some, or filling its pipeline would take longer.
        multiprocessors: of the GPU.
    """
    if not tile.small:
        return 1
    wanted = -(-_BLOCKS_EACH * multiprocessors // max(1, blocks))
    return max(1, min(wanted, stages // _STAGES_OF_SPLIT))


def unsupported_codec(codec: object) -> str | None:
    """Why the kernel cannot read matrices in ``codec``, or None if it can."""
    if not isinstance(codec, SamoyedsCodec):
        return "it is no samoyeds:N:M:V codec"
    pattern = codec.pattern
    if pattern.n != 1 or pattern.m > 2:
        return f"pattern {pattern}: there are kernels for 1:1 (2:4 alone) and 1:2"
    if pattern.m > 1 and (pattern.v % _STEP or (128 % pattern.v and pattern.v % 128)):
        return f"V = {pattern.v}: the kernel wants 32, 64 or a multiple of 128"
    if codec.values.name == "fp16":
        return "values are fp16; the kernel reads bf16, int8 and int4"
    return None


def stage_of(codec: SamoyedsCodec, tile: Tile, arch: str) -> Stage:
    """Sizes of the stages for a codec, a tile and an architecture."""
    width = codec.values.width
    columns = 256 if tile.small and width < 16 else 128
    limits = [columns, 128]
    if codec.pattern.m > 1:
        limits.append(codec.pattern.v)
    if codec.values.group:
        limits.append(2 * codec.values.group)
    unit = min(limits) // _STEP
    nbytes = tile.rows * (columns // 2 * width // 8 + _PAD) + tile.tokens * (2 * columns + _PAD)
    nbytes += tile.rows // 16 * columns // 64 * 128
    if codec.pattern.m > 1:
        nbytes += columns // _STEP // unit * tile.rows
    room = _SHARED_OF_SMALL if tile.small else _shared(arch)
    count = min(6 if tile.small else 4, (room - 4 * tile.tokens) // nbytes)
    return Stage(columns, unit, nbytes, max(2, count))


def defines(
    codec: SamoyedsCodec, tile: Tile, stage: Stage, *, gated: bool, activation: int, split: bool = False
) -> tuple[tuple[str, str], ...]:
    """Macros of ``ssmm.cu``."""
    numbers = {
        "VALUES": _VALUES[codec.values.width],
        "SETS": codec.pattern.m - codec.pattern.n + 1,
        "GATED": str(gated).lower(),
        "SPLIT": str(split).lower(),
        "ACTIVATION": activation,
        "WM": tile.wm,
        "WN": tile.wn,
        "NT": tile.nt,
        "BK": stage.columns,
        "UNIT": stage.unit,
        "STAGES": stage.count,
    }
    return tuple((f"GANGLINE_{name}", str(number)) for name, number in numbers.items())


def _shared(arch: str) -> int:
    return _SHARED.get(arch, _SHARED_ELSEWHERE)

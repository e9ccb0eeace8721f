"""The SSMM kernel's own source, run on the CPU with emulated tensor cores, against the format's decoder.

Shape suffixes: T tokens, K experts per token, P pairs, N pairs of one expert, D columns, O rows, E experts.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gangline.kernels.cpu.gates import GateForm, formula
from gangline.kernels.cuda.samoyeds import SamoyedsKernel
from gangline.kernels.cuda.samoyeds_matrices import PartShape, address_table
from gangline.kernels.cuda.samoyeds_product import SparseProduct
from gangline.kernels.cuda.tiles import DECODE_8, DECODE_16, MANY, SOME, Tile, choose_splits
from gangline.kernels.reference import ExpertMath
from kernels.cuda.emulated_rig import EmulatedLauncher
from kernels.cuda.sparse_rig import SparseExperts, decoded, encoded, field
from kernels.expert_rig import relative_error, swiglu

CANARY = -7.0
CPU = torch.device("cpu")


def plain(
    codec: str,
    raws: Sequence[Tensor],
    shape: tuple[int, int],
    x_TD: Tensor,
    rows_P: Tensor | None,
    starts: Sequence[int],
    tile: Tile,
    launcher: EmulatedLauncher,
    splits: int = 1,
) -> Tensor:
    """Products of experts with their rows; rows that belong to nobody keep the canary in every part."""
    part = PartShape.of(field("down", shape, codec))
    launcher.readable = [*raws, x_TD]
    pairs = len(x_TD) if rows_P is None else len(rows_P)
    out_SPO = torch.full((splits, pairs, shape[0]), CANARY)
    table = address_table([[part.addresses(raw, shape[0])] for raw in raws], CPU)
    starts_E1 = torch.tensor(list(starts), dtype=torch.int32)
    SparseProduct(part, launcher)(table, starts_E1, rows_P, x_TD, out_SPO, tile)
    assert torch.equal(out_SPO[:, starts[-1] :], torch.full_like(out_SPO[:, starts[-1] :], CANARY))
    return torch.cat([out_SPO[:, : starts[-1]].sum(0), out_SPO[0, starts[-1] :]])


def forced_sub(codec: str, raw: Tensor, shape: tuple[int, int], kind: str) -> Tensor:
    """The bytes with other sub-rows: all of one kind, or alternating."""
    part = PartShape.of(field("down", shape, codec))
    start, size = part.codec.offsets(shape)["sub"]
    segments, rows = size // part.sub_pitch, part.sub_pitch
    by_segment, by_row = torch.arange(segments)[:, None] % 2, torch.arange(rows)[None] % 2
    new = {"zeros": by_segment * 0 + by_row * 0, "ones": by_segment * 0 + by_row * 0 + 1}
    new |= {"segments": by_segment + by_row * 0, "rows": by_segment * 0 + by_row}
    changed = raw.clone()
    changed[start : start + size] = new[kind].to(torch.uint8).flatten()
    return changed


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize(
    ("codec", "sub"),
    [(f"samoyeds:1:2:{v}/bf16", sub) for v in (32, 64, 128) for sub in ("zeros", "ones", "segments", "rows")]
    + [("samoyeds:1:1:32/bf16", None)],
)
def test_product_with_the_identity_is_the_matrix(codec: str, sub: str | None, late: bool, seed: int) -> None:
    """Catches every lane, half, selector and row mistake: the output is the decoded matrix, bit for bit."""
    shape = (72, 192)
    raw = encoded(codec, shape)
    if sub is not None:
        raw = forced_sub(codec, raw, shape, sub)
    x = torch.eye(shape[1], dtype=torch.bfloat16)
    rows = torch.arange(shape[1], dtype=torch.int32)
    got = plain(codec, [raw], shape, x, rows, [0, len(rows)], DECODE_16, EmulatedLauncher(seed, late))
    assert torch.equal(got.t(), decoded(codec, raw, shape))


@pytest.mark.parametrize("tile", [DECODE_8, SOME, MANY], ids=["8", "64", "128"])
@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
def test_whole_numbers_are_exact_at_every_tile(tile: Tile, late: bool, seed: int) -> None:
    """Rows, columns and tokens that do not divide evenly, duplicates among the tokens."""
    codec, shape = "samoyeds:1:2:64/bf16", (88, 584)
    raw = encoded(codec, shape, whole=True)
    x = torch.randint(-4, 5, (19, shape[1])).to(torch.bfloat16)
    rows = torch.randint(0, 19, (tile.tokens + 5,), dtype=torch.int32)
    got = plain(codec, [raw], shape, x, rows, [0, len(rows)], tile, EmulatedLauncher(seed, late))
    assert torch.equal(got, x[rows].float() @ decoded(codec, raw, shape).t())


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("codec", ["samoyeds:1:2:64/bf16", "samoyeds:1:1:32/bf16"])
def test_parts_of_the_columns_add_up(codec: str, splits: int, seed: int) -> None:
    """Also where the stages do not divide evenly: every column is in exactly one part."""
    shape = (72, 712)
    raw = encoded(codec, shape, whole=True)
    x = torch.randint(-4, 5, (9, shape[1])).to(torch.bfloat16)
    launcher = EmulatedLauncher(seed, bool(seed & 1))
    got = plain(codec, [raw], shape, x, None, [0, 9], DECODE_8, launcher, splits)
    assert torch.equal(got, x.float() @ decoded(codec, raw, shape).t())


@pytest.mark.parametrize("codec", ["samoyeds:1:1:32/bf16", "samoyeds:1:2:64/int4g32"])
def test_split_layers(codec: str, seed: int) -> None:
    """A GPU with many multiprocessors: all columns in parts, summed in their order, twice the same bits."""
    experts = SparseExperts.random(codec, 2048, 1024, 2)
    launcher = EmulatedLauncher(seed, multiprocessors=200)
    kernel = SamoyedsKernel(experts.layout, ExpertMath(swiglu), launcher)
    x_TD = torch.randn(2, 2048).to(torch.bfloat16)
    launcher.readable = [x_TD, *itertools.chain.from_iterable(experts.raws)]
    ids_TK, weights_TK = torch.tensor([[1, 2], [0, 1]]), torch.rand(2, 2)
    table = kernel.table([kernel.bind(raws) for raws in experts.raws])
    got_TD = kernel.forward(x_TD, ids_TK, weights_TK, table)
    assert relative_error(got_TD, experts.layer(x_TD, ids_TK, weights_TK)) < 4e-3
    names = [launch.build.name for launch in launcher.started]
    assert names == ["gangline_route", "gangline_ssmm", "gangline_gate", "gangline_ssmm", "gangline_combine"]
    assert kernel.down.splits(4, 2, DECODE_8) > 1
    assert torch.equal(kernel.forward(x_TD, ids_TK, weights_TK, table), got_TD)


def test_only_idle_multiprocessors_split_columns() -> None:
    assert choose_splits(DECODE_8, 64, 112, 132) == 5
    assert choose_splits(DECODE_8, 448, 112, 132) == 1
    assert choose_splits(DECODE_16, 1, 16, 132) == 8
    assert choose_splits(DECODE_8, 1, 3, 132) == 1
    assert choose_splits(MANY, 1, 112, 132) == 1


@pytest.mark.parametrize("counts", [(0, 1, 7, 8), (9, 0, 0, 17), (0, 0, 0, 0), (0, 16, 0, 0)])
def test_experts_with_many_few_and_no_tokens(counts: tuple[int, ...], seed: int) -> None:
    """No store for empty slots: what belongs to no expert keeps its canary."""
    codec, shape = "samoyeds:1:2:32/bf16", (40, 72)
    raws = [encoded(codec, shape, whole=True) for _ in counts]
    x = torch.randint(-4, 5, (30, shape[1])).to(torch.bfloat16)
    starts = list(itertools.accumulate(counts, initial=0))
    rows = torch.randint(0, 30, (starts[-1] + 3,), dtype=torch.int32)
    got = plain(codec, raws, shape, x, rows, starts, DECODE_8, EmulatedLauncher(seed))
    want = torch.full_like(got, CANARY)
    for raw, first, last in zip(raws, starts, starts[1:], strict=False):
        want[first:last] = x[rows[first:last]].float() @ decoded(codec, raw, shape).t()
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("codec", "tile"),
    [
        ("samoyeds:1:2:128/int8g32", DECODE_8),
        ("samoyeds:1:2:32/int4g32", DECODE_8),
        ("samoyeds:1:1:32/int8g64", SOME),
        ("samoyeds:1:2:128/int4g128", SOME),
    ],
    ids=str,
)
def test_codes_with_scales(codec: str, tile: Tile, seed: int) -> None:
    shape = (72, 328)
    raw = encoded(codec, shape)
    x = torch.randn(13, shape[1]).to(torch.bfloat16)
    got = plain(codec, [raw], shape, x, None, [0, 13], tile, EmulatedLauncher(seed))
    assert relative_error(got, x.float() @ decoded(codec, raw, shape).t()) < 1e-5


@pytest.mark.parametrize("split", [True, False], ids=["gate, up", "gate_up"])
@pytest.mark.parametrize("codec", ["samoyeds:1:1:32/bf16", "samoyeds:1:2:64/int4g32"])
def test_whole_layers(codec: str, split: bool, seed: int) -> None:
    """Gate, up, activation, down and the weighted sum, with experts of elsewhere among the ids."""
    experts = SparseExperts.random(codec, 128, 96, 5, split=split)
    launcher = EmulatedLauncher(seed, late=bool(seed & 1))
    kernel = SamoyedsKernel(experts.layout, ExpertMath(swiglu), launcher)
    x_TD = torch.randn(11, 128).to(torch.bfloat16)
    launcher.readable = [x_TD, *itertools.chain.from_iterable(experts.raws)]
    ids_TK = torch.rand(11, 6).argsort(dim=-1)[:, :3]
    weights_TK = torch.rand(11, 3)
    table = kernel.table([kernel.bind(raws) for raws in experts.raws])
    got_TD = kernel.forward(x_TD, ids_TK, weights_TK, table)
    # The output and the intermediate are rounded to bf16; a sum near a tie may round the other way.
    assert relative_error(got_TD, experts.layer(x_TD, ids_TK, weights_TK)) < 4e-3
    assert torch.equal(kernel.forward(x_TD, ids_TK, weights_TK, table), got_TD)


def test_pairs_are_those_of_the_protocol(seed: int) -> None:
    experts = SparseExperts.random("samoyeds:1:2:128/bf16", 128, 64, 3)
    launcher = EmulatedLauncher(seed)
    kernel = SamoyedsKernel(experts.layout, ExpertMath(swiglu), launcher)
    x_TD = torch.randn(6, 128).to(torch.bfloat16)
    launcher.readable = [x_TD, *itertools.chain.from_iterable(experts.raws)]
    token_P = torch.tensor([0, 3, 5, 1])
    weights = [kernel.bind(experts.raws[expert]) for expert in (0, 2)]
    got_PD = kernel.pairs(x_TD, token_P, [0, 3, 4], weights, [0, 2])
    assert relative_error(got_PD[:3], experts.rows(x_TD[token_P[:3]], 0)) < 2e-3
    assert relative_error(got_PD[3:], experts.rows(x_TD[token_P[3:]], 2)) < 2e-3


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai", "silu:late"])
def test_gates(name: str, seed: int) -> None:
    codec, shape = "samoyeds:1:1:32/bf16", (32, 64)
    part = PartShape.of(field("gate", shape, codec))
    gate, up = (encoded(codec, shape) for _ in range(2))
    x = (3 * torch.randn(5, shape[1])).to(torch.bfloat16)
    form = GateForm(name, alpha=1.702 if name.startswith("s") else 1.0, limit=2.5)
    launcher = EmulatedLauncher(seed, readable=[gate, up, x])
    table = address_table([[part.addresses(gate, shape[0]), part.addresses(up, shape[0])]], CPU)
    out = torch.empty(5, shape[0], dtype=torch.bfloat16)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    SparseProduct(part, launcher, form)(table, starts, None, x, out, DECODE_8)
    gate_NF, up_NF = (x.float() @ decoded(codec, raw, shape).t() for raw in (gate, up))
    assert relative_error(out, formula(form, gate_NF, up_NF)) < 4e-3

"""The Hopper kernel's own source on the CPU: warpgroup products, tiles and barriers from the PTX ISA.

Shape suffixes: T tokens, K experts per token, P pairs, O rows.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.kernels.cuda.samoyeds import SamoyedsKernel
from gangline.kernels.cuda.samoyeds_matrices import PartShape, address_table
from gangline.kernels.cuda.samoyeds_wgmma import WideProduct
from gangline.kernels.reference import ExpertMath
from kernels.cuda.emulated_rig import EmulatedLauncher
from kernels.cuda.sparse_rig import SparseExperts, decoded, encoded, field
from kernels.expert_rig import relative_error, swiglu

CANARY = -7.0
CPU = torch.device("cpu")


def wide(
    codec: str,
    raws: Sequence[Tensor],
    shape: tuple[int, int],
    x_TD: Tensor,
    rows_P: Tensor | None,
    starts: Sequence[int],
    launcher: EmulatedLauncher,
) -> Tensor:
    """Products of experts with their rows; rows that belong to nobody keep the canary."""
    part = PartShape.of(field("down", shape, codec))
    launcher.readable = [*raws, x_TD]
    out_PO = torch.full((len(x_TD) if rows_P is None else len(rows_P), shape[0]), CANARY)
    addresses = [[part.addresses(raw, shape[0])] for raw in raws]
    product = WideProduct(part, launcher)
    starts_E1 = torch.tensor(list(starts), dtype=torch.int32)
    product(address_table(addresses, CPU), product.maps(addresses, CPU), starts_E1, rows_P, x_TD, out_PO)
    return out_PO


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("pattern", ["1:2:32", "1:2:64", "1:2:128", "1:2:256", "1:1:32"])
def test_product_with_the_identity_is_the_matrix(pattern: str, late: bool, seed: int) -> None:
    """Every row, chunk, descriptor, selector and position: the decoded matrix, bit for bit."""
    codec, shape = f"samoyeds:{pattern}/bf16", (152, 256)
    raw, x = encoded(codec, shape), torch.eye(shape[1], dtype=torch.bfloat16)
    got = wide(codec, [raw], shape, x, None, [0, shape[1]], EmulatedLauncher(seed, late))
    assert torch.equal(got.t(), decoded(codec, raw, shape))


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("codec", ["samoyeds:1:2:64/bf16", "samoyeds:1:1:32/bf16"])
def test_whole_numbers_are_exact(codec: str, late: bool, seed: int) -> None:
    """More stages than fit, rows and columns that do not divide evenly, few, many and no tokens."""
    shape, counts = (88, 840), (0, 3, 0, 130)
    raws = [encoded(codec, shape, whole=True) for _ in counts]
    x = torch.randint(-4, 5, (19, shape[1])).to(torch.bfloat16)
    starts = list(itertools.accumulate(counts, initial=0))
    rows = torch.randint(0, 19, (starts[-1] + 3,), dtype=torch.int32)
    got = wide(codec, raws, shape, x, rows, starts, EmulatedLauncher(seed, late))
    want = torch.full_like(got, CANARY)
    for raw, first, last in zip(raws, starts, starts[1:], strict=False):
        want[first:last] = x[rows[first:last]].float() @ decoded(codec, raw, shape).t()
    assert torch.equal(got, want)


@pytest.mark.parametrize("split", [True, False], ids=["gate, up", "gate_up"])
@pytest.mark.parametrize("codec", ["samoyeds:1:1:32/bf16", "samoyeds:1:2:128/bf16"])
def test_whole_layers(codec: str, split: bool, seed: int) -> None:
    """Gate and up meet through shared memory; experts of elsewhere are among the ids; twice the same bits."""
    experts = SparseExperts.random(codec, 192, 160, 3, split=split)
    launcher = EmulatedLauncher(seed, late=bool(seed & 1))
    kernel = SamoyedsKernel(experts.layout, ExpertMath(swiglu), launcher)
    x_TD = torch.randn(11, 192).to(torch.bfloat16)
    launcher.readable = [x_TD, *itertools.chain.from_iterable(experts.raws)]
    ids_TK, weights_TK = torch.rand(11, 4).argsort(dim=-1)[:, :2], torch.rand(11, 2)
    table = kernel.table([kernel.bind(raws) for raws in experts.raws])
    got_TD = kernel.forward(x_TD, ids_TK, weights_TK, table, wide=True)
    assert [launch.build.source for launch in launcher.started] == ["wgmma.cu", "wgmma.cu", "combine.cu"]
    assert relative_error(got_TD, experts.layer(x_TD, ids_TK, weights_TK)) < 4e-3
    assert torch.equal(kernel.forward(x_TD, ids_TK, weights_TK, table, wide=True), got_TD)


@pytest.mark.parametrize(
    ("codec", "arch"), [("samoyeds:1:2:128/int8g32", "sm_90a"), ("samoyeds:1:2:128/bf16", "sm_80")]
)
def test_other_values_and_gpus_have_no_such_kernel(codec: str, arch: str, seed: int) -> None:
    experts = SparseExperts.random(codec, 64, 64, 1)
    kernel = SamoyedsKernel(experts.layout, ExpertMath(swiglu), EmulatedLauncher(arch=arch))
    table = kernel.table([kernel.bind(raws) for raws in experts.raws])
    assert kernel.wide is None
    x_TD, ids_TK = torch.randn(2, 64).to(torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(FormatError, match="no Hopper kernel"):
        kernel.forward(x_TD, ids_TK, torch.ones(2, 1), table, wide=True)

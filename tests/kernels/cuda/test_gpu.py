"""Every kernel on a real GPU, against the format's decoder; the same checks that emulation makes on the CPU.

Shape suffixes: T tokens, K experts per token, P pairs, N pairs of one expert.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gangline.kernels.cuda.launcher import CudaLauncher, cuda_missing
from gangline.kernels.cuda.routing import route_few, route_on_device, token_tiles
from gangline.kernels.cuda.samoyeds import SamoyedsKernel
from gangline.kernels.cuda.samoyeds_matrices import PartShape, address_table
from gangline.kernels.cuda.samoyeds_product import SparseProduct
from gangline.kernels.cuda.samoyeds_wgmma import ARCH, WideProduct
from gangline.kernels.cuda.tiles import TILES, Tile, choose_tile
from gangline.kernels.reference import ExpertMath
from kernels.cuda.sparse_rig import SparseExperts, decoded, encoded, field
from kernels.expert_rig import relative_error, swiglu

pytestmark = pytest.mark.gpu
CANARY = -7.0
PATTERNS = ("1:2:32", "1:2:64", "1:2:128", "1:2:256", "1:1:32")
LAYERS = ("samoyeds:1:2:128/bf16", "samoyeds:1:1:32/bf16", "samoyeds:1:2:64/int4g32")
CODES = (("1:2:32", "int8g32"), ("1:1:32", "int8g128"), ("1:2:128", "int4g32"), ("1:2:32", "int4g64"))
COUNTS = (0, 1, 7, 8, 9, 63, 64, 65, 0, 129)
every_tile = pytest.mark.parametrize(
    "tile", [*TILES, None], ids=lambda tile: "wgmma" if tile is None else str(tile.tokens)
)
every_small_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: str(tile.tokens))


@pytest.fixture(scope="module")
def launcher() -> CudaLauncher:
    missing = cuda_missing()
    if missing is not None:
        pytest.skip(missing)
    return CudaLauncher(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture(autouse=True)
def _needs_hopper(request: pytest.FixtureRequest, launcher: CudaLauncher) -> None:
    """Skip what only one architecture has."""
    if "wgmma" in request.node.name and launcher.arch != ARCH:
        pytest.skip(f"needs {ARCH}; this is {launcher.arch}")


def product(
    launcher: CudaLauncher,
    codec: str,
    raws: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    rows_P: Tensor | None,
    starts: Sequence[int],
    tile: Tile | None,
) -> Tensor:
    """Products of experts with their rows, by the Hopper kernel if no tile is given.

    Rows of nobody keep the canary.
    """
    part = PartShape.of(field("down", shape, codec))
    there = [raw.to(launcher.device) for raw in raws]
    out = torch.full((len(x) if rows_P is None else len(rows_P), shape[0]), CANARY, device=launcher.device)
    addresses = [[part.addresses(raw, shape[0])] for raw in there]
    table = address_table(addresses, launcher.device)
    starts_E1 = torch.tensor(list(starts), dtype=torch.int32, device=launcher.device)
    rows = None if rows_P is None else rows_P.to(launcher.device)
    if tile is not None:
        SparseProduct(part, launcher)(table, starts_E1, rows, x.to(launcher.device), out, tile)
    else:
        hopper = WideProduct(part, launcher)
        maps = hopper.maps(addresses, launcher.device)
        hopper(table, maps, starts_E1, rows, x.to(launcher.device), out)
    return out.cpu()


@every_tile
@pytest.mark.parametrize("pattern", PATTERNS)
def test_product_with_the_identity_is_the_matrix(
    pattern: str, tile: Tile, launcher: CudaLauncher, seed: int
) -> None:
    codec, shape = f"samoyeds:{pattern}/bf16", (1408, 576)
    raw, x = encoded(codec, shape), torch.eye(shape[1], dtype=torch.bfloat16)
    got = product(launcher, codec, [raw], shape, x, None, [0, shape[1]], tile)
    assert torch.equal(got.t(), decoded(codec, raw, shape))


@every_tile
@pytest.mark.parametrize("shape", [(88, 584), (5760, 1408), (1408, 2304)])
def test_whole_numbers_are_exact(
    shape: tuple[int, int], tile: Tile, launcher: CudaLauncher, seed: int
) -> None:
    codec, few = "samoyeds:1:2:128/bf16", 3
    made = [encoded(codec, shape, whole=True) for _ in range(few)]
    raws = [made[expert % few] for expert in range(len(COUNTS))]
    starts = list(itertools.accumulate(COUNTS, initial=0))
    x = torch.randint(-4, 5, (50, shape[1])).to(torch.bfloat16)
    rows = torch.randint(0, 50, (starts[-1] + 3,), dtype=torch.int32)
    got = product(launcher, codec, raws, shape, x, rows, starts, tile)
    want = torch.full_like(got, CANARY)
    for raw, first, last in zip(raws, starts, starts[1:], strict=False):
        want[first:last] = x[rows[first:last]].float() @ decoded(codec, raw, shape).t()
    assert torch.equal(got, want)


@every_small_tile
@pytest.mark.parametrize(("pattern", "values"), CODES)
def test_codes_with_scales(values: str, pattern: str, tile: Tile, launcher: CudaLauncher, seed: int) -> None:
    codec, shape = f"samoyeds:{pattern}/{values}", (704, 1096)
    raw, x = encoded(codec, shape), torch.randn(77, shape[1]).to(torch.bfloat16)
    got = product(launcher, codec, [raw], shape, x, None, [0, 77], tile)
    assert relative_error(got, x.double() @ decoded(codec, raw, shape).double().t()) < 1e-4


@every_tile
def test_long_rows(tile: Tile, launcher: CudaLauncher, seed: int) -> None:
    codec, shape = "samoyeds:1:2:128/bf16", (512, 14336)
    raw, x = encoded(codec, shape), torch.randn(130, shape[1]).to(torch.bfloat16)
    got = product(launcher, codec, [raw], shape, x, None, [0, 130], tile)
    assert relative_error(got, x.double() @ decoded(codec, raw, shape).double().t()) < 1e-4


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (16, 64), (128, 60)])
def test_few_pairs_are_routed_the_same_by_one_kernel(
    tokens: int, experts: int, launcher: CudaLauncher, seed: int
) -> None:
    ids_TK = torch.rand(tokens, experts + 4).argsort(dim=-1)[:, :6] - 2
    there = ids_TK.to(launcher.device), torch.rand(tokens, 6).to(launcher.device)
    found, want = route_few(*there, experts, 16, launcher), route_on_device(*there, experts)
    assert found is not None
    for got, wanted in ((found[0].starts, want.starts), (found[0].token_P, want.token_P)):
        assert torch.equal(got, wanted)
    assert torch.equal(found[0].pair_TK, want.pair_TK)
    assert torch.equal(found[0].weight_TK, want.weight_TK)
    assert torch.equal(found[1], token_tiles(want.starts, 16))


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("codec", LAYERS)
def test_split_layers(codec: str, tokens: int, launcher: CudaLauncher, seed: int) -> None:
    """Long rows and few of them: all columns in parts, and two runs give the same bits."""
    if launcher.multiprocessors < 100:
        pytest.skip(f"{launcher.multiprocessors} multiprocessors are busy without parts")
    experts = SparseExperts.random(codec, 2048, 1024, 3)
    kernel = SamoyedsKernel(experts.layout, ExpertMath(swiglu), launcher)
    table = kernel.table([kernel.bind(raws) for raws in experts.on(launcher.device)])
    x_TD = torch.randn(tokens, 2048).to(torch.bfloat16)
    ids_TK, weights_TK = torch.rand(tokens, 3).argsort(dim=-1)[:, :2], torch.rand(tokens, 2)
    there = [part.to(launcher.device) for part in (x_TD, ids_TK, weights_TK)]
    assert kernel.down.splits(2 * tokens, 3, choose_tile(tokens, 2 * tokens, 3)) > 1
    got_TD = kernel.forward(*there, table)
    assert relative_error(got_TD.cpu(), experts.layer(x_TD, ids_TK, weights_TK)) < 4e-3
    assert torch.equal(kernel.forward(*there, table), got_TD)


@pytest.mark.parametrize("tokens", [1, 8, 16, 100, 700])
@pytest.mark.parametrize(
    "codec", ["samoyeds:1:2:128/bf16", "samoyeds:1:1:32/bf16", "samoyeds:1:2:64/int4g32"]
)
def test_whole_layers(codec: str, tokens: int, launcher: CudaLauncher, seed: int) -> None:
    """Two runs give the same bits; experts of elsewhere are among the ids."""
    experts = SparseExperts.random(codec, 512, 384, 6, split=bool(seed & 1))
    kernel = SamoyedsKernel(experts.layout, ExpertMath(swiglu), launcher)
    table = kernel.table([kernel.bind(raws) for raws in experts.on(launcher.device)])
    x_TD = torch.randn(tokens, 512).to(torch.bfloat16)
    ids_TK, weights_TK = torch.rand(tokens, 7).argsort(dim=-1)[:, :3], torch.rand(tokens, 3)
    there = [part.to(launcher.device) for part in (x_TD, ids_TK, weights_TK)]
    got_TD = kernel.forward(*there, table)
    assert relative_error(got_TD.cpu(), experts.layer(x_TD, ids_TK, weights_TK)) < 4e-3
    assert torch.equal(kernel.forward(*there, table), got_TD)


@pytest.mark.parametrize("tokens", [3, 130, 700])
@pytest.mark.parametrize("codec", LAYERS[:2])
def test_whole_layers_by_wgmma(codec: str, tokens: int, launcher: CudaLauncher, seed: int) -> None:
    """Two runs give the same bits, near to those of the other kernels."""
    experts = SparseExperts.random(codec, 512, 384, 6, split=bool(seed & 1))
    kernel = SamoyedsKernel(experts.layout, ExpertMath(swiglu), launcher)
    table = kernel.table([kernel.bind(raws) for raws in experts.on(launcher.device)])
    x_TD = torch.randn(tokens, 512).to(torch.bfloat16)
    ids_TK, weights_TK = torch.rand(tokens, 7).argsort(dim=-1)[:, :3], torch.rand(tokens, 3)
    there = [part.to(launcher.device) for part in (x_TD, ids_TK, weights_TK)]
    got_TD = kernel.forward(*there, table, wide=True)
    assert relative_error(got_TD.cpu(), experts.layer(x_TD, ids_TK, weights_TK)) < 4e-3
    assert torch.equal(kernel.forward(*there, table, wide=True), got_TD)
    assert relative_error(got_TD.cpu(), kernel.forward(*there, table).float().cpu()) < 4e-3

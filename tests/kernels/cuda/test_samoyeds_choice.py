"""The dispatcher: the faster by measurement, dense where nothing was measured; routing on the device.

Shape suffixes: T tokens, K experts per token, P pairs.
"""

import dataclasses
import itertools
import json
import logging

import pytest
import torch

from gangline.core.errors import FormatError
from gangline.kernels.cuda import choice
from gangline.kernels.cuda.choice import SamoyedsLayer
from gangline.kernels.cuda.measured import Timing, fastest, measured_timings
from gangline.kernels.cuda.routing import most_tiles, route_few, route_on_device, token_tiles
from gangline.kernels.cuda.samoyeds import SamoyedsKernel
from gangline.kernels.cuda.tiles import TILES, choose_tile
from gangline.kernels.grouping import group_by_expert
from gangline.kernels.reference import ExpertMath
from kernels.cuda.emulated_rig import EmulatedLauncher
from kernels.cuda.sparse_rig import SparseExperts
from kernels.expert_rig import relative_error, swiglu

CODEC = "samoyeds:1:2:32/bf16"


def timing(tokens: int, sparse: float, dense: float, wide: float | None = None) -> Timing:
    return Timing("emulated", CODEC, 64, 32, 4, 2, tokens, sparse, dense, wide)


def test_measured_table_decides(seed: int) -> None:
    experts = SparseExperts.random(CODEC, 64, 32, 4)
    launcher = EmulatedLauncher(seed)
    timings = [timing(4, 1.0, 2.0), timing(64, 2.0, 1.0), timing(400, 2.0, 3.0, 1.0)]
    layer = SamoyedsLayer(
        experts.layout, ExpertMath(swiglu), experts.raws, timings=timings, launcher=launcher
    )
    product = {"sparse": "gangline_ssmm", "wide": "gangline_wgmma"}
    for tokens, way in ((4, "sparse"), (2, "sparse"), (64, "dense"), (300, "wide"), (2000, "dense")):
        x_TD = torch.randn(tokens, 64).to(torch.bfloat16)
        ids_TK = torch.rand(tokens, 4).argsort(dim=-1)[:, :2]
        weights_TK = torch.rand(tokens, 2)
        launcher.readable = [x_TD, *itertools.chain.from_iterable(experts.raws)]
        launcher.started.clear()
        got_TD = layer(x_TD, ids_TK, weights_TK)
        names = [launch.build.name for launch in launcher.started]
        few = ["gangline_route"] if way == "sparse" else []
        assert names == ([] if way == "dense" else [*few, product[way], product[way], "gangline_combine"])
        # The dense path rounds weights, products and the intermediate to bf16.
        assert relative_error(got_TD, experts.layer(x_TD, ids_TK, weights_TK)) < 1e-2


def test_nothing_measured_is_said_once(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    choice._say_once.cache_clear()
    experts = SparseExperts.random(CODEC, 64, 32, 4)
    launcher = EmulatedLauncher(seed)
    layer = SamoyedsLayer(experts.layout, ExpertMath(swiglu), experts.raws, timings=(), launcher=launcher)
    x_TD, ids_TK = torch.randn(3, 64).to(torch.bfloat16), torch.tensor([[0, 1], [3, 2], [1, 9]])
    with caplog.at_level(logging.WARNING, logger="gangline"):
        for _ in range(2):
            layer(x_TD, ids_TK, torch.rand(3, 2))
    assert len([r for r in caplog.records if "was not measured" in r.message]) == 1
    assert not launcher.started


def test_without_a_gpu_the_layer_is_dense_and_says_why(seed: int) -> None:
    experts = SparseExperts.random(CODEC, 64, 32, 4)
    layer = SamoyedsLayer(experts.layout, ExpertMath(swiglu), experts.raws)
    x_TD, ids_TK, weights_TK = torch.randn(5, 64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    assert layer.sparse is None and layer.reason == "the experts are not on a GPU"
    got_TD = layer(x_TD, ids_TK, weights_TK)
    assert relative_error(got_TD, experts.layer(x_TD, ids_TK, weights_TK)) < 5e-3


def test_entries_speak_for_their_neighbourhood_only() -> None:
    timings = (timing(4, 1.0, 2.0), timing(64, 2.0, 1.0), timing(1024, 2.0, 3.0, 1.0))
    asked = [
        fastest(timings, "emulated", CODEC, (64, 32), load)
        for load in (0.5, 2.0, 3.9, 9.0, 33.0, 65.0, 600.0)
    ]
    assert asked == [None, "sparse", "sparse", None, "dense", None, "wide"]
    assert fastest(timings, "another", CODEC, (64, 32), 2.0) is None
    assert fastest(timings, "emulated", CODEC, (64, 64), 2.0) is None


def test_table_of_the_package_is_readable(tmp_path) -> None:
    assert all(isinstance(entry, Timing) for entry in measured_timings())
    path = tmp_path / "times.json"
    path.write_text(json.dumps([dataclasses.asdict(timing(1, 1.0, 2.0))]))
    assert measured_timings(path) == (timing(1, 1.0, 2.0),)


@pytest.mark.parametrize("used", [1, 3, 7])
def test_device_routing_is_the_grouping_of_the_host(used: int, seed: int) -> None:
    ids_TK = torch.rand(23, 9).argsort(dim=-1)[:, :4] - 1
    ids_TK = torch.where(ids_TK < used, ids_TK, 7)
    weights_TK = torch.rand(23, 4)
    routing, grouping = route_on_device(ids_TK, weights_TK, 7), group_by_expert(ids_TK, weights_TK, 7)
    pairs = int(routing.starts[-1])
    assert pairs == grouping.starts[-1]
    assert torch.equal(routing.token_P[:pairs].long(), grouping.token_P)
    counts = dict(zip(grouping.experts, grouping.counts, strict=True))
    assert routing.starts.diff().tolist() == [counts.get(expert, 0) for expert in range(7)]
    real = routing.pair_TK < pairs
    assert torch.equal(grouping.weight_P1[routing.pair_TK[real].long(), 0], routing.weight_TK[real])
    assert (routing.pair_TK.diff(dim=1) > 0).all()
    tiles = token_tiles(routing.starts, 8)
    assert tiles.diff().tolist() == [-(-counts.get(expert, 0) // 8) for expert in range(7)]
    assert int(tiles[-1]) <= most_tiles(ids_TK.numel(), 7, 8)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 5), (7, 70), (33, 9)])
def test_few_pairs_are_routed_the_same_by_one_kernel(tokens: int, experts: int, seed: int) -> None:
    """Experts without tokens, and ids of experts that lie elsewhere."""
    ids_TK = torch.rand(tokens, experts + 4).argsort(dim=-1)[:, :4] - 2
    weights_TK = torch.rand(tokens, 4)
    want = route_on_device(ids_TK, weights_TK, experts)
    found = route_few(ids_TK, weights_TK, experts, 8, EmulatedLauncher(seed))
    assert found is not None
    got, tiles = found
    assert all(
        torch.equal(getattr(got, field.name), getattr(want, field.name)) for field in dataclasses.fields(want)
    )
    assert torch.equal(tiles, token_tiles(want.starts, 8))


def test_many_pairs_are_not_for_one_block(seed: int) -> None:
    launcher = EmulatedLauncher(seed)
    assert route_few(torch.zeros(600, 2, dtype=torch.int64), torch.ones(600, 2), 4, 8, launcher) is None
    assert not launcher.started


def test_larger_loads_take_larger_tiles() -> None:
    chosen = [choose_tile(tokens, 2 * tokens, 8) for tokens in (1, 8, 9, 16, 60, 200, 4096)]
    assert [tile.tokens for tile in chosen] == sorted(tile.tokens for tile in chosen)
    assert set(chosen) == set(TILES)


@pytest.mark.parametrize(
    ("codec", "intermediate", "reason"),
    [
        ("samoyeds:3:4:32/bf16", 64, "there are kernels for 1:1"),
        ("samoyeds:1:2:16/bf16", 64, "V = 16"),
        ("samoyeds:1:2:32/fp16", 64, "fp16"),
        ("samoyeds:1:2:32/bf16", 40, "no multiple of 32"),
        ("samoyeds:1:2:32/bf16", 36, "multiples of 8"),
    ],
)
def test_what_no_kernel_serves_is_refused_by_name(
    codec: str, intermediate: int, reason: str, seed: int
) -> None:
    experts = SparseExperts.random(codec, 64, intermediate, 1)
    assert reason in str(SamoyedsKernel.supports(experts.layout, ExpertMath(swiglu)))
    with pytest.raises(FormatError, match="use ReferenceKernel"):
        SamoyedsKernel(experts.layout, ExpertMath(swiglu), EmulatedLauncher())

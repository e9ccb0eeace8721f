"""Parts of the native decode step: routing, what it refuses to read, its cache."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from gangline.kernels.cpu import native
from gangline.kernels.cpu.decoder import NotNativeError, Routing, parts
from gangline.models import RouterSpec, select
from gangline.models.router import Groups, TensorRef
from gangline.runtime.native_cache import GrowingLayer, GrowingSlidingLayer, adopt_cache

pytestmark = pytest.mark.skipif(native() is None, reason="the native core is not built")


@given(
    score=st.sampled_from(["softmax", "sigmoid", "softmax_topk"]),
    by_logit=st.booleans(),
    normalise=st.booleans(),
    biased=st.booleans(),
    groups=st.sampled_from([None, ("max", 0.0), ("top2_sum", 0.0), ("top2_sum", float("-inf"))]),
    k=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_routes_by_the_families_rule(
    score: Any, by_logit: bool, normalise: bool, biased: bool, groups: Any, k: int, seed: int
) -> None:
    core: Any = native()
    generator = torch.Generator().manual_seed(seed)
    z_TE = torch.randn(40, 16, generator=generator) * 1.5
    holder = nn.Module()
    bias_E = torch.randperm(16, generator=generator) / 25 - 0.31  # no two alike
    if (
        groups and groups[1] == 0.0
    ):  # experts outside the groups score 0: none of the others may, ties go anyhow
        bias_E, by_logit, score = bias_E.abs(), False, "softmax" if score == "softmax_topk" else score
    holder.bias = nn.Buffer(bias_E)
    spec = RouterSpec(
        k=k,
        score=score,
        choose_by="logit" if by_logit or score == "softmax_topk" else "score",
        bias=TensorRef(holder, "bias") if biased else None,
        groups=Groups(4, 2, groups[0], groups[1]) if groups else None,
        norm="sum" if normalise and score != "softmax_topk" else "none",
        norm_eps=1e-20,
        scale=1.7,
    )
    rule = core.RouterRule(
        classes=16,
        k=k,
        score=score,
        choose_by_logit=spec.choose_by == "logit",
        bias=holder.bias.data_ptr() if biased else 0,
        groups=4 if groups else 0,
        keep=2 if groups else 0,
        group_by_top2=bool(groups) and groups[0] == "top2_sum",
        group_fill=groups[1] if groups else 0.0,
        normalise=spec.norm == "sum",
        norm_eps=1e-20,
        scale=1.7,
    )
    # Rows in which two scores are all but tied may go either way; noise tells which these are. It is large
    # because the last bit of a score is worth so much of a logit where a sigmoid is flat.
    theirs = select(z_TE, spec)
    noise_NTE = 1e-3 * torch.randn(16, *z_TE.shape, generator=generator)
    moved = [select(z_TE + noise_TE, spec).ids_TK for noise_TE in (*noise_NTE, *-noise_NTE)]
    clear_T = torch.stack([(ids_TK == theirs.ids_TK).all(1) for ids_TK in moved]).all(0)
    assert clear_T.sum() >= 20
    z_TE, count = z_TE[clear_T], int(clear_T.sum())
    ids_TK, weights_TK = torch.empty(count, k, dtype=torch.int64), torch.empty(count, k)
    core.route(rule, z_TE.data_ptr(), count, ids_TK.data_ptr(), weights_TK.data_ptr())
    assert torch.equal(ids_TK, theirs.ids_TK[clear_T])
    torch.testing.assert_close(weights_TK, theirs.weights_TK[clear_T], rtol=1e-5, atol=1e-6)


def test_reads_only_plain_parameters_on_the_cpu() -> None:
    made = parts()
    with pytest.raises(NotNativeError, match="meta"):
        made.matrix(nn.Linear(4, 4, device="meta"))
    with pytest.raises(NotNativeError, match="float64"):
        made.matrix(nn.Linear(4, 4, dtype=torch.float64))
    turned = nn.Linear(4, 8)
    turned.weight = nn.Parameter(torch.randn(4, 8).t())
    with pytest.raises(NotNativeError, match="contiguous"):
        made.matrix(turned)
    with pytest.raises(NotNativeError, match="epsilon"):
        made.norm(nn.Linear(4, 4))


def test_notices_parameters_that_move() -> None:
    made, layer = parts(), nn.Linear(4, 4)
    made.linear(layer)
    assert not made.moved()
    layer.weight.data = layer.weight.data.clone()
    assert made.moved()


def test_routing_comes_layer_by_layer() -> None:
    same, mixed = Routing(2, (3, 3)), Routing(2, (3, 1))
    for routing in (same, mixed):
        routing.ids.copy_(torch.arange(len(routing.ids)))
        for layer, (ids_BK, weights_BK) in enumerate(routing):
            assert torch.equal(ids_BK, routing.of(layer)[0]) and ids_BK.shape == weights_BK.shape
    assert torch.equal(mixed.of(1)[0], torch.tensor([[6], [7]]))


@pytest.mark.parametrize("window", [None, 4])
def test_a_growing_layer_behaves_as_transformers_own(window: int | None, seed: int) -> None:
    layer = GrowingLayer() if window is None else GrowingSlidingLayer(window)
    cache, plain = DynamicCache(), DynamicCache()
    if window is not None:
        from transformers.cache_utils import DynamicSlidingWindowLayer

        plain.layers, plain.layer_class_to_replicate = [DynamicSlidingWindowLayer(window)], None
    cache.layers, cache.layer_class_to_replicate = [layer], None
    for tokens in (3, 1, 1, 5, 1, 1):
        keys, values = torch.randn(2, 3, tokens, 8), torch.randn(2, 3, tokens, 8)
        if plain.layers:
            assert cache.get_mask_sizes(tokens, 0) == plain.get_mask_sizes(tokens, 0)
        ours, theirs = cache.update(keys, values, 0), plain.update(keys, values, 0)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert cache.get_seq_length() == plain.get_seq_length()
    order = torch.tensor([1, 0])
    for one in (cache, plain):
        one.reorder_cache(order)
        one.batch_repeat_interleave(2)
        one.batch_select_indices(torch.tensor([0, 3]))
        if window is None:
            one.crop(-2)
    more = torch.randn(2, 3, 1, 8)
    assert torch.equal(cache.update(more, more, 0)[0], plain.update(more, more, 0)[0])


def test_assigned_keys_are_taken_over_with_the_values(seed: int) -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    keys, values = torch.randn(1, 2, 3, 4), layer.values.clone()
    layer.keys = keys
    addresses = layer.native_rows()
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    assert addresses == (layer.keys.data_ptr(), layer.values.data_ptr(), 256)
    assert layer.holds(1, 3) and not layer.holds(2, 3)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_layer_has_memory_of_its_own(twin: Any, seed: int) -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    other = twin(layer)
    assert torch.equal(other.keys, layer.keys)
    assert not set(other.native_rows()[:2]) & set(layer.native_rows()[:2])
    assert other.keys.data_ptr() == other.native_rows()[0]


def test_room_is_reserved_in_steps_and_within_the_plan(seed: int) -> None:
    layer = GrowingLayer(context=1000)
    states = torch.randn(2, 1, 250, 4)
    layer.update(states, states)
    assert layer.native_rows()[2] == 256
    layer.update(states[:, :, :10], states[:, :, :10])
    assert layer.native_rows()[2] == 500  # of 1000 for two sequences


def test_adopts_only_empty_caches_of_the_usual_kind(seed: int) -> None:
    fresh = DynamicCache()
    assert adopt_cache(fresh, 2, None) and [type(x) for x in fresh.layers] == [GrowingLayer] * 2
    assert not adopt_cache(fresh, 2, None)
    used = DynamicCache()
    used.update(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), 0)
    assert not adopt_cache(used, 1, None)
    assert not adopt_cache(None, 1, None)

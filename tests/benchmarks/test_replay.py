import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gangline
from gangline.benchmarks.random_checkpoint import meta_model
from gangline.benchmarks.recording import record
from gangline.benchmarks.replay import (
    RoutingTrace,
    load_trace,
    prescribe,
    replay,
    spread_trace,
    synthetic_trace,
)
from gangline.benchmarks.shapes import make_shape, shape_config
from gangline.core.errors import UsageError
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.models import find_moe
from gangline.traces import TraceError, open_trace
from near_ties import share_off


def geometry(experts=16, top_k=4, layers=3):
    return MoEGeometry((LayerGeometry(experts, top_k, 8, 8),) * layers)


def model_of(spec):
    model = meta_model(shape_config(spec)).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.uniform_(-0.1, 0.1)
    return model


@pytest.fixture
def seen_by(monkeypatch):
    """Return a function that makes a model note what its experts receive."""

    def watch(model):
        seen = {}
        for block in find_moe(model).blocks:

            def hook(_module, args, layer=block.layer):
                seen.setdefault(layer, []).append((args[1].clone(), args[2].clone()))

            block.experts.register_forward_pre_hook(hook)
        return seen

    return watch


@pytest.mark.parametrize("spec", ["tiny-olmoe", "tiny-qwen3-moe", "tiny-mixtral", "tiny-deepseek-v2"])
def test_experts_get_the_trace_in_order_and_from_the_start_again(spec, seen_by):
    model = model_of(spec)
    blocks = find_moe(model).blocks
    trace = synthetic_trace(find_moe(model).geometry, 7, seed=int(torch.randint(1000, ())))
    with torch.no_grad(), replay(model, trace):
        seen = seen_by(model)
        model(torch.randint(512, (1, 5)))
        model(torch.randint(512, (1, 1)))
        model(torch.randint(512, (2, 2)))
    for layer in range(len(blocks)):
        got = torch.cat([ids for ids, _ in seen[layer]]).numpy()
        np.testing.assert_array_equal(got, trace.ids_NLK[[0, 1, 2, 3, 4, 5, 6, 0, 1, 2], layer])


def test_routing_is_the_models_own_again_afterwards():
    model = model_of("tiny-olmoe")
    ids = torch.randint(512, (1, 6))
    trace = synthetic_trace(find_moe(model).geometry, 8)
    with torch.no_grad():
        before = model(ids).logits
        with replay(model, trace):
            during = model(ids).logits
        after = model(ids).logits
    assert not torch.equal(before, during)
    assert torch.equal(before, after)


def test_a_trace_of_the_models_own_routing_changes_nothing(seen_by):
    model = model_of("tiny-olmoe")
    seen = seen_by(model)
    ids = torch.randint(512, (1, 9))
    with torch.no_grad():
        before = model(ids).logits
    ids_NLK = torch.stack([seen[layer][0][0] for layer in sorted(seen)], dim=1).int().numpy()
    weights_NLK = torch.stack([seen[layer][0][1] for layer in sorted(seen)], dim=1).numpy()
    trace = RoutingTrace(ids_NLK, "a test", weights_NLK)
    with torch.no_grad(), replay(model, trace):
        assert torch.equal(model(ids).logits, before)


def test_what_was_recorded_is_what_the_experts_got(tmp_path, seen_by):
    model = model_of("tiny-olmoe")
    seen = seen_by(model)
    ids = torch.randint(512, (2, 9))
    with torch.no_grad(), record(model, tmp_path / "t", "tiny"):
        before = model(ids[:, :6]).logits
        model(ids)
        model(ids[:, :1])
    trace = load_trace(tmp_path / "t")
    assert (trace.about, len(trace.ids_NLK)) == ("recorded from tiny", 32)
    for layer in seen:
        got = torch.cat([ids for ids, _ in seen[layer]]).numpy()
        np.testing.assert_array_equal(got, trace.ids_NLK[:, layer])
    stored = open_trace(tmp_path / "t")
    assert [document.tokens for document in stored.documents] == [6, 6, 10, 10]
    assert [document.source for document in stored.documents][2] == "tiny, run 2, sequence 0"
    assert stored.tokens.input_id[:6].tolist() == ids[0, :6].tolist()
    with torch.no_grad(), replay(model, trace):
        # Weights are stored in half precision.
        assert share_off(model(ids[:, :6]).logits, before) < 1e-3


def test_what_cannot_be_recorded_or_replayed_is_refused(tmp_path):
    with record(model_of("tiny-olmoe"), tmp_path / "empty", "tiny"):
        pass
    with pytest.raises(TraceError, match="holds no rows"):
        load_trace(tmp_path / "empty")
    switch = model_of("tiny-switch")
    with pytest.raises(TraceError, match="encoder and a decoder"), record(switch, tmp_path / "s", "switch"):
        pass


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 200), st.floats(0, 2), st.floats(0, 1), st.data())
def test_synthetic_tokens_use_distinct_valid_experts(experts, tokens, zipf, repeat, data):
    top_k = data.draw(st.integers(1, experts))
    trace = synthetic_trace(geometry(experts, top_k, 2), tokens, zipf=zipf, repeat=repeat)
    assert trace.ids_NLK.shape == (tokens, 2, top_k)
    ordered = np.sort(trace.ids_NLK, axis=-1)
    assert (np.diff(ordered, axis=-1) > 0).all()
    assert ordered.min() >= 0
    assert ordered.max() < experts


def repeated_share(trace):
    now, before = trace.ids_NLK[1:], trace.ids_NLK[:-1]
    return (now[..., None] == before[..., None, :]).any(-1).mean()


def test_locality_is_the_stated_one():
    def trace(zipf, repeat):
        return synthetic_trace(
            geometry(64, 8), 3000, zipf=zipf, repeat=repeat, seed=int(torch.randint(1000, ()))
        )

    # Uniform: 8 of 64 are repeated by chance; kept ones add to it.
    assert repeated_share(trace(0, 0)) == pytest.approx(8 / 64, abs=0.01)
    assert 0.5 <= repeated_share(trace(0, 0.5)) <= 0.5 + 0.5 * 8 / 56 + 0.01
    assert repeated_share(trace(0, 1)) == 1
    counts = np.sort(np.bincount(trace(1, 0).ids_NLK[:, 0].ravel(), minlength=64))[::-1]
    assert counts[:16].sum() / counts.sum() > 0.5
    flat = np.sort(np.bincount(trace(0, 0).ids_NLK[:, 0].ravel(), minlength=64))[::-1]
    assert flat[:16].sum() / flat.sum() < 0.3


def test_traces_that_do_not_fit_are_refused():
    model = model_of("tiny-olmoe")
    for trace, says in [
        (synthetic_trace(geometry(64, 8, 3), 4), "layers"),
        (synthetic_trace(geometry(64, 4, 4), 4), "per token"),
        (synthetic_trace(geometry(640, 8, 4), 40), "uses expert"),
    ]:
        with pytest.raises(UsageError, match=says), torch.no_grad(), replay(model, trace):
            model(torch.randint(512, (1, 2)))
    switch = model_of("tiny-switch")
    ids = torch.randint(512, (1, 4))
    with (
        pytest.raises(UsageError, match="does not take"),
        torch.no_grad(),
        replay(switch, synthetic_trace(geometry(128, 1, 4), 4)),
    ):
        switch(input_ids=ids, decoder_input_ids=ids)


def test_bad_files_are_one_clear_error(tmp_path):
    with pytest.raises(TraceError, match="is not a trace"):
        load_trace(tmp_path / "none")
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(TraceError, match="not the header"):
        load_trace(tmp_path)
    with pytest.raises(UsageError, match="repeat"):
        synthetic_trace(geometry(), 4, repeat=1.5)


def test_a_cache_sees_the_locality_of_the_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    folder = make_shape("tiny-olmoe:2", tmp_path / "model")

    def hit_rate(trace):
        model = gangline.load(folder, ctx_size=256, expert_slots=48)
        with torch.no_grad(), replay(model, trace):
            for _ in range(150):
                model(torch.randint(512, (1, 1)), use_cache=False)
        rate = model.gangline.stats().hit_rate
        model.gangline.close()
        return rate

    layers = geometry(64, 8, 2)
    uniform = hit_rate(synthetic_trace(layers, 150, zipf=0, repeat=0))
    local = hit_rate(synthetic_trace(layers, 150, zipf=1, repeat=0.5))
    assert uniform < 0.6
    assert local > uniform + 0.2


def test_a_spread_trace_keeps_which_tokens_share_experts():
    small = synthetic_trace(geometry(8, 2, 5), 40, seed=int(torch.randint(1000, ())))
    wide = spread_trace(small, geometry(32, 8, 3))
    assert wide.ids_NLK.shape == (40, 3, 8) and wide.ids_NLK.max() < 32
    for layer, of in enumerate((0, 1, 3)):
        for before, after in zip(small.ids_NLK[:, of], wide.ids_NLK[:, layer], strict=True):
            assert sorted(after) == sorted(4 * e + i for e in before for i in range(4))


@pytest.mark.parametrize(("experts", "top_k"), [(32, 7), (28, 8)])
def test_a_trace_that_does_not_come_out_even_is_refused(experts, top_k):
    ids_NLK = np.array([[[0, 7]], [[1, 2]]], dtype=np.int32)
    with pytest.raises(UsageError, match="cannot stand for"):
        spread_trace(RoutingTrace(ids_NLK, "a test"), geometry(experts, top_k, 2))


def test_a_loaded_model_computes_and_reads_what_is_prescribed(tmp_path):
    model = gangline.load(make_shape("tiny-olmoe", tmp_path / "m"), expert_slots=64, progress=False)
    trace = synthetic_trace(model.gangline.geometry, 9, seed=int(torch.randint(1000, ())))
    seen = []
    with model.gangline, torch.no_grad():
        with model.gangline.observed(lambda layer, x, ids, w: seen.append((layer, ids.clone()))):
            with prescribe(model.gangline, trace):
                assert model.gangline.stats().approximate == "its experts are those of a trace"
                model.generate(torch.randint(512, (1, 5)), max_new_tokens=4, do_sample=False)
            assert not model.gangline.rerouted
        with (
            pytest.raises(UsageError, match="layers"),
            prescribe(model.gangline, synthetic_trace(geometry(), 2)),
        ):
            pass
    for layer in range(4):
        got = torch.cat([ids for number, ids in seen if number == layer]).numpy()
        np.testing.assert_array_equal(got, trace.ids_NLK[:8, layer])

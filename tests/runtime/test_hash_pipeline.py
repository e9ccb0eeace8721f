"""The two threads of SiDA: order, bound, errors and a clean end."""

import threading
import time

import pytest
import torch

import gangline
from gangline.core.errors import UsageError
from gangline.core.keys import ExpertKey
from gangline.policies.predictors.sida import HashFunction
from gangline.runtime.hash_pipeline import Ahead, HashPipeline
from gangline.runtime.hash_routing import HashRouting
from tiny_models import VOCABULARY, tiny_model


def hash_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gangline-hash")]


@pytest.mark.parametrize("bound", [1, 2, 16])
def test_order_is_kept_whatever_the_bound(bound):
    with Ahead(range(40), lambda n: n * n, bound) as made:
        assert list(made) == [(n, n * n) for n in range(40)]
    assert not hash_threads()


@pytest.mark.parametrize("bound", [1, 3])
def test_no_more_than_the_bound_is_made_ahead(bound):
    begun, taken, ahead = [], 0, []
    with Ahead(range(20), lambda n: begun.append(n) or n, bound) as made:
        for _ in made:
            patience = time.monotonic() + 10
            while len(begun) - taken < 2 and taken < 19 and time.monotonic() < patience:
                time.sleep(0.001)
            time.sleep(0.002)
            ahead.append(len(begun) - taken)
            taken += 1
    # One is being used, `bound` wait, and one more is made that waits for room.
    assert max(ahead) <= bound + 2
    assert min(ahead[:-1]) > 1, "tables are made while others are used"


def test_errors_of_the_hash_thread_reach_the_caller_in_place():
    def prepare(n):
        if n == 3:
            raise ValueError("no table for 3")
        return n

    got = []
    with pytest.raises(ValueError, match="no table for 3"), Ahead(range(9), prepare, 2) as made:
        for n, _ in made:
            got.append(n)
    assert got == [0, 1, 2]
    assert not hash_threads()


def test_errors_of_the_batches_reach_the_caller():
    def batches():
        yield 1
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"), Ahead(batches(), str, 1) as made:
        list(made)
    assert not hash_threads()


def test_leaving_early_ends_the_thread():
    endless = iter(int, 1)
    with Ahead(endless, lambda n: n, 2) as made:
        next(made)
    assert not hash_threads()
    with pytest.raises(RuntimeError, match="mine"), Ahead(iter(int, 1), lambda n: n, 2):
        raise RuntimeError("mine")
    assert not hash_threads()


def test_a_bound_is_needed():
    with pytest.raises(UsageError, match="holds none"):
        Ahead([], str, 0)


@pytest.fixture
def model(seed):
    found = tiny_model("switch_transformers", seed % 1000)
    with torch.no_grad(), gangline.attach(found, expert_slots=6):
        yield found


def network_for(model):
    experts = model.gangline.geometry.layers[0].experts
    return HashFunction(model.get_input_embeddings().embedding_dim, [experts], 8, causal=False)


@pytest.mark.parametrize("mode", ["hint", "execute"])
def test_pipelines_of_any_bound_agree_with_one_batch_after_another(model, mode, seed):
    batches = [torch.randint(3, VOCABULARY, (2, int(n))) for n in torch.randint(4, 12, (6,))]

    def forward(ids_BS):
        return model.get_encoder()(input_ids=ids_BS).last_hidden_state

    with HashRouting(model, network_for(model), mode=mode) as routing:
        plain = [forward(ids) for ids in batches]
        for bound in (1, 16):
            pipeline = HashPipeline(routing, bound)
            found = list(pipeline.run(batches, forward))
            assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
            assert pipeline.times.batches == len(batches)
            assert pipeline.times.hashing > 0
    assert not hash_threads()


def test_a_failing_model_ends_the_pipeline(model):
    def forward(ids_BS):
        raise RuntimeError("no room")

    with HashRouting(model, network_for(model)) as routing:
        batches = [torch.ones(1, 4, dtype=torch.long)] * 5
        with pytest.raises(RuntimeError, match="no room"):
            next(HashPipeline(routing).run(batches, forward))
        assert not hash_threads()
        stream = HashPipeline(routing).run(batches, lambda ids: ids)
        next(stream)
        stream.close()
    assert not hash_threads()


def test_the_next_batch_is_read_while_the_present_one_runs(seed, tmp_path):
    """When a batch ends, all of the next one's set is in a slot or on its way."""
    (tmp_path / "sida.yaml").write_text("cache: sida\nscope: global\n")
    found = tiny_model("mixtral", seed % 1000)
    experts, top_k = 8, found.config.num_experts_per_tok
    layers = found.config.num_hidden_layers
    slots = (layers + 1) * top_k  # the next set, and the experts of the layer that runs last
    with (
        torch.no_grad(),
        gangline.attach(found, expert_slots=slots, policy=str(tmp_path / "sida.yaml")) as runtime,
    ):
        assert slots < layers * experts
        network = HashFunction(found.get_input_embeddings().embedding_dim, [experts] * layers, 8, causal=True)
        for head in network.heads:
            head.weight.mul_(100)  # so that tokens differ in their sets
        batches = [torch.randint(3, VOCABULARY, (1, 1)) for _ in range(6)]
        done = []

        def forward(ids):
            last = len(done) == len(batches) - 1
            patience = time.monotonic() + 20
            while not last and not routing._expected and time.monotonic() < patience:
                time.sleep(0.001)
            out = found(input_ids=ids).logits
            if not last:
                assert all(runtime.store.holds(key) for key in sets[len(done) + 1])
            done.append(ids)
            return out

        with HashRouting(found, network, mode="execute") as routing:
            tables = [routing.forecasts(routing.prepare(ids).table, 0) for ids in batches]
            sets = [{ExpertKey(f.layer, e) for f in table for e in f.experts} for table in tables]
            results = list(HashPipeline(routing, 1).run(batches, forward))
            assert not routing._expected and len(done) == len(batches)
            plain = [found(input_ids=ids).logits for ids in batches]
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))

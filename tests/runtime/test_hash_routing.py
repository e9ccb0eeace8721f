"""SiDA on loaded models: hints change nothing, perfect tables change nothing, skipped routers stay silent."""

import pytest
import torch

import gangline
from gangline.core.errors import UsageError
from gangline.core.keys import ExpertKey
from gangline.policies.predictors.sida import HashFunction, HashTable
from gangline.runtime.hash_routing import HashRouting, Prepared
from gangline.runtime.set_fetcher import SetFetcher
from tiny_models import VOCABULARY, tiny_inputs, tiny_model


def network_for(model, hidden=8):
    both = model.config.is_encoder_decoder
    experts = [layer.experts for layer in model.gangline.geometry.layers]
    width = model.get_input_embeddings().embedding_dim
    return HashFunction(width, experts[: len(experts) // 2] if both else experts, hidden, causal=not both)


@pytest.fixture(params=["mixtral", "olmoe", "switch_transformers"])
def model(request, seed):
    """A tiny model in few slots, without gradients."""
    found = tiny_model(request.param, seed % 1000)
    with torch.no_grad(), gangline.attach(found, expert_slots=8):
        yield found


def run(model, inputs):
    if model.config.is_encoder_decoder:
        return model.get_encoder()(input_ids=inputs["input_ids"]).last_hidden_state
    return model(input_ids=inputs["input_ids"]).logits


def recorded_choice(model, inputs):
    """The true ids and weights of one pass, as a table."""
    ids, weights = {}, {}

    def note(layer, x_TD, ids_TK, weights_TK):
        ids[layer], weights[layer] = ids_TK.clone(), weights_TK.clone()

    with model.gangline.observed(note):
        run(model, inputs)
    shape = inputs["input_ids"].shape
    layers = sorted(ids)
    return HashTable([ids[n].view(*shape, -1) for n in layers], [weights[n].view(*shape, -1) for n in layers])


def test_hints_keep_every_bit(model, seed):
    inputs = tiny_inputs(model, seed=seed)
    before = run(model, inputs)
    with HashRouting(model, network_for(model), mode="hint") as routing:
        assert routing.exact and routing.skipped == 0
        assert torch.equal(run(model, inputs), before)
        assert model.gangline.stats().approximate is None
        assert model.gangline.stats().prefetch_bytes > 0
    assert torch.equal(run(model, inputs), before)


def test_perfect_tables_keep_every_bit_without_routers(model, seed):
    inputs = tiny_inputs(model, seed=seed)
    before = run(model, inputs)
    oracle = recorded_choice(model, inputs)
    kernels = []
    with HashRouting(model, network_for(model), mode="execute") as routing:
        blocks = len(oracle.ids)
        assert routing.skipped == blocks
        for block in model.gangline.view.blocks[:blocks]:
            kernel = next(p for p in block.router.parameters() if p.dim() > 1)
            kernels.append((kernel, kernel.detach().clone()))
        prepared = Prepared(inputs["input_ids"], oracle, None)
        routing.use(prepared)
        assert torch.equal(run(model, inputs), before), "the first pass, in which routers may be asked once"
        for kernel, _ in kernels:
            kernel.data.fill_(float("nan"))  # from now on whoever asks a router is found out
        routing.use(prepared)
        assert torch.equal(run(model, inputs), before)
        assert "approximate (SiDA" in model.gangline.banner()
        assert model.gangline.stats().approximate
    for kernel, value in kernels:
        kernel.data.copy_(value)
    assert torch.equal(run(model, inputs), before), "the routers are back"
    assert "approximate" not in model.gangline.banner()


def test_executed_experts_are_the_tables(model, seed):
    """Also where the table names another number of experts than the model's own."""
    inputs = tiny_inputs(model, seed=seed)
    network = network_for(model)
    for choices, damping in ((None, None), (3, (0.5, 0.25, 0.25)), (1, None)):
        seen = {}
        with HashRouting(model, network, mode="execute", choices=choices, damping=damping) as routing:
            table = routing.prepare(inputs["input_ids"]).table
            with model.gangline.observed(lambda layer, x, ids, w, seen=seen: seen.update({layer: (ids, w)})):
                run(model, inputs)
        for layer, (ids, weights) in enumerate(zip(table.ids, table.values, strict=True)):
            assert torch.equal(seen[layer][0], ids.flatten(0, 1))
            assert torch.equal(seen[layer][1], weights.flatten(0, 1))
            if choices is not None:
                assert ids.shape[-1] == choices


def test_generation_goes_on_with_the_text(seed):
    """What is executed while decoding is what the table of the whole text says."""
    found = tiny_model("mixtral", seed % 1000)
    with torch.no_grad(), gangline.attach(found) as runtime:
        ids = torch.randint(3, VOCABULARY, (2, 5))
        seen = []
        with HashRouting(found, network_for(found), mode="execute") as routing:
            with runtime.observed(lambda layer, x, ids, w: seen.append((layer, ids.clone()))):
                out = found.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
            table = routing.prepare(out[:, :-1]).table
        last = [ids for layer, ids in seen if layer == 0]
        assert len(last) == 4
        assert torch.equal(
            torch.cat([last[0].view(2, 5, -1), *(x[:, None] for x in last[1:])], 1), table.ids[0]
        )
        with HashRouting(found, network_for(found)) as routing:
            first = found(input_ids=ids, use_cache=True)
            routing._running = None
            with pytest.raises(UsageError, match="goes on after 5 tokens"):
                found(input_ids=ids[:, :1], past_key_values=first.past_key_values)


def test_refusals(model, seed):
    network = network_for(model)
    inputs = tiny_inputs(model, seed=seed)
    with HashRouting(model, network) as routing:
        with pytest.raises(UsageError, match="taken over already"):
            HashRouting(model, network)
        routing.use(routing.prepare((inputs["input_ids"] + 1) % VOCABULARY))
        with pytest.raises(UsageError, match="other tokens than the table"):
            run(model, inputs)
    with pytest.raises(UsageError, match="damping factors need"):
        HashRouting(model, network, mode="execute", damping=(0.5, 0.5))
    wrong = HashFunction(network.compress.in_features, [3], 8, causal=network.causal)
    with pytest.raises(UsageError, match="predicts layers of"):
        HashRouting(model, wrong)


def test_sigmoid_routers_are_hinted_only(seed):
    found = tiny_model("deepseek_v3", seed % 1000)
    with torch.no_grad(), gangline.attach(found):
        inputs = tiny_inputs(found, seed=seed)
        with pytest.raises(UsageError, match="cannot be replaced by a hash table"):
            HashRouting(found, network_for(found), mode="execute")
        before = run(found, inputs)
        with HashRouting(found, network_for(found)):
            assert torch.equal(run(found, inputs), before)


class FakeStore:
    def __init__(self, there=()):
        self.there, self.asked = set(there), []

    def holds(self, key):
        return key in self.there

    def request(self, key, priority, kept=()):
        self.asked.append(key)
        self.kept = set(kept)
        self.there.add(key)
        return True


def test_the_set_streams_through_few_slots_in_the_order_of_layers():
    keys = [ExpertKey(layer, expert) for layer in range(3) for expert in (1, 4)]
    store = FakeStore({keys[3]})
    fetcher = SetFetcher(store, slots=4)
    fetcher.begin(keys)
    assert store.asked == [keys[0], keys[1], keys[2]], "four slots, one of them held already"
    fetcher.advance(0)
    assert store.asked[3:] == [], "layer 0 still uses two of the four"
    fetcher.advance(1)
    assert store.asked[3:] == keys[4:]


def test_the_next_set_takes_what_the_present_one_leaves():
    now = [ExpertKey(layer, 1) for layer in range(3)]
    after = [ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(1, 2), ExpertKey(2, 2)]
    store = FakeStore()
    fetcher = SetFetcher(store, slots=4)
    fetcher.begin(now)
    assert store.asked == now
    fetcher.follow(after)
    assert store.asked[3:] == [] or store.asked[3:] == [after[1]], "one slot is left, and one expert is there"
    assert store.kept <= {*now, *after}
    fetcher.advance(0)
    fetcher.advance(1)
    fetcher.advance(2)
    assert set(store.asked) <= {*now, *after} and after[1] in store.asked and after[2] in store.asked
    fetcher.begin(after)
    assert store.asked[-1] == after[3] and len(store.asked) == len(set(store.asked))


def test_nothing_is_read_for_later_while_the_present_pass_lacks_something():
    now = [ExpertKey(layer, expert) for layer in range(3) for expert in range(2)]
    store = FakeStore()
    fetcher = SetFetcher(store, slots=3)
    fetcher.begin(now)
    fetcher.follow([ExpertKey(0, 5)])
    assert store.asked == now[:3]
    fetcher.advance(1)
    assert ExpertKey(0, 5) not in store.asked
    fetcher.advance(2)
    assert store.asked[-1] == ExpertKey(0, 5)

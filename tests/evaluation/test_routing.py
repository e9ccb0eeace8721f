"""A router tie excuses what follows it; nothing else does."""

import pytest
import torch

from gangline.evaluation.compare import TOLERANCE
from gangline.evaluation.generation import Generation, generate_greedy
from gangline.evaluation.reference import OFF, RecordedRun, Reference, judge
from gangline.evaluation.routing import LayerRouting, first_flip, record_routing
from tiny_models import VOCABULARY, tiny_model

NAMES = ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]


def recorded(model, ids_BP, new_tokens=4):
    with record_routing(model, NAMES, len(ids_BP)) as routing:
        generation = generate_greedy(model, ids_BP, new_tokens)
    return RecordedRun(generation, routing)


@pytest.fixture
def run(seed):
    return recorded(tiny_model("olmoe", seed), torch.randint(3, VOCABULARY, (2, 6)))


def rerouted(run, row, position, layer, noise=0.0):
    """The same run with one expert changed at one place, and inputs there ``noise`` apart."""
    old = run.routing[layer]
    ids, x = old.ids_BLK.clone(), old.x_BLD.clone()
    missing = set(range(8)) - set(ids[row, position].tolist())
    ids[row, position, 0] = missing.pop()
    ids = ids.sort(-1).values
    x[row, position] += noise * x[row, position].abs().max()
    return RecordedRun(run.generation, {**run.routing, layer: LayerRouting(ids, old.weights_BLK, x)})


def test_every_position_and_layer_is_on_record(run):
    assert list(run.routing) == NAMES
    for layer in run.routing.values():
        assert layer.ids_BLK.shape == layer.weights_BLK.shape == (2, 9, 3)
        assert layer.x_BLD.shape == (2, 9, 32)
        assert torch.equal(layer.ids_BLK, layer.ids_BLK.sort(-1).values)


def test_the_record_is_the_models_own_routing(seed):
    model = tiny_model("olmoe", seed)
    ids_BP = torch.randint(3, VOCABULARY, (2, 6))
    run = recorded(model, ids_BP, new_tokens=1)
    with torch.no_grad():
        logits = model(ids_BP, output_router_logits=True).router_logits[0].reshape(2, 6, 8)
    assert torch.equal(run.routing[NAMES[0]].ids_BLK, logits.topk(3).indices.sort(-1).values)


def test_nothing_stays_hooked(seed):
    model = tiny_model("olmoe", seed)
    recorded(model, torch.randint(3, VOCABULARY, (1, 4)), new_tokens=1)
    assert not any(model.get_submodule(name)._forward_pre_hooks for name in NAMES)


def test_equal_routing_has_no_flip(run):
    assert first_flip(run.routing, run.routing, 0, 0.0) is None


def test_the_first_flip_is_found(run):
    other = rerouted(rerouted(run, 1, 4, NAMES[0]), 1, 3, NAMES[1], noise=0.25)
    assert first_flip(other.routing, run.routing, 0, 0.01) is None
    flip = first_flip(other.routing, run.routing, 1, 0.01)
    assert (flip.row, flip.position, flip.layer) == (1, 3, NAMES[1])
    assert flip.input_difference == pytest.approx(0.25, rel=1e-3)
    assert set(flip.experts) != set(flip.reference_experts)


def test_other_weights_of_the_same_experts_count(run):
    old = run.routing[NAMES[0]]
    weights = old.weights_BLK.clone()
    weights[0, 2] *= 1.5
    other = {**run.routing, NAMES[0]: LayerRouting(old.ids_BLK, weights, old.x_BLD)}
    assert first_flip(other, run.routing, 0, 0.4).position == 2
    assert first_flip(other, run.routing, 0, 0.6) is None


def worse(run, row, position):
    """The same run with logits far away from one new token on."""
    logits = run.generation.logits_BNV.clone()
    logits[row, position:] += 50.0
    return RecordedRun(Generation(run.generation.tokens_BN, logits), run.routing)


def verdict(ours, plain, dtype=torch.bfloat16):
    return judge({2: ours}, Reference("plain", {2: plain}, 0.5), dtype, prompt_tokens=6)


def test_a_router_tie_before_it_excuses_an_offence_in_lower_precision(run):
    ours = rerouted(worse(run, 0, 2), 0, 7, NAMES[0], noise=0.01)
    agrees, (flip,) = verdict(ours, run)
    assert agrees is True
    assert (flip.row, flip.position) == (0, 7)


def test_without_offence_no_tie_is_named(run):
    assert verdict(rerouted(run, 0, 7, NAMES[0]), run) == (True, ())


@pytest.mark.parametrize(
    ("position", "noise", "dtype"),
    [
        (8, 0.01, torch.bfloat16),  # after the offence
        (7, 2 * TOLERANCE[torch.bfloat16], torch.bfloat16),  # its inputs differ by more than rounding
        (7, 0.0, torch.float32),  # fp32 has no excuse
    ],
)
def test_what_does_not_excuse(run, position, noise, dtype):
    ours = rerouted(worse(run, 0, 2), 0, position, NAMES[0], noise=noise)
    assert verdict(ours, run, dtype) == (False, ())


def test_an_offence_without_any_tie_fails(run):
    assert verdict(worse(run, 1, 0), run) == (False, ())


def test_other_tokens_fail_in_fp32(run):
    tokens = run.generation.tokens_BN.clone()
    tokens[0, 3] = (tokens[0, 3] + 1) % VOCABULARY
    ours = RecordedRun(Generation(tokens, run.generation.logits_BNV), run.routing)
    assert verdict(ours, run, torch.float32) == (False, ())


def test_no_reference_no_verdict(run):
    assert judge({2: run}, OFF, torch.float32, 6) == (None, ())

"""Hits, baselines, splits and fidelity: values that can be counted by hand, and the order of the bounds."""

import pytest
import torch

import gangline
from gangline.core.errors import UsageError
from gangline.evaluation.execute_fidelity import execution_fidelity
from gangline.evaluation.predictor_data import RoutedText, recorded, routed_texts, split_by_place
from gangline.evaluation.predictor_hits import baselines, crossed_baselines, measure_hits, network_scorer
from gangline.evaluation.predictor_training import DEFAULTS, TrainingSettings, train_predictor
from gangline.policies.predictors.sida import HashFunction, HashState
from gangline.traces.texts import Item
from tiny_models import VOCABULARY, tiny_model


def document(ids, *layers, source="a, tokens from 0"):
    return RoutedText(source, torch.tensor(ids), tuple(torch.tensor(layer) for layer in layers))


def test_hits_by_hand():
    """Three tokens, two of four experts each; the last token found its expert full and does not count."""
    text = document([5, 6, 7], [[0, 1], [2, 3], [1, -1]])
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2], [9.0, 0, 0, 0]])
    (found,) = measure_hits({"mine": lambda _: [scores]}, [text], top=2)
    (layer,) = found.layers
    assert (layer.top1, layer.topk, layer.recall) == (0.5, 1.0, pytest.approx((1 + 0.5) / 2))
    assert found.tokens == 2
    assert found.to_dict()["mean"]["top1"] == 0.5
    (silent,) = measure_hits({"none": lambda _: [None, scores[:1]]}, [document([5], [[0]], [[0]])], top=1)
    assert [layer.layer for layer in silent.layers] == [1]


def test_baselines_by_hand():
    learnt = [document([5, 5, 6], [[0, 1], [0, 2], [3, 1]])]
    told = baselines(learnt, [4])
    text = document([6, 5, 9], [[3, 1], [0, 1], [2, 3]])
    (frequency,), (by_id,), (previous,) = (told[n](text) for n in ("frequency", "token-id", "previous token"))
    assert frequency[0].tolist() == pytest.approx([2 / 6, 2 / 6, 1 / 6, 1 / 6])
    assert by_id[0].argmax() in (1, 3) and by_id[1].argmax() == 0
    assert by_id[2].tolist() == pytest.approx(frequency[0].tolist()), (
        "a token never seen gets the overall shares"
    )
    assert previous[1].topk(2).indices.tolist() == [3, 1]
    assert previous[2].topk(2).indices.tolist() == [0, 1]


def test_crossed_baselines_do_not_see_their_own_half():
    """Each half is routed by a rule of its own: whoever peeks would be right."""
    first = [document([5] * 4, [[0]] * 4) for _ in range(2)]
    second = [document([5] * 4, [[1]] * 4) for _ in range(2)]
    told = crossed_baselines([*first, *second], [2])
    (hits,) = measure_hits({"token-id": told["token-id"]}, [*first, *second], top=1)
    assert hits.mean("top1") == 0


def test_the_tail_of_every_file_is_held_out():
    def of(name, count):
        return [document([n], [[0]], source=f"{name}, tokens from {n}") for n in range(count)]

    learn, test = split_by_place([*of("a", 20), *of("b", 5)], held_out=0.1)
    assert [d.source for d in test] == ["a, tokens from 18", "a, tokens from 19", "b, tokens from 4"]
    assert len(learn) == 22 and not {d.source for d in learn} & {d.source for d in test}
    with pytest.raises(UsageError, match="too few to hold some out"):
        split_by_place(of("a", 1))


@pytest.fixture
def routed(seed):
    """A tiny model and random texts that it routed."""
    model = tiny_model("mixtral", seed % 1000)
    with torch.no_grad(), gangline.attach(model):
        ids = torch.randint(3, VOCABULARY, (6, 16))
        items = [Item(f"r, tokens from {n}", tuple(row.tolist())) for n, row in enumerate(ids)]
        with recorded(model, "tiny", items, extras=("logits", "inputs")) as trace:
            yield model, routed_texts(trace)


class Oracle(HashFunction):
    """A network that knows the logits of the texts."""

    def __init__(self, model, documents):
        experts = [layer.experts for layer in model.gangline.geometry.layers]
        super().__init__(model.get_input_embeddings().embedding_dim, experts, 8)
        self.known = {tuple(d.ids_T.tolist()): d.logits for d in documents}
        self.table = model.get_input_embeddings().weight.detach()

    def resume(self, x_BTD, state=None):
        ids = torch.cdist(x_BTD[0], self.table).argmin(dim=1)
        logits = [z_TE.unsqueeze(0) for z_TE in self.known[tuple(ids.tolist())]]
        return logits, HashState((x_BTD, x_BTD), x_BTD)


def test_a_perfect_prediction_costs_nothing(routed):
    model, documents = routed
    oracle = Oracle(model, documents)
    done = []
    found = execution_fidelity(model, oracle, documents, progress=lambda *at: done.append(at))
    assert done[-1] == (12, 12)
    # Logits were recorded in 16 bits, so weights differ by rounding, and a near-tie may fall the other way.
    assert found.recall > 0.97 and found.top1 > 0.95
    # One expert that falls the other way is worth some percent of so few tokens.
    allowed = 0.02 if found.recall > 1 - 1e-6 else 0.1
    assert found.perplexity == pytest.approx(found.exact_perplexity, rel=allowed)
    assert found.skipped == found.layers == len(model.gangline.geometry.layers)
    (hits,) = measure_hits({"oracle": lambda d: d.logits}, documents)
    assert hits.mean("top1") == pytest.approx(found.top1, abs=1e-6)
    assert model.gangline.stats().approximate is None, "the routers are back"
    wrong = HashFunction(oracle.compress.in_features, [h.out_features for h in oracle.heads], 8)
    assert execution_fidelity(model, wrong, documents).recall < found.recall


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_training_beats_chance_on_what_it_learnt(routed, kind):
    model, documents = routed
    settings = TrainingSettings(epochs=30, lr=1e-2, hidden=32, batch=2)
    seen = []
    with torch.enable_grad():
        trained = train_predictor(kind, model, documents, settings, lambda *at: seen.append(at))
    (hits,) = measure_hits({kind: network_scorer(kind, trained.network, model)}, documents)
    layer = model.gangline.geometry.layers[0]
    assert hits.mean("recall") > 1.3 * layer.top_k / layer.experts
    assert not seen or seen[-1][0] == seen[-1][1], "progress ends at its own total"


def test_what_is_missing_is_named(routed):
    model, documents = routed
    bare = [document(d.ids_T.tolist(), *(x.tolist() for x in d.chosen)) for d in documents]
    with pytest.raises(UsageError, match="gangline trace --logits"):
        train_predictor("sida", model, bare, TrainingSettings())
    with pytest.raises(UsageError, match="is not trained"):
        train_predictor("oracle", model, documents, TrainingSettings())

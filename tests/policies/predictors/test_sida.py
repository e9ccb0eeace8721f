"""SiDA's hash function: SparseMax, size, loss, and learning a router that it must be able to learn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.policies.predictors.sida import (
    HashFunction,
    SidaPredictor,
    SidaTraining,
    build_table,
    hash_hits,
    sida_loss,
    sparsemax,
    train_hash_function,
    truncated_distillation,
)


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        ([2.0, 1.0, 0.0], [1.0, 0.0, 0.0]),
        ([0.5, 0.2, -0.1], [0.6333, 0.3333, 0.0333]),
        ([1.2, 1.0, 0.9, -3.0], [0.5, 0.3, 0.2, 0.0]),
        ([0.3, float("-inf"), float("-inf")], [1.0, 0.0, 0.0]),
    ],
)
def test_sparsemax_vectors(z, expected):
    torch.testing.assert_close(sparsemax(torch.tensor(z)), torch.tensor(expected), atol=1e-4, rtol=0)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=12), st.floats(-10, 10))
def test_sparsemax_laws(z, shift):
    """A distribution, in the order of its input, unmoved by a shift, and the nearest point of the simplex."""
    x = torch.tensor(z, dtype=torch.float64)
    p = sparsemax(x)
    assert p.min() >= 0 and p.sum().item() == pytest.approx(1)
    torch.testing.assert_close(sparsemax(x + shift), p)
    assert (p[x.argsort()].diff() >= -1e-12).all()
    for corner in torch.eye(len(z), dtype=torch.float64):
        assert ((corner - p) * (x - p)).sum() <= 1e-8, "optimality of a projection"


@pytest.mark.parametrize("experts", [8, 64, 128, 256])
def test_size_of_the_network(experts):
    network = HashFunction(768, [experts] * 6)
    assert sum(p.numel() for p in network.parameters()) == 1_315_328 + 6 * 257 * experts


def test_causal_network_ignores_what_comes_later(seed):
    causal, whole = HashFunction(6, [4], 8), HashFunction(6, [4], 8, causal=False)
    x = torch.randn(1, 7, 6)
    y = x.clone()
    y[:, 5:] += 3
    torch.testing.assert_close(causal(x)[0][:, :5], causal(y)[0][:, :5])
    assert whole(x)[0].shape == (1, 7, 4)


def test_a_text_in_pieces_is_the_same_text(seed):
    """Going on from the state gives what the whole text gives, whatever the cuts."""
    network, x = HashFunction(6, [4, 5], 8), torch.randn(2, 9, 6)
    whole, state, pieces = network(x), None, []
    for first, last in ((0, 4), (4, 5), (5, 6), (6, 9)):
        logits, state = network.resume(x[:, first:last], state)
        pieces.append(logits)
        assert state.tokens == last
    for layer, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([piece[layer] for piece in pieces], dim=1), expected)
    with pytest.raises(UsageError, match="not causal"):
        HashFunction(6, [4], 8, causal=False).resume(x, state)


def test_hints_while_decoding_know_the_text_before(seed):
    network, x = HashFunction(6, [16], 8), torch.randn(5, 6)
    predictor = SidaPredictor(network, 3)
    predictor.on_request(0, [1] * 4, x[:4])
    (after,) = predictor.on_request(1, [1], x[4:])
    table = build_table(network, x[None], 3)
    assert list(after.experts) == table.ids[0][0, -1].tolist()
    predictor.end_request()
    (alone,) = predictor.on_request(2, [1], x[4:])
    assert list(alone.experts) == build_table(network, x[None, 4:], 3).ids[0][0, 0].tolist()


def test_distillation_is_truncated(seed):
    """Only the teacher's top logits count; a shift of all of them does not."""
    teacher, student = torch.randn(5, 10), torch.randn(5, 10)
    assert truncated_distillation(teacher + 2.0, teacher, 4).item() == pytest.approx(0, abs=1e-6)
    lost = student.scatter(-1, teacher.topk(6, largest=False).indices, -99.0)
    assert truncated_distillation(lost, teacher, 4) == truncated_distillation(student, teacher, 4)
    assert truncated_distillation(student, teacher, 30) > 0


def test_loss_adds_cross_entropy_by_lambda(seed):
    teacher = [torch.randn(2, 3, 4)]
    student = [torch.randn(2, 3, 4)]
    plain = sida_loss(student, teacher, SidaTraining(ce=0.0))
    ce = torch.nn.functional.cross_entropy(student[0].flatten(0, 1), teacher[0].argmax(-1).flatten())
    torch.testing.assert_close(sida_loss(student, teacher, SidaTraining(ce=0.005)), plain + 0.005 * ce)


@pytest.fixture
def learnt(seed):
    """A network trained on routers that follow the token; ``(network, train, test, embeddings)``."""
    embeddings = torch.randn(30, 16)
    gates = [torch.randn(16, 8) for _ in range(2)]

    def sample():
        x = embeddings[torch.randint(0, 30, (2, 24))]
        return x, [x @ gate for gate in gates]

    train, test = [sample() for _ in range(24)], [sample() for _ in range(4)]
    network = HashFunction(16, [8, 8], 32)
    before = sida_loss(network(test[0][0]), test[0][1], SidaTraining()).item()
    steps = []
    last = train_hash_function(
        network, train, SidaTraining(lr=5e-3, epochs=8), progress=lambda step, loss: steps.append(loss)
    )
    assert len(steps) == 8 * 24
    assert last < before / 2
    return network, train, test


def hits(network, samples, top_k):
    rows = [hash_hits(build_table(network, x, top_k), teacher) for x, teacher in samples]
    return sum(sum(row) for row in rows) / sum(len(row) for row in rows)


def test_it_learns_and_obeys_the_cards_order(learnt):
    network, train, test = learnt
    top1, top3 = hits(network, test, 1), hits(network, test, 3)
    assert top1 <= top3
    assert top3 > 0.9
    frequency = []
    for layer in range(2):
        first = torch.cat([teacher[layer].argmax(-1).flatten() for _, teacher in train])
        favourite = first.mode().values
        chosen = torch.cat([teacher[layer].argmax(-1).flatten() for _, teacher in test])
        frequency.append((chosen == favourite).float().mean().item())
    assert top1 > sum(frequency) / 2, "better than the layer's favourite whatever the input"


def test_an_oracle_table_hits_always(seed):
    teacher = [torch.randn(1, 6, 5)]
    network = HashFunction(4, [5], 8)
    network.forward = lambda x: teacher
    table = build_table(network, torch.zeros(1, 6, 4), 1)
    assert hash_hits(table, teacher) == [1.0]
    assert table.needed(0) == sorted(set(teacher[0].argmax(-1).flatten().tolist()))


def test_predictor_forecasts_the_table(learnt):
    network, _, test = learnt
    x_TD = test[0][0][0]
    forecasts = SidaPredictor(network, 2).on_request(4, [0] * len(x_TD), x_TD.numpy())
    table = build_table(network, x_TD[None], 2)
    assert [(f.step, f.layer, f.horizon) for f in forecasts] == [(4, 0, 1), (4, 1, 2)]
    for f in forecasts:
        assert sorted(f.experts) == table.needed(f.layer)
        assert 0 < sum(f.probabilities) <= 1 + 1e-6
    assert SidaPredictor(network, 2).on_request(4, [1, 2]) == []

"""ExpertFlow's paths, pre-gates and Read-ME's router learn routing that follows the tokens."""

import numpy as np
import pytest
import torch

from gangline.core.errors import UsageError
from gangline.core.events import RoutingDetail
from gangline.policies.predictors.expertflow import (
    ExpertFlowPredictor,
    RoutingPathPredictor,
    positions,
    train_paths,
)
from gangline.policies.predictors.pregate import PreGatedRouting, PreGatePredictor, PreGates, train_pregates
from gangline.policies.predictors.read_me import DecoupledRouter, DecoupledRouterPredictor, train_router
from policy_replay import event

VOCABULARY, LAYERS, EXPERTS, TOP_K = 24, 2, 8, 2


@pytest.fixture
def table_VLK(seed):
    """Two experts for each token id and layer: a hash router."""
    return torch.stack(
        [torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(LAYERS)]) for _ in range(VOCABULARY)]
    )


def routing(ids_BT, table_VLK):
    return torch.zeros(*ids_BT.shape, LAYERS, EXPERTS).scatter(-1, table_VLK[ids_BT], 1.0)


def check_hash_router(predictor, table_VLK):
    """The first experts of a one-token forecast are the token's own, for nearly all tokens."""
    right = total = 0
    for token in range(VOCABULARY):
        for f in predictor.on_request(3, [token]):
            assert (f.step, f.horizon) == (3, f.layer + 1)
            right += len(set(f.experts[:TOP_K]) & set(table_VLK[token, f.layer].tolist()))
            total += TOP_K
    assert total == VOCABULARY * LAYERS * TOP_K
    assert right / total > 0.9
    assert predictor.on_request(3, []) == []


def test_expertflow_learns_a_hash_router(table_VLK):
    network = RoutingPathPredictor(VOCABULARY, LAYERS, EXPERTS, feed_forward=64, depth=1)
    samples = []
    for _ in range(20):
        ids_BT = torch.randint(0, VOCABULARY, (8, 6))
        samples.append((ids_BT, routing(ids_BT, table_VLK)))
    assert network(samples[0][0]).shape == (8, 6, LAYERS, EXPERTS)
    assert train_paths(network, samples, epochs=12, lr=1e-2) < 0.3
    check_hash_router(ExpertFlowPredictor(network), table_VLK)


def test_expertflow_is_small_and_knows_positions():
    network = RoutingPathPredictor(32128, 6, 32)
    megabytes = 4 * sum(p.numel() for p in network.parameters()) / 1e6
    assert 5 < megabytes < 10, "the paper's network takes 7.21 MB"
    p_TH = positions(5, 8)
    assert p_TH.shape == (5, 8)
    torch.testing.assert_close(p_TH[0], torch.tensor([0.0, 1.0] * 4))


def test_read_me_router_learns_a_hash_router(table_VLK):
    router = DecoupledRouter(VOCABULARY, LAYERS, EXPERTS, hidden=32, shared=False)
    samples = []
    for _ in range(30):
        ids_BT = torch.randint(0, VOCABULARY, (8, 6))
        samples.append((ids_BT, 5 * routing(ids_BT, table_VLK)))
    train_router(router, samples, epochs=8, lr=1e-2)
    check_hash_router(DecoupledRouterPredictor(router, TOP_K), table_VLK)


def test_read_me_router_is_causal_and_shares_its_choice(seed):
    router = DecoupledRouter(50, 3, 4, hidden=16)
    a, b = torch.randint(0, 50, (1, 8)), torch.randint(0, 50, (1, 8))
    b[:, :5] = a[:, :5]
    torch.testing.assert_close(router(a)[:, :5], router(b)[:, :5])
    logits = router(a)
    assert (logits[:, :, 0] == logits[:, :, 2]).all(), "the same expert index in every layer"
    size = sum(p.numel() for p in DecoupledRouter(32000, 32, 8).parameters())
    assert size == pytest.approx(18.0e6, rel=0.05), "the paper's router has 18.0 M parameters"


def test_pregates_begin_as_the_gates_and_learn(seed):
    """With equal inputs a pre-gate is the gate itself; where the input turns, training finds the turn."""
    gates = [torch.randn(6, 5) for _ in range(3)]
    pregates = PreGates(gates)
    x = torch.randn(64, 5)
    torch.testing.assert_close(pregates(0, x), x @ gates[1].T)
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    samples = []
    for _ in range(10):
        x = torch.randn(64, 5)
        samples += [(block, x, x @ turn @ gates[block + 1].T) for block in range(2)]
    x = torch.randn(1000, 5)
    teacher = (x @ turn @ gates[1].T).argmax(-1)
    before = (pregates(0, x).argmax(-1) == teacher).float().mean()
    train_pregates(pregates, samples, epochs=30, lr=2e-2)
    after = (pregates(0, x).argmax(-1) == teacher).float().mean()
    assert after > max(0.8, before)


def test_pregate_predictor_speaks_of_the_next_layer(seed):
    gates = [torch.randn(6, 5) for _ in range(3)]
    x_TD = np.random.default_rng(seed).normal(size=(1, 5)).astype(np.float32)
    predictor = PreGatePredictor(PreGates(gates))
    (f,) = predictor.after_gate(event(1, (0,), detail=RoutingDetail(gate_input_TD=x_TD)))
    assert (f.layer, f.horizon, f.source) == (2, 1, "pre-gate")
    assert f.experts[0] == int((torch.tensor(x_TD) @ gates[2].T).argmax())
    assert predictor.after_gate(event(2, (0,), detail=RoutingDetail(gate_input_TD=x_TD))) == []


def test_pregated_routing_is_one_block_late(seed):
    """Ids and weights of block N+1 are those made in block N, together."""

    def choice(mark):
        return torch.full((2, 1), mark), torch.full((2, 1), mark / 10)

    routing = PreGatedRouting(lambda x: choice(0), lambda block, x: choice(block + 1), 3)
    x = torch.zeros(2, 4)
    for block in range(3):
        (ids, weights), coming = routing.route(block, x)
        assert (ids == block).all() and torch.allclose(weights, torch.tensor(block / 10))
        assert (coming is None) == (block == 2)
    with pytest.raises(UsageError, match="block 1 has no choice from block 0"):
        routing.route(1, x)
    assert not routing.exact

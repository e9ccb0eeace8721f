"""One layer: choice of neurons, refit, and what the experts compute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.compress.dense_to_moe.layer import DenseFFN, FitConfig, LayerPlan, LowRank, fit_layer
from gangline.compress.dense_to_moe.refit import ridge_delta, truncate
from gangline.compress.dense_to_moe.routing import choose_neurons, spherical_kmeans
from near_ties import share_off


def random_ffn(hidden: int = 16, neurons: int = 24) -> DenseFFN:
    return DenseFFN(torch.randn(neurons, hidden), torch.randn(neurons, hidden), torch.randn(hidden, neurons))


def dense_output(ffn: DenseFFN, x_TD: torch.Tensor) -> torch.Tensor:
    return ffn.hidden(x_TD) @ ffn.down_DN.T


def mixture(plan: LayerPlan, ffn: DenseFFN, x_TD: torch.Tensor, top_k: int) -> torch.Tensor:
    """Mixtral's own arithmetic, token by token: softmax, top-k, renormalise, weighted sum."""
    experts = list(plan.experts(ffn, top_k))
    rows_ED = torch.stack([row for row, _ in experts])
    y_TD = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        weights_K, ids_K = (rows_ED @ x_D).softmax(0).topk(top_k)
        for weight, expert in zip(weights_K / weights_K.sum(), ids_K.tolist(), strict=True):
            y_TD[t] += weight * dense_output(experts[expert][1], x_D[None])[0]
    return y_TD


def test_all_neurons_in_every_expert_equals_dense():
    ffn, x_TD = random_ffn(), torch.randn(20, 16)
    plan = LayerPlan(torch.randn(4, 16), torch.arange(24).expand(4, -1))
    assert share_off(mixture(plan, ffn, x_TD, 1), dense_output(ffn, x_TD)) < 1e-5


@settings(max_examples=20, deadline=None)
@given(groups=st.integers(1, 5), top_k=st.sampled_from([1, 2, 3]), seed=st.integers(0, 2**31))
def test_experts_compute_the_plan(groups, top_k, seed):
    torch.manual_seed(seed)
    ffn, x_TD = random_ffn(), torch.randn(12, 16)
    neurons_GW = torch.stack([torch.randperm(24)[:12].sort().values for _ in range(groups)])
    plan = LayerPlan(
        torch.randn(groups, 16),
        neurons_GW,
        LowRank(torch.randn(16, 2), torch.randn(2, 24)),
        LowRank(torch.randn(groups, 16, 3), torch.randn(groups, 3, 12)),
    )
    # What the groups score must differ by more than the rounding of two ways to compute it.
    best_T2 = (x_TD @ plan.router_GD.T).topk(min(2, groups), dim=1).values
    clear_T = best_T2[:, 0] - best_T2[:, -1] > 1e-4 if groups > 1 else torch.ones(12, dtype=torch.bool)
    assert clear_T.sum() > 9
    assert share_off(mixture(plan, ffn, x_TD[clear_T], top_k), plan.output(ffn, x_TD[clear_T])) < 1e-4


def test_experts_of_a_group_split_its_neurons():
    plan = LayerPlan(torch.randn(2, 16), torch.stack([torch.arange(8), torch.arange(4, 12)]))
    ffn = DenseFFN(torch.arange(24.0)[:, None].expand(-1, 16), torch.randn(24, 16), torch.randn(16, 24))
    held = [set(weights.gate_ND[:, 0].tolist()) for _, weights in plan.experts(ffn, 2)]
    assert held[0] | held[1] == set(range(8))
    assert not held[0] & held[1]
    assert held[2] | held[3] == set(range(4, 12))


def test_kmeans_finds_planted_directions():
    centres_GD = torch.linalg.qr(torch.randn(16, 16))[0][:4]
    planted_T = torch.randint(0, 4, (800,))
    x_TD = 5 * centres_GD[planted_T] + 0.3 * torch.randn(800, 16) + 2 * torch.ones(16)
    group_T = (x_TD @ spherical_kmeans(x_TD, 8).T).argmax(1)
    for group in range(8):
        members = planted_T[group_T == group]
        if len(members):
            assert torch.bincount(members).max() > 0.95 * len(members)


def test_neurons_follow_the_energy_of_the_group():
    energy_TN = torch.rand(40, 10) * 0.1
    group_T = torch.arange(40) % 2
    energy_TN[group_T == 0, :3] += 1
    energy_TN[group_T == 1, 6:9] += 1
    assert choose_neurons(energy_TN, group_T, 2, 3).tolist() == [[0, 1, 2], [6, 7, 8]]


def test_group_without_tokens_takes_the_neurons_of_all():
    energy_TN = torch.rand(10, 6)
    chosen = choose_neurons(energy_TN, torch.zeros(10, dtype=torch.long), 2, 3)
    assert chosen[0].tolist() == chosen[1].tolist()


def test_refit_recovers_a_known_correction():
    h_TN, delta_DN = torch.randn(400, 12), torch.randn(5, 2) @ torch.randn(2, 12)
    found_DN, gram_NN = ridge_delta(h_TN, h_TN @ delta_DN.T, 1e-6)
    assert share_off(found_DN, delta_DN) < 1e-3
    left_DR, right_RN = truncate(found_DN, gram_NN, 2)
    assert share_off(left_DR @ right_RN, delta_DN) < 1e-3


def test_refit_beats_no_refit_on_fresh_tokens():
    ffn = random_ffn()
    basis = torch.randn(4, 16)
    sampled, fresh = torch.randn(2000, 4) @ basis, torch.randn(500, 4) @ basis
    errors = []
    for rank in (0, None):
        plan = fit_layer(
            ffn,
            sampled,
            dense_output(ffn, sampled),
            torch.ones(2000),
            FitConfig(4, 12, 0, rank, own_ridge=0.01),
        )
        errors.append(float((plan.output(ffn, fresh) - dense_output(ffn, fresh)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("rank", [0, None])
def test_full_width_needs_no_correction(rank):
    ffn, x_TD = random_ffn(), torch.randn(300, 16)
    target_TD = dense_output(ffn, x_TD)
    plan = fit_layer(ffn, x_TD, target_TD, torch.ones(300), FitConfig(3, 24, 0, rank))
    assert share_off(plan.output(ffn, x_TD), target_TD) < 1e-3

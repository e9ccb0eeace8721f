"""The routing rule as data: what holds for any logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gangline.core.errors import UsageError
from gangline.models import RouterSpec, select
from gangline.models.router import Groups, TensorRef

EXPERTS = 12


def draw(seed: int, rows: int = 32) -> torch.Tensor:
    """Logits between -6 and 6, no two of a row closer than a quarter: rounding of a score turns no order."""
    generator = torch.Generator().manual_seed(seed)
    order_TE = torch.rand(rows, EXPERTS, generator=generator).argsort(dim=1)
    return order_TE - 6 + 0.75 * torch.rand(rows, EXPERTS, generator=generator)


def ref(value: torch.Tensor) -> TensorRef:
    holder = nn.Module()
    holder.register_buffer("value", value)
    return TensorRef(holder, "value")


@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 6),
    score=st.sampled_from(["softmax", "sigmoid", "softmax_topk", "sqrtsoftplus"]),
    norm=st.booleans(),
)
def test_chosen_experts_are_the_k_best_and_distinct(seed: int, k: int, score: str, norm: bool) -> None:
    z_TE = draw(seed)
    chosen = select(z_TE, RouterSpec(k, score, norm="sum" if norm else "none"))  # type: ignore[arg-type]
    best_TK = z_TE.topk(k).indices
    assert torch.equal(chosen.ids_TK.sort().values, best_TK.sort().values)
    assert bool((chosen.weights_TK > 0).all())
    if norm or score == "softmax_topk":
        torch.testing.assert_close(chosen.weights_TK.sum(1), torch.ones(len(z_TE)))


@given(seed=st.integers(0, 2**31), keep=st.integers(1, 4), score=st.sampled_from(["max", "top2_sum"]))
def test_only_kept_groups_are_used(seed: int, keep: int, score: str) -> None:
    z_TE = draw(seed)
    groups = Groups(4, keep, score, float("-inf"))  # type: ignore[arg-type]
    ids_TK = select(z_TE, RouterSpec(3, "sigmoid", groups=groups)).ids_TK
    used = [set((row // 3).tolist()) for row in ids_TK]
    assert all(len(groups_of_row) <= keep for groups_of_row in used)
    score_TG = z_TE.sigmoid().view(-1, 4, 3)
    best = score_TG.amax(-1) if score == "max" else score_TG.sort(descending=True).values[..., :2].sum(-1)
    kept_TG = best.topk(keep).indices
    assert all(used[t] <= set(kept_TG[t].tolist()) for t in range(len(z_TE)))


@given(seed=st.integers(0, 2**31))
def test_a_bias_moves_the_choice_and_not_the_weights(seed: int) -> None:
    z_TE = draw(seed)
    bias_E = torch.zeros(EXPERTS)
    bias_E[5] = 10.0
    chosen = select(z_TE, RouterSpec(2, "sigmoid", bias=ref(bias_E)))
    assert bool((chosen.ids_TK[:, 0] == 5).all())
    torch.testing.assert_close(chosen.weights_TK, z_TE.sigmoid().gather(1, chosen.ids_TK))


@given(seed=st.integers(0, 2**31), capacity=st.integers(1, 8))
def test_capacity_keeps_the_first_tokens_of_each_expert(seed: int, capacity: int) -> None:
    z_TE = draw(seed)
    chosen = select(z_TE, RouterSpec(1, "softmax", capacity=capacity))
    taken: dict[int, int] = {}
    for row, expert in enumerate(z_TE.argmax(1).tolist()):
        taken[expert] = taken.get(expert, 0) + 1
        kept = taken[expert] <= capacity
        assert int(chosen.ids_TK[row]) == (expert if kept else EXPERTS)
        assert (float(chosen.weights_TK[row]) > 0) == kept


def test_a_token_table_needs_token_ids(seed: int) -> None:
    table_VK = torch.randint(EXPERTS, (20, 2))
    spec = RouterSpec(2, "sqrtsoftplus", norm="sum", table_VK=ref(table_VK))
    tokens_T = torch.randint(20, (8,))
    assert torch.equal(select(draw(seed, 8), spec, tokens_T).ids_TK, table_VK[tokens_T])
    with pytest.raises(UsageError, match="token"):
        select(draw(seed, 8), spec)


def test_shared_experts_take_their_part_of_the_norm(seed: int) -> None:
    z_TC = draw(seed)
    chosen = select(z_TC, RouterSpec(3, "sigmoid", norm="sum", shared=2))
    assert int(chosen.ids_TK.max()) < EXPERTS - 2
    scores = z_TC.sigmoid()
    shared_T = scores[:, -2:].sum(1)
    picked_T = scores.gather(1, chosen.ids_TK).sum(1)
    torch.testing.assert_close(chosen.weights_TK.sum(1), picked_T / (picked_T + shared_T))


def test_the_skip_class_is_reported_as_weight_zero(seed: int) -> None:
    z_TC = draw(seed)
    z_TC[::2, -1] = 100.0
    chosen = select(z_TC, RouterSpec(1, "softmax", skip_class=EXPERTS - 1))
    assert bool((chosen.weights_TK[::2] == 0).all()) and bool((chosen.ids_TK[::2] == 0).all())
    assert int(chosen.ids_TK.max()) < EXPERTS - 1


def test_a_rule_sees_a_bias_that_was_moved_to_another_dtype(seed: int) -> None:
    module = nn.Module()
    module.register_buffer("bias", torch.zeros(EXPERTS))
    spec = RouterSpec(1, "sigmoid", bias=TensorRef(module, "bias"))
    module.to(torch.float64)
    module.bias[3] = 5.0
    assert bool((select(draw(seed), spec).ids_TK == 3).all())

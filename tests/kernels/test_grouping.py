"""Pairs sorted by expert, of one token and of many."""

import pytest
import torch

from gangline.kernels.grouping import group_by_expert

EXPERTS = 6


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("choices", [0, 1, 4])
def test_pairs_are_those_of_a_plain_loop(seed: int, tokens: int, choices: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # -1 and 6 are sentinels; one token may name an expert twice.
    ids_TK = torch.randint(-1, EXPERTS + 1, (tokens, choices), generator=generator)
    weights_TK = torch.rand(tokens, choices, generator=generator).to(torch.bfloat16)
    found = group_by_expert(ids_TK, weights_TK, EXPERTS)
    pairs = sorted(
        (int(ids_TK[t, k]), t, k)
        for t in range(tokens)
        for k in range(choices)
        if 0 <= ids_TK[t, k] < EXPERTS
    )
    experts = sorted({expert for expert, _, _ in pairs})
    assert found.experts == tuple(experts)
    assert found.counts == tuple(sum(pair[0] == expert for pair in pairs) for expert in experts)
    assert found.starts[-1] == len(pairs)
    assert found.token_P.tolist() == [t for _, t, _ in pairs]
    assert found.token_P.dtype == torch.long
    expected_P1 = torch.tensor([[float(weights_TK[t, k])] for _, t, k in pairs]).reshape(-1, 1)
    assert found.weight_P1.dtype == torch.float32
    assert torch.equal(found.weight_P1, expected_P1)

"""How far two greedy generations of the same prompts agree.

Legend: B sequences, N new tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from gangline.evaluation.generation import Generation

# Largest accepted difference of a logit, as a share of the spread of the reference's logits. The
# type's own rounding (2**-8 for bf16, 2**-11 for fp16, 2**-24 for fp32) adds up over the layers, hence more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.04}


@dataclass(frozen=True)
class Divergence:
    """The first place where a row takes another token than the reference.

    Attributes:
        row: sequence of the batch.
        position: index of the new token.
        reference_token: what the reference took.
        token: what was taken instead.
        margin: by how much the reference preferred its own token (difference of its two logits).
    """

    row: int
    position: int
    reference_token: int
    token: int
    margin: float


@dataclass(frozen=True)
class Agreement:
    """What a comparison found.

    Attributes:
        tokens_equal: all tokens of all rows are the same.
        max_abs_logit_diff: over all positions whose context is the same in both: up to and with the first
            differing token of each row.
        divergences: the rows that differ.
    """

    tokens_equal: bool
    max_abs_logit_diff: float
    divergences: tuple[Divergence, ...]


def bit_equal(ours: Generation, other: Generation) -> bool:
    """Whether tokens and logits agree in every bit."""
    return torch.equal(ours.tokens_BN, other.tokens_BN) and torch.equal(ours.logits_BNV, other.logits_BNV)


def agreement(ours: Generation, reference: Generation) -> Agreement:
    """Compare with a reference, row by row, as long as both have read the same tokens."""
    largest = 0.0
    divergences = []
    rows, length = reference.tokens_BN.shape
    for row in range(rows):
        differs = (ours.tokens_BN[row] != reference.tokens_BN[row]).nonzero()
        first = int(differs[0]) if len(differs) else length
        known = slice(0, min(first + 1, length))
        difference = (ours.logits_BNV[row, known] - reference.logits_BNV[row, known]).abs()
        largest = max(largest, float(difference.max()))
        if first < length:
            wanted, taken = int(reference.tokens_BN[row, first]), int(ours.tokens_BN[row, first])
            logits_V = reference.logits_BNV[row, first]
            divergences.append(
                Divergence(row, first, wanted, taken, float(logits_V[wanted] - logits_V[taken]))
            )
    return Agreement(not divergences, largest, tuple(divergences))


def logit_tolerance(reference: Generation, dtype: torch.dtype) -> float:
    """Return the largest accepted difference of a logit: the type's share of how far logits spread.

    The spread is the largest distance of a logit from the mean over the vocabulary.
    """
    logits_BNV = reference.logits_BNV
    return TOLERANCE[dtype] * float((logits_BNV - logits_BNV.mean(-1, keepdim=True)).abs().max())


def first_offence(ours: Generation, reference: Generation, row: int, tolerance: float) -> int | None:
    """Return the first new token of a row that rounding does not explain, or None.

    That is one whose logits differ by more than the tolerance, or one taken although the reference preferred
    its own by more than two logits that each move by the tolerance. After a near-tie nothing is comparable.
    """
    for position, (wanted, taken) in enumerate(
        zip(reference.tokens_BN[row].tolist(), ours.tokens_BN[row].tolist(), strict=True)
    ):
        logits_V = reference.logits_BNV[row, position]
        if not float((ours.logits_BNV[row, position] - logits_V).abs().max()) <= tolerance:
            return position
        if wanted != taken:
            return None if float(logits_V[wanted] - logits_V[taken]) <= 2 * tolerance else position
    return None

"""What ``check`` found: one case per budget, cache order and batch size."""

from dataclasses import asdict, dataclass
from typing import Any

from gangline.evaluation.compare import Divergence
from gangline.evaluation.routing import Flip


@dataclass(frozen=True)
class Case:
    """One budget, cache order and batch size.

    Attributes:
        budget: ``"100 %"`` and so on, or ``"smallest"``.
        expert_slots: experts that fit in memory.
        cache: ``"default"`` or ``"random <seed>"``.
        batch: sequences.
        identical: tokens and logits equal in every bit to the baseline.
        max_abs_logit_diff: to that run; 0 if identical.
        reference_tokens_equal: whether all tokens are the plain model's; None where that did not run.
        reference_max_abs_logit_diff: to the plain model, over positions with the same context; None where
            that did not run.
        divergences: the first differing token of each row that differs from the plain model.
        misses: experts read from disk during the case.
        same_tokens: share of new tokens that are the baseline's.
    """

    budget: str
    expert_slots: int
    cache: str
    batch: int
    identical: bool
    max_abs_logit_diff: float
    reference_tokens_equal: bool | None
    reference_max_abs_logit_diff: float | None
    divergences: tuple[Divergence, ...]
    misses: int
    same_tokens: float = 1.0


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        model: as the user named it.
        dtype: of activations and dense weights.
        precision: of the experts.
        baseline: which of our own runs the cases are compared with: all experts in memory where they fit.
        reference: what the plain model was, or why it did not run.
        tolerance: largest accepted difference of a logit from the plain model; None where it did not run.
        reference_passed: whether the plain model agrees as the contract says; None where it did not run, or
            where the precision is approximate and agreement is not promised.
        flips: router ties that alone explain why a row left the tolerance, in lower precision.
        cases: one per budget, cache order and batch size.
        approximate: what changes the answers by the budget; None if nothing may, and then nothing did if the
            check passed.
    """

    model: str
    dtype: str
    precision: str
    baseline: str
    reference: str
    tolerance: float | None
    reference_passed: bool | None
    flips: tuple[Flip, ...]
    cases: tuple[Case, ...]
    approximate: str | None = None

    @property
    def identical(self) -> bool:
        """Whether every case equals the baseline in every bit."""
        return all(case.identical for case in self.cases)

    @property
    def passed(self) -> bool:
        """Whether the check as a whole passed; where answers may differ by the budget they do not fail it."""
        return (self.identical or self.approximate is not None) and self.reference_passed is not False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"identical": self.identical, "passed": self.passed}

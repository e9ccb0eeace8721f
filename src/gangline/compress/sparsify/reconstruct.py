"""Fit the down projections of a layer's sparse experts, all together, to what the layer should put out.

Pruning looks at one expert at a time and at the tokens as the sparse layers before it leave them. Here the
goal is the model before pruning: what its layer adds to the hidden states, and with that what the sparse
layers so far have got wrong in them. The masks and everything but the down projections stay, so this is a
least-squares problem; it is solved expert by expert, each fitted to what the others leave over, several
times. A ridge draws the weights to where they are, because an expert sees few tokens for its many weights.

Source: the idea of tuning a pruned block towards the dense block's output is that of EBFT: Effective and
Block-Wise Fine-Tuning for Sparse LLMs, arXiv 2402.12419. Ours differ: an exact problem instead of gradient
steps; the target is the dense hidden state and not the dense block's output on the sparse inputs; a token
counts by the inverse square of its hidden state's norm, because the next norm divides by it.

Shapes: T tokens, K experts of a token, N tokens of one expert, D hidden, F intermediate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.compress.sparsify.admm import refine
from gangline.compress.sparsify.expert import ExpertForm, PackedExpert
from gangline.compress.sparsify.moments import Moments
from gangline.compress.sparsify.walk import Routing, Step

RIDGE = 0.3


@dataclass(frozen=True)
class Goal:
    """What the experts of a layer should put out together.

    Attributes:
        out_TD: summed over a token's experts, fp32.
        share_T: how much each token counts.
    """

    out_TD: Tensor
    share_T: Tensor

    @classmethod
    def of(cls, step: Step, dense_TD: Tensor) -> "Goal":
        """The goal of a step whose first half of texts is the sparse model and whose second the dense.

        A layer that does more with its experts' outputs than add them (a norm, a factor) gets the dense
        outputs as they are: then nobody can say what would make good an earlier error.

        Args:
            step: the layer.
            dense_TD: what the dense experts put out on the second half.
        """
        if not step.adds(dense_TD):
            return cls(dense_TD, torch.ones(len(dense_TD)))
        sparse_TD, base_TD = step.silent_TD().chunk(2)
        after_TD = base_TD + dense_TD
        return cls(after_TD - sparse_TD, after_TD.square().mean(dim=1).clamp(min=1e-12).reciprocal())

    def error(self, out_TD: Tensor) -> float:
        """Weighted mean square of what is missing over that of the goal."""
        missing = ((self.out_TD - out_TD).square().sum(dim=1) * self.share_T).sum()
        whole = (self.out_TD.square().sum(dim=1) * self.share_T).sum()
        return float(missing / whole.clamp(min=1e-30))


def reconstruct(
    experts: Sequence[PackedExpert],
    form: ExpertForm,
    routing: Routing,
    goal: Goal,
    *,
    sweeps: int,
    min_tokens: int,
) -> tuple[Tensor, tuple[float, float]]:
    """Fit the down projections in place.

    Args:
        experts: all of the layer.
        form: what they compute.
        routing: what reaches them in the sparse model.
        goal: what they should put out.
        sweeps: how often to go through them.
        min_tokens: an expert with fewer keeps its weights.

    Returns:
        What the layer puts out ``[T, D]`` with the weights as stored, and the error before and after.
    """
    out_TD = _outputs(experts, form, routing)
    before = goal.error(out_TD)
    for _ in range(sweeps):
        for number, expert in enumerate(experts):
            token_N, slot_N = (routing.ids_TK == number).nonzero(as_tuple=True)
            if len(token_N) < min_tokens:
                continue
            weight_N1 = routing.weights_TK[token_N, slot_N, None]
            *firsts, down_DF = expert.weights()
            h_NF = form.intermediate(firsts, routing.x_TD[token_N], number)
            # What is missing, in units of the expert's own output; a slot of weight 0 says nothing.
            missing_ND = (goal.out_TD[token_N] - out_TD[token_N]) / weight_N1.clamp(min=1e-6)
            share_N = goal.share_T[token_N] * weight_N1[:, 0].square()
            fitted_DF = _fit(down_DF, h_NF, missing_ND, share_N)
            expert.replace(-1, fitted_DF)
            change_DF = expert.weights()[-1] - down_DF
            out_TD.index_add_(0, token_N, h_NF @ change_DF.t() * weight_N1)
    return out_TD, (before, goal.error(out_TD))


def _fit(down_DF: Tensor, h_NF: Tensor, missing_ND: Tensor, share_N: Tensor) -> Tensor:
    """The best weights where ``down_DF`` is not zero, drawn to it by the ridge."""
    moments = Moments.of(h_NF, share_N, RIDGE)
    share_N = share_N / share_N.sum().clamp(min=1e-30)
    pull_DF = missing_ND.t() @ (h_NF * share_N[:, None])
    free_DF = down_DF + torch.cholesky_solve(pull_DF.t(), torch.linalg.cholesky(moments.damped_II)).t()
    return refine(down_DF, free_DF, down_DF != 0, moments)


def _outputs(experts: Sequence[PackedExpert], form: ExpertForm, routing: Routing) -> Tensor:
    out_TD = torch.zeros_like(routing.x_TD)
    for number, expert in enumerate(experts):
        form.add_output(out_TD, routing, expert.weights(), number)
    return out_TD

"""What a family's router does after its logits, as data, and the one function that does it.

Shape suffixes: T tokens, C classes of the router (experts, then classes that are not experts), K chosen,
G groups, V vocabulary.
"""

from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gangline.core.errors import UsageError

Score = Literal["softmax", "sigmoid", "softmax_topk", "sqrtsoftplus", "given", "sparsemixer"]
Norm = Literal["none", "sum", "power"]


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a module by path; looked up at each use, because moving a model replaces its buffers."""

    module: nn.Module = field(repr=False)
    path: str

    def get(self) -> Tensor:
        """Return the tensor as it is now."""
        value = reduce(getattr, self.path.split("."), self.module)
        assert isinstance(value, Tensor)
        return value


@dataclass(frozen=True)
class Groups:
    """Group-limited choice: only experts of the best groups may be chosen (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        count: number of equal, contiguous groups.
        keep: groups kept per token.
        score: a group's score: its best expert, or the sum of its two best.
        fill: choice score of the experts outside the kept groups.
    """

    count: int
    keep: int
    score: Literal["max", "top2_sum"]
    fill: float


@dataclass(frozen=True)
class RouterSpec:
    """A family's routing rule.

    Attributes:
        k: experts per token.
        score: how a logit becomes a weight: ``softmax`` and ``sigmoid`` over all classes, ``softmax_topk``
            over the chosen logits only, ``given`` if the router hands out scores already, ``sparsemixer``
            (GRIN MoE, arXiv 2409.12136).
        choose_by: whether the scores or the logits decide which experts are chosen.
        bias: per-class bias that takes part in the choice only.
        groups: group limit of the choice.
        norm: ``sum`` divides the chosen weights by their sum, ``power`` by their p-norm.
        norm_eps: added to the sum. norm_min: lower bound of the sum. norm_power: p of the p-norm.
        scale: factor of all weights. expert_scale: factor per expert. global_scale: learned factor of all.
        table_VK: expert ids by token id (hash routing): the logits then give the weights only.
        shared: classes at the end that are shared experts: they share the norm, and are never chosen.
        skip_class: class that means "no expert": the router reports it as expert 0 with weight 0.
        capacity: tokens that an expert takes from one sequence; later ones get none (Switch Transformers,
            arXiv 2101.03961).
        jitter: sparsemixer's threshold.
        logits: where the logits come from: the router's output, or its weight times the input in fp32.
    """

    k: int
    score: Score
    choose_by: Literal["score", "logit"] = "score"
    bias: TensorRef | None = None
    groups: Groups | None = None
    norm: Norm = "none"
    norm_eps: float = 0.0
    norm_min: float = 0.0
    norm_power: float = 1.0
    scale: float = 1.0
    expert_scale: TensorRef | None = None
    global_scale: TensorRef | None = None
    table_VK: TensorRef | None = None
    shared: int = 0
    skip_class: int | None = None
    capacity: int | None = None
    jitter: float = 0.0
    logits: Literal["output", "weight"] = "output"

    @property
    def kind(self) -> str:
        """A short name of the rule for tables and messages, such as ``sigmoid+bias, norm``."""
        words: list[str] = [self.score]
        words += ["+bias"] if self.bias else []
        words += (
            [f", {self.groups.keep}/{self.groups.count} groups by {self.groups.score}"] if self.groups else []
        )
        words += [", token table"] if self.table_VK else []
        words += [", norm"] if self.norm != "none" else []
        words += [", per-expert scale"] if self.expert_scale else []
        words += [f", {self.shared} shared in the norm"] if self.shared else []
        words += [", skip class"] if self.skip_class is not None else []
        words += [", capacity"] if self.capacity is not None else []
        return "".join(words)


class Selection(NamedTuple):
    """Chosen experts and their weights (fp32 or wider); a slot without an expert has weight 0."""

    ids_TK: Tensor
    weights_TK: Tensor


def select(z_TC: Tensor, spec: RouterSpec, token_ids_T: Tensor | None = None) -> Selection:
    """Route T rows by the family's own rule.

    Args:
        z_TC: logits as the router gives them out (see ``RouterSpec.logits``), any float dtype.
        spec: the rule.
        token_ids_T: token ids, for rules with a token table.

    Raises:
        UsageError: the rule needs token ids and none were given.
    """
    z_TC = z_TC.float()
    if spec.score == "sparsemixer":
        return _sparsemixer(z_TC, spec.jitter)
    classes = z_TC.shape[-1] - spec.shared
    score_TC = _score(z_TC, spec.score)
    ids_TK = _choose(z_TC[:, :classes], score_TC[:, :classes], spec, token_ids_T)
    weights_TK = score_TC.gather(1, ids_TK)
    if spec.score == "softmax_topk":
        weights_TK = weights_TK.softmax(dim=-1)
    weights_TK = _scale(_normalise(weights_TK, score_TC[:, classes:], spec), ids_TK, spec)
    if spec.capacity is not None:
        ids_TK, weights_TK = _drop_overflow(ids_TK, weights_TK, spec.capacity, classes)
    if spec.skip_class is not None:
        skipped_TK = ids_TK == spec.skip_class
        ids_TK, weights_TK = ids_TK.masked_fill(skipped_TK, 0), weights_TK.masked_fill(skipped_TK, 0.0)
    return Selection(ids_TK, weights_TK)


def _score(z_TC: Tensor, score: Score) -> Tensor:
    if score == "softmax":
        return z_TC.softmax(dim=-1)
    if score == "sigmoid":
        return z_TC.sigmoid()
    if score == "sqrtsoftplus":
        return nn.functional.softplus(z_TC).sqrt()
    return z_TC


def _choose(z_TC: Tensor, score_TC: Tensor, spec: RouterSpec, token_ids_T: Tensor | None) -> Tensor:
    if spec.table_VK is not None:
        if token_ids_T is None:
            raise UsageError("this router chooses experts by token id; pass token_ids_T")
        return spec.table_VK.get()[token_ids_T].long()
    choice_TC = z_TC if spec.choose_by == "logit" else score_TC
    if spec.bias is not None:
        choice_TC = choice_TC + spec.bias.get().float().reshape(-1)
    if spec.groups is not None:
        choice_TC = _limit_groups(choice_TC, spec.groups)
    return torch.topk(choice_TC, spec.k, dim=-1).indices


def _limit_groups(choice_TC: Tensor, groups: Groups) -> Tensor:
    by_group: Tensor = choice_TC.view(len(choice_TC), groups.count, -1)
    if groups.score == "max":
        group_score_TG = by_group.amax(dim=-1)
    else:
        group_score_TG = by_group.topk(2, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_score_TG, dtype=torch.bool)
    kept_TG.scatter_(1, group_score_TG.topk(groups.keep, dim=-1).indices, True)
    return by_group.masked_fill(~kept_TG.unsqueeze(-1), groups.fill).flatten(-2)


def _normalise(weights_TK: Tensor, shared_TC: Tensor, spec: RouterSpec) -> Tensor:
    if spec.norm == "none":
        return weights_TK
    if spec.norm == "power":
        length_T1: Tensor = torch.linalg.vector_norm(weights_TK, ord=spec.norm_power, dim=-1, keepdim=True)
        return weights_TK / length_T1
    total_T1 = weights_TK.sum(dim=-1, keepdim=True) + shared_TC.sum(dim=-1, keepdim=True)
    if spec.norm_min:
        total_T1 = total_T1.clamp(min=spec.norm_min)
    return weights_TK / (total_T1 + spec.norm_eps)


def _scale(weights_TK: Tensor, ids_TK: Tensor, spec: RouterSpec) -> Tensor:
    if spec.expert_scale is not None:
        weights_TK = weights_TK * spec.expert_scale.get().float()[ids_TK]
    if spec.global_scale is not None:
        weights_TK = weights_TK * spec.global_scale.get().float()
    return weights_TK * spec.scale


def _drop_overflow(ids_TK: Tensor, weights_TK: Tensor, capacity: int, empty: int) -> Selection:
    """Keep the first ``capacity`` tokens of each expert; the others get the id ``empty`` and weight 0."""
    taken_TC = nn.functional.one_hot(ids_TK[:, 0], num_classes=empty).cumsum(dim=0)
    over_TK = taken_TC.gather(1, ids_TK) > capacity
    return Selection(ids_TK.masked_fill(over_TK, empty), weights_TK.masked_fill(over_TK, 0.0))


def _sparsemixer(z_TC: Tensor, jitter: float) -> Selection:
    """Two arg-max steps; each weight is a softmax over the logits that come close to that step's maximum."""
    ids, weights = [], []
    left_TC = z_TC
    for _ in range(2):
        best_T1, id_T1 = left_TC.max(dim=-1, keepdim=True)
        far_TC = (best_T1 - z_TC) / z_TC.abs().clamp(min=best_T1) > 2 * jitter
        weights.append(left_TC.masked_fill(far_TC, -torch.inf).softmax(dim=-1).gather(1, id_T1))
        ids.append(id_T1)
        left_TC = left_TC.scatter(1, id_T1, -torch.inf)
    return Selection(torch.cat(ids, dim=-1), torch.cat(weights, dim=-1))

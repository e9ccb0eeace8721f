"""Which tokens are computed together. Exact: a token's result does not depend on its company."""

from gangline.policies.batching.dynamic_gating import Dispatch, dispatch, waste_factor
from gangline.policies.batching.expert_aware import ExpertAwareBatching, Ready
from gangline.policies.batching.token_regrouping import distinct_experts, regroup

__all__ = [
    "Dispatch",
    "ExpertAwareBatching",
    "Ready",
    "dispatch",
    "distinct_experts",
    "regroup",
    "waste_factor",
]

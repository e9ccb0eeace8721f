"""From a router module to its ``RouterSpec``.

Sizes, biases, groups, scales and switches are read from the module's attributes, which families name alike.
Only what stands in a router's source and nowhere else is listed here by class name: how logits become scores,
and how weights are normalised where no attribute says so. ``check_conformance`` proves each entry.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from gangline.models.router import Groups, Norm, RouterSpec, Score, TensorRef


class RouterUnknownError(Exception):
    """No rule can be given for a router; the message is the reason."""


@dataclass(frozen=True)
class _Rule:
    """What only a router's source says; the attribute ``norm_topk_prob`` overrules ``norm``."""

    score: Score
    choose_by: Literal["score", "logit"] = "score"
    norm: Norm = "none"
    eps: float = 0.0
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    group_fill: float = float("-inf")


_SOFTMAX = _Rule("softmax")
_SOFTMAX_NORM = _Rule("softmax", norm="sum")
_SOFTMAX_MAX_GROUPS = _Rule("softmax", group_score="max", group_fill=0.0)
_SOFTMAX_PAIR_GROUPS = _Rule("softmax", norm="sum", eps=1e-20, group_fill=0.0)
_SIGMOID_NORM = _Rule("sigmoid", norm="sum")
_SIGMOID_EPS = _Rule("sigmoid", norm="sum", eps=1e-20)
_TOPK_SOFTMAX = _Rule("softmax_topk", choose_by="logit")

_CLASSES: dict[_Rule, str] = {
    _SOFTMAX: "JambaTopKRouter LongcatFlashTopkRouter",
    _SOFTMAX_NORM: """
        MixtralTopKRouter MiniMaxTopKRouter OlmoeTopKRouter FlexOlmoTopKRouter MellumTopKRouter
        Qwen2MoeTopKRouter Qwen3MoeTopKRouter Qwen3NextTopKRouter Qwen3VLMoeTextTopKRouter
        Qwen3OmniMoeTextTopKRouter Qwen3OmniMoeThinkerTextTopKRouter
        Qwen3OmniMoeTalkerTextTopKRouter Qwen3_5MoeTopKRouter Qwen4ExpTextTopKRouter
        HunYuanMoEV1Gate Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter
    """,
    _SOFTMAX_MAX_GROUPS: "DeepseekV2TopkRouter DeepseekOcr2TextTopkRouter UnlimitedOcrTextTopkRouter",
    _SOFTMAX_PAIR_GROUPS: "Mistral4TopkRouter MistralLarge4TextTopkRouter",
    _SIGMOID_EPS: """
        DeepseekV3TopkRouter DeepseekV32TopkRouter Glm4MoeTopkRouter Glm4MoeLiteTopkRouter
        Glm4vMoeTextTopkRouter Glm5NextTextTopkRouter GlmMoeDsaTopkRouter Dots1TopkRouter
        Dots3NoteTextTopkRouter Dots3NoteVisionTopKRouter KimiLinearTopkRouter
        BailingHybridTopkRouter AXK1TopkRouter ExaoneMoeTopkRouter SolarOpenTopkRouter
        MiMoV2FlashTopkRouter HYV3TopKRouter HYV4TopkRouter NemotronHTopkRouter BeamTopKRouter
        AfmoeTokenChoiceRouter
    """,
    replace(_SIGMOID_EPS, group_fill=0.0): "AXK2TopkRouter",
    replace(_SIGMOID_NORM, eps=1e-15): "MuseSparkTopkRouter",
    replace(_SIGMOID_NORM, eps=1e-6): "Lfm2MoeTopKRouter",
    _SIGMOID_NORM: """
        MiniMaxM2TopKRouter MiniMaxM3VLTopKRouter Step3p7TopKRouter LagunaTopKRouter FlintTopKRouter
        InklingTopkRouter
    """,
    replace(_SIGMOID_NORM, choose_by="logit"): "Kolibri1TopKRouter",
    _Rule("sigmoid", choose_by="logit"): "Llama4Router",
    _TOPK_SOFTMAX: """
        GptOssTopKRouter OpenAIPrivacyFilterTopKRouter GraniteMoeTopKRouter
        GraniteMoeSharedTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSWATopKRouter
        AriaTextTopKRouter JetMoeTopKGating
    """,
    _Rule("given", norm="sum"): "Gemma4TextRouter DiffusionGemmaTextRouter",
}

_RULES: dict[str, _Rule] = {name: rule for rule, names in _CLASSES.items() for name in names.split()}

_SCORE_FUNCTIONS: dict[str, Score] = {
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
    "SqrtSoftplusActivation": "sqrtsoftplus",
}


def router_spec(router: nn.Module, parent: nn.Module, k: int) -> RouterSpec:
    """Return the routing rule of ``router``.

    Args:
        router: the router module; may lie on the meta device.
        parent: the MoE block around it, which holds the selection bias in some families.
        k: experts per token.

    Raises:
        RouterUnknownError: the class is not in the table, or its settings cannot be expressed.
    """
    name = type(router).__name__
    special = _SPECIAL.get(name)
    if special is not None:
        return special(router, parent, k)
    if name not in _RULES:
        raise RouterUnknownError(f"the router class {name} is not in gangline's table")
    spec = _from_attributes(_RULES[name], router, parent, k)
    refine = _REFINE.get(name)
    return spec if refine is None else refine(spec, router)


def _from_attributes(rule: _Rule, router: nn.Module, parent: nn.Module, k: int) -> RouterSpec:
    norm: Norm = rule.norm
    if hasattr(router, "norm_topk_prob"):
        norm = "sum" if router.norm_topk_prob else "none"
    return RouterSpec(
        k=k,
        score=rule.score,
        choose_by=rule.choose_by,
        bias=_bias(router, parent),
        groups=_groups(rule, router),
        norm=norm,
        norm_eps=rule.eps,
        norm_min=float(getattr(router, "norm_min", 0.0)),
        scale=_scale(router),
        expert_scale=_ref(router, "per_expert_scale"),
    )


def _bias(router: nn.Module, parent: nn.Module) -> TensorRef | None:
    if not getattr(parent, "use_expert_bias", True):
        return None
    for module in (router, getattr(router, "moe_statics", None), parent):
        for name in ("e_score_correction_bias", "expert_bias"):
            if module is not None and isinstance(getattr(module, name, None), Tensor):
                return TensorRef(module, name)
    return None


def _groups(rule: _Rule, router: nn.Module) -> Groups | None:
    count, keep = getattr(router, "num_group", None), getattr(router, "topk_group", None)
    if count is None or keep is None or getattr(router, "topk_method", "") == "greedy":
        return None
    return Groups(int(count), int(keep), rule.group_score, rule.group_fill)


def _scale(router: nn.Module) -> float:
    for name in ("routed_scaling_factor", "route_scale", "router_scaling_factor"):
        value = getattr(router, name, None)
        if value is not None:
            return float(value)
    return 1.0


def _ref(module: nn.Module, name: str) -> TensorRef | None:
    return TensorRef(module, name) if isinstance(getattr(module, name, None), Tensor) else None


def _privacy_filter(spec: RouterSpec, _router: nn.Module) -> RouterSpec:
    return replace(spec, scale=1.0 / spec.k)


def _inkling(spec: RouterSpec, router: nn.Module) -> RouterSpec:
    shared = int(router.n_shared_experts)  # type: ignore[arg-type]
    return replace(spec, shared=shared, global_scale=TensorRef(router, "global_scale"), logits="weight")


_REFINE: dict[str, Callable[[RouterSpec, nn.Module], RouterSpec]] = {
    "OpenAIPrivacyFilterTopKRouter": _privacy_filter,
    "InklingTopkRouter": _inkling,
}


def _named_score(router: nn.Module, parent: nn.Module, k: int) -> RouterSpec:
    function = type(router.score_fn).__name__
    if function not in _SCORE_FUNCTIONS:
        raise RouterUnknownError(
            f"{type(router).__name__} scores with {function}, which gangline does not know"
        )
    spec = _from_attributes(_Rule(_SCORE_FUNCTIONS[function], norm="sum", eps=1e-20), router, parent, k)
    return replace(spec, table_VK=_ref(router, "tid2eid"))


def _cohere2(router: nn.Module, parent: nn.Module, k: int) -> RouterSpec:
    if router.expert_selection_fn == "sigmoid":
        return _from_attributes(_Rule("sigmoid", choose_by="logit"), router, parent, k)
    return RouterSpec(k, "softmax_topk", choose_by="logit")


def _zaya(router: nn.Module, _parent: nn.Module, k: int) -> RouterSpec:
    skip = int(router.num_experts)  # type: ignore[arg-type]
    return RouterSpec(k, "softmax", bias=TensorRef(router, "balancing_biases"), skip_class=skip)


def _phimoe(router: nn.Module, _parent: nn.Module, k: int) -> RouterSpec:
    if k != 2:
        raise RouterUnknownError(f"sparsemixer chooses exactly 2 experts, the config says {k}")
    return RouterSpec(k, "sparsemixer", jitter=float(router.router_jitter_noise))  # type: ignore[arg-type]


def _dbrx(_router: nn.Module, parent: nn.Module, k: int) -> RouterSpec:
    power = parent.moe_normalize_expert_weights
    if power is None:
        return RouterSpec(k, "softmax")
    return RouterSpec(k, "softmax", norm="power", norm_power=float(power))  # type: ignore[arg-type]


def _switch(router: nn.Module, _parent: nn.Module, k: int) -> RouterSpec:
    return RouterSpec(k, "softmax", capacity=int(router.expert_capacity))  # type: ignore[arg-type]


def _nllb(router: nn.Module, _parent: nn.Module, k: int) -> RouterSpec:
    if router.second_expert_policy != "all":
        raise RouterUnknownError(f"the second expert is drawn at random ({router.second_expert_policy})")
    if float(router.moe_eval_capacity_token_fraction) < 1.0:  # type: ignore[arg-type]
        raise RouterUnknownError("tokens beyond an expert's capacity are dropped by rank in the batch")
    return RouterSpec(k, "softmax", norm="sum", norm_min=2.0**-23)


_SPECIAL: dict[str, Callable[[nn.Module, nn.Module, int], RouterSpec]] = {
    "DeepseekV4TopKRouter": _named_score,
    "DeepseekV4HashRouter": _named_score,
    "Inkling2TopKRouter": _named_score,
    "Cohere2MoeTopKRouter": _cohere2,
    "ZayaRouter": _zaya,
    "PhimoeTopKRouter": _phimoe,
    "DbrxRouter": _dbrx,
    "SwitchTransformersTop1Router": _switch,
    "NllbMoeTop2Router": _nllb,
}

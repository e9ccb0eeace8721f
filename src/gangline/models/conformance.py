"""Prove at attach that our view of a model is the model: routing rule and experts' arithmetic.

Shape suffixes: T tokens, K chosen experts per token, D hidden, E experts, C classes of the router.
"""

import copy
import itertools
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from gangline.core.errors import ConformanceError
from gangline.models.access import expert_tensors
from gangline.models.resident import resident_forward
from gangline.models.router import RouterSpec, Selection, select
from gangline.models.view import MoEBlock, MoEView, Routed

ROUTING_TOLERANCE = 1e-6
_MATH_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_conformance(view: MoEView, rows: int = 64, seed: int = 0) -> None:
    """Compare our view with the model on random rows drawn from ``seed``, layer by layer.

    Routing: ``rows`` random inputs go through an fp32 copy of the model's router and through ``select``; ids
    must be equal and weights equal within 1e-6. A block without ``router_spec`` is passed over: it runs with
    the ids and weights that its router gives. Experts: the first and the last expert of each layer compute
    four rows through the module and through the reference kernel; passed over if the module holds no weights.

    Raises:
        ConformanceError: naming family, layer and what differs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in view.blocks:
            if block.router_spec is not None:
                _check_router(view, block, block.router_spec, rows, generator)
            if _holds_weights(block):
                _check_experts(view, block, generator)


def _check_router(
    view: MoEView, block: MoEBlock, spec: RouterSpec, rows: int, generator: torch.Generator
) -> None:
    router = cast(nn.Module, block.router)
    if next(router.parameters()).is_meta:
        raise ConformanceError(
            f"{_place(view, block)}: its router has no weights yet (meta device); load the model first"
        )
    # fp32, so that what is compared is the rule and not the rounding of the model's dtype.
    shadow = replace(block, router=copy.deepcopy(router).float().eval())
    device = next(router.parameters()).device
    x_TD = torch.randn(rows, _input_width(router), generator=generator).to(device)
    vocabulary = spec.table_VK.get().shape[0] if spec.table_VK else 1
    tokens_T = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    theirs = block.adapter.route(shadow, x_TD, tokens_T)
    z_TC = theirs.logits_TE if spec.logits == "output" else x_TD @ _weight(router).float().t()
    problem = _difference(theirs, select(z_TC, spec, tokens_T), block.geometry.experts)
    if problem:
        raise ConformanceError(
            f"{_place(view, block)}: the rule for {type(router).__name__} ({spec.kind}) does not give "
            f"its routing: {problem}; report this transformers version to gangline"
        )


def _difference(theirs: Routed, ours: Selection, experts: int) -> str:
    """Return what differs, or an empty string; slots come in any order, one of weight 0 holds no expert."""
    if theirs.ids_TK.is_floating_point() or theirs.ids_TK.shape != theirs.weights_TK.shape:
        return "it does not return (logits, weights, ids), as it does from transformers 5.21 on"
    classes = 1 + max(experts, int(theirs.ids_TK.max()), int(ours.ids_TK.max()))
    dense = [
        torch.zeros(len(ids_TK), classes).scatter_add_(1, ids_TK.long().cpu(), weights_TK.float().cpu())
        for weights_TK, ids_TK in ((theirs.weights_TK, theirs.ids_TK), (ours.weights_TK, ours.ids_TK))
    ]
    wrong = ((dense[0] != 0) != (dense[1] != 0)).any(dim=1)
    if wrong.any():
        return f"other experts for {int(wrong.sum())} of {len(wrong)} rows"
    worst = float((dense[0] - dense[1]).abs().max())
    # Weights above 1 (a routed scale) are held to the same number of digits.
    allowed = ROUTING_TOLERANCE * max(1.0, float(dense[0].abs().max()))
    return f"weights differ by {worst:.2e}, allowed {allowed:.2e}" if not worst <= allowed else ""


def _check_experts(view: MoEView, block: MoEBlock, generator: torch.Generator) -> None:
    geometry = block.geometry
    weights = expert_tensors(block, 0)[0]
    x_TD = torch.randn(4, geometry.hidden, generator=generator).to(weights.device, weights.dtype)
    ids_TK = torch.tensor([[0, geometry.experts - 1]] * 4, device=weights.device)
    mix_TK = torch.rand(4, 2, generator=generator).to(weights.device, weights.dtype)
    theirs_TD = block.adapter.compute(block, x_TD, ids_TK, mix_TK).float()
    ours_TD = resident_forward(block)(x_TD, ids_TK, mix_TK).float()
    scale = float(theirs_TD.abs().max())
    worst = float((theirs_TD - ours_TD).abs().max())
    if not worst <= _MATH_TOLERANCE[weights.dtype] * scale:
        raise ConformanceError(
            f"{_place(view, block)}: {type(block.experts).__name__} computes something else than gangline's "
            f"reference (difference {worst:.2e} at values up to {scale:.2e}); "
            "report this transformers version to gangline"
        )


def _holds_weights(block: MoEBlock) -> bool:
    parameters = dict(block.experts.named_parameters())
    return all(
        name.format(expert=0) in parameters and not parameters[name.format(expert=0)].is_meta
        for name in block.param_names
    )


def _input_width(router: nn.Module) -> int:
    return int(_weight(router).shape[-1])


def _weight(router: nn.Module) -> Tensor:
    """Return the matrix that reads the hidden states: the router's own, or that of its first linear layer."""
    own = router._parameters.get("weight")
    if own is not None:
        return own
    linear = next(m for m in itertools.islice(router.modules(), 1, None) if isinstance(m, nn.Linear))
    return linear.weight


def _place(view: MoEView, block: MoEBlock) -> str:
    return f"{view.family}, MoE layer {block.layer} ({block.name})"

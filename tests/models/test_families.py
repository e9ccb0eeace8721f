"""Every MoE family of the installed transformers: detection, geometry, routing rule, installation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from gangline.core.errors import ConformanceError
from gangline.models import (
    MoEView,
    RouterSpec,
    check_conformance,
    drop_expert_params,
    expert_tensors,
    find_moe,
    restore_expert_params,
)
from models.rig import logits, on_meta, resident
from near_ties import agree_unless_tied, is_tied, share_off
from tiny_models import FAMILIES, tiny_model

# Of the largest logit: sums in another order differ in the last bits.
TOLERANCE = 5e-5
# Rows of identity experts that no forward reads.
_SPARE_ROWS = ("longcat_flash",)


def test_no_family_of_the_installed_transformers_is_left_out() -> None:
    folder = Path(transformers.__file__).parent / "models"
    decorated = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    assert len(decorated) >= 60
    assert decorated <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_view_and_routing(family: str, seed: int) -> None:
    model = tiny_model(family, seed)
    view = find_moe(model)
    check_geometry(view)
    meta_view = find_moe(on_meta(model))
    assert meta_view.geometry == view.geometry
    assert [b.fields for b in meta_view.blocks] == [b.fields for b in view.blocks]
    assert [b.name for b in meta_view.blocks] == [b.name for b in view.blocks]
    check_conformance(view, seed=seed)
    for block in view.blocks:
        assert block.router_spec is not None, block.router_reason
        for broken in broken_specs(block.router_spec):
            with pytest.raises(ConformanceError, match=f"{view.family}, MoE layer {block.layer} "):
                check_conformance(MoEView(model, view.family, [replace(block, router_spec=broken)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_installed_forward_gives_the_plain_models_logits(family: str, seed: int) -> None:
    model = tiny_model(family, seed)
    view = find_moe(model)

    def attempt(draw: int) -> Callable[[], bool] | None:
        plain = logits(model, seed + draw)
        with resident(view) as calls:
            installed = logits(model, seed + draw)
        assert torch.equal(logits(model, seed + draw), plain), "undo does not restore the plain model"
        check_calls(view, calls)
        if share_off(installed, plain) < TOLERANCE:
            return None
        return lambda: is_tied(
            model, lambda: logits(model, seed + draw), lambda a, b: not share_off(a, b) < 4 * TOLERANCE
        )

    agree_unless_tied(attempt)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_parameters_come_back(family: str, seed: int) -> None:
    model = tiny_model(family, seed)
    view = find_moe(model)
    plain, keys = logits(model, seed), set(model.state_dict())
    kept = [[expert_tensors(b, e) for e in range(b.geometry.experts)] for b in view.blocks]
    before = sum(p.numel() for p in model.parameters())
    for block in view.blocks:
        drop_expert_params(block)
    freed = before - sum(p.numel() for p in model.parameters())
    owned = [block.geometry for block in view.blocks if block.same_weights_as is None]
    spare = family in _SPARE_ROWS
    assert (
        freed >= sum(g.experts * g.expert_params for g in owned)
        if spare
        else freed == sum(g.experts * g.expert_params for g in owned)
    )
    dropped = keys - set(model.state_dict())
    expected = {
        f"{b.name}.{name.format(expert=e)}"
        for b in view.blocks
        for name in b.param_names
        for e in range(b.geometry.experts)
    }
    assert dropped == expected
    for block, experts in zip(view.blocks, kept, strict=True):
        restore_expert_params(block, experts)
    assert set(model.state_dict()) == keys
    assert torch.equal(logits(model, seed), plain)


def broken_specs(spec: RouterSpec) -> list[RouterSpec]:
    """The rule with one part changed at a time."""
    if spec.score == "sparsemixer":
        return [replace(spec, jitter=spec.jitter / 4)]
    broken = [replace(spec, scale=spec.scale * 1.01)]
    if spec.score in ("softmax", "sigmoid"):
        broken.append(replace(spec, score="sigmoid" if spec.score == "softmax" else "softmax"))
    if spec.bias is not None:
        broken.append(replace(spec, bias=None))
    if spec.groups is not None:
        broken.append(replace(spec, groups=None))
    if spec.norm != "none":
        broken.append(replace(spec, norm="none"))
    return broken


def check_geometry(view: MoEView) -> None:
    """Compare the view with the module's own tensors."""
    assert [block.layer for block in view.blocks] == list(range(len(view.blocks)))
    for block in view.blocks:
        geometry = block.geometry
        tensors = expert_tensors(block, geometry.experts - 1)
        assert sum(t.numel() for t in tensors) == geometry.expert_params
        assert [f.name for f in block.fields] in (["gate_up", "down"], ["gate", "up", "down"], ["up", "down"])
        for field, tensor in zip(block.fields, tensors, strict=True):
            out, inner = reversed(field.shape) if field.transposed else field.shape
            assert tuple(tensor.shape) == field.shape
            width = 2 * geometry.intermediate if field.name == "gate_up" else geometry.intermediate
            assert (out, inner) == (
                (geometry.hidden, geometry.intermediate) if field.name == "down" else (width, geometry.hidden)
            )
        assert block.router is not None
        assert view.model.get_submodule(block.router_name) is block.router
        assert view.model.get_submodule(block.name) is block.experts


def check_calls(view: MoEView, calls: list) -> None:
    """The forward saw every text layer once, with the geometry's sizes and valid ids."""
    assert calls
    for block, x_TD, ids_TK, weights_TK in calls:
        assert x_TD.shape[-1] == block.geometry.hidden
        assert ids_TK.shape == weights_TK.shape == (len(x_TD), ids_TK.shape[1])
        assert int(ids_TK.min()) >= 0
        assert int(ids_TK.max()) <= block.geometry.experts
    seen = [block.layer for block, *_ in calls]
    assert seen == sorted(seen), "layers are not in the order in which a token meets them"

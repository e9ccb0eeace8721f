"""From a chosen composition to parts that run with a loaded model."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gangline.core.errors import UsageError
from gangline.models import MoEView
from gangline.policies.caches import RandomEviction
from gangline.policies.compositions import composition
from gangline.policies.parts import Material, Parts, build_parts
from gangline.policies.predictors.next_gate import Gate
from gangline.runtime.engine import Engine
from gangline.runtime.mixed import MixedPrecision
from gangline.runtime.planner import MemoryPlan
from gangline.runtime.policy_choice import PolicyChoice
from gangline.runtime.policy_driver import PolicyDriver
from gangline.runtime.router_scores import plain_routers, router_scores
from gangline.runtime.store import ExpertStore
from gangline.traces.header import TraceHeader

logger = logging.getLogger(__name__)

_FIRST_NUMBERED = re.compile(r"^.*?\.\d+(?=\.|$)")


def live_material(choice: PolicyChoice, view: MoEView) -> Material:
    """Return what the parts of a composition are made of.

    Raises:
        UsageError, TraceError: what it learned from cannot be read, or is of another model.
    """
    found, path = choice.composition, choice.learned
    gates: Sequence[Gate] | None = None
    if found.predictor == "next-gate" or found.cache == "mrs":
        gates = router_scores(view)
    material = Material(view.geometry, gates)
    if path is None:
        return material
    if path.is_dir():
        return _with_trace(material, choice, view)
    from gangline.policies.predictors.identity import require_same_model
    from gangline.policies.predictors.saved import load_predictor

    saved = load_predictor(path)
    require_same_model(saved.about, view, path)
    return Material(view.geometry, gates, saved.network, saved.kind)


def _with_trace(material: Material, choice: PolicyChoice, view: MoEView) -> Material:
    from gangline.policies.caches.static_hot import hottest
    from gangline.traces import open_trace
    from gangline.traces.replay import expert_tokens

    assert choice.learned is not None
    trace = open_trace(choice.learned)
    require_trace_of(trace.header, view, trace.name)
    tokens = expert_tokens(trace)
    return Material(view.geometry, material.gates, popular=hottest(tokens, len(tokens)))


def require_trace_of(header: TraceHeader, view: MoEView, name: str) -> None:
    """Refuse a trace of another model.

    Raises:
        UsageError: its family or its layers differ.
    """
    mine = [(layer.experts, layer.top_k) for layer in view.geometry.layers]
    theirs = list(zip(header.experts, header.top_k, strict=True))
    if header.family != view.family or mine != theirs:
        raise UsageError(
            f"{name} is of {header.model} ({header.family}), whose experts are others than this model's; "
            "record this model with 'gangline trace'"
        )


def _for_routers(choice: PolicyChoice, view: MoEView) -> PolicyChoice:
    """Return what stands in for a choice whose predictor would have to ask unusual routers."""
    instead = choice.composition.otherwise
    if instead is None or plain_routers(view):
        return choice
    logger.info(
        "the routers of %s are no plain ones: policy %s runs as %s", view.family, choice.name, instead
    )
    return replace(choice, composition=composition(instead))


def live_parts(choice: PolicyChoice, view: MoEView, plan: MemoryPlan, cache_seed: int | None = None) -> Parts:
    """Make fresh parts for the slots of a plan; with ``cache_seed`` the caches evict at random.

    Raises:
        UsageError: see :func:`live_material` and :func:`gangline.policies.parts.build_parts`.
    """
    pools = [(count, layers) for _, count, layers in plan.pools]
    choice = _for_routers(choice, view)
    if plan.everything_resident:  # nothing is ever evicted or read: whoever would look at events need not
        if choice.source != "default":
            build_parts(choice.composition, live_material(choice, view), pools)  # says what it lacks
        return build_parts(composition("layer-lru"), Material(view.geometry), pools)
    parts = build_parts(choice.composition, live_material(choice, view), pools)
    if cache_seed is None:
        return parts
    return replace(parts, caches=tuple(RandomEviction(cache_seed) for _ in pools))


def start_policy(
    model: Any, view: MoEView, engine: Engine, store: ExpertStore, parts: Parts, slots: int
) -> Callable[[], None]:
    """Let the engine call ``parts`` beside it, if they do more than choose victims by counts.

    Returns:
        What takes them out again.
    """
    if parts.passive:
        return lambda: None
    gates = router_scores(view) if "scores" in parts.needs else None
    embed = model.get_input_embeddings() if "embeddings" in parts.needs else None
    driver = PolicyDriver(store, parts, view.geometry, slots, gates=gates, embed=embed)
    engine.policy = driver
    if parts.precision is not None:
        engine.mixed = MixedPrecision(store, parts.precision, len(view.blocks))
    hooks = _hidden_hooks(model, view, engine, driver) if driver.sees_hidden else []

    def stop() -> None:
        engine.policy = engine.mixed = None
        for hook in hooks:
            hook.remove()

    return stop


def _hidden_hooks(model: nn.Module, view: MoEView, engine: Engine, driver: PolicyDriver) -> list[Any]:
    """Show the driver what enters the decoder layer of each MoE layer. The native decode step gives way."""
    handles = []
    for block in view.blocks:
        found = _FIRST_NUMBERED.match(block.parent_name)
        module = model.get_submodule(found.group()) if found else block.parent

        def entering(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = block.layer
        ) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            driver.before_attention(engine.step_of(layer), layer, hidden.reshape(-1, hidden.shape[-1]))

        handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
    return handles

"""The public face: load, attach, detach, plan."""

from pathlib import Path
from typing import Any

from gangline.runtime.attach import attach_model, detach_model
from gangline.runtime.load import load_model, plan_model
from gangline.runtime.planner import MemoryPlan
from gangline.runtime.runtime import Runtime


def load(model: str | Path, **options: Any) -> Any:
    """Load a MoE within a memory budget: :func:`gangline.runtime.load.load_model` on a place or ``"demo"``.

    ``"demo"`` is a small real model that is made on first use. The options are the fields of
    :class:`~gangline.runtime.options.LoadOptions`.
    """
    return load_model(_place(model), **{"name": str(model), **options})


def plan(model: str | Path, **options: Any) -> MemoryPlan:
    """Say from headers alone what :func:`load` would put where.

    The options are those of :func:`load`.
    """
    return plan_model(_place(model), **{"name": str(model), **options})


def attach(model: Any, **options: Any) -> Runtime:
    """Move the experts of a model that is already built into the store.

    See :func:`gangline.runtime.attach.attach_model` for the options.
    """
    return attach_model(model, **options)


def detach(model: Any) -> None:
    """Give a model that :func:`attach` took over its own experts back."""
    detach_model(model)


def _place(model: str | Path) -> str | Path:
    if model != "demo":
        return model
    from gangline.compress.demo import demo_made_apart

    return demo_made_apart()

"""SiDA's own mode (arXiv 2310.18859) for a loaded model: its saved predictor decides what is computed."""

from typing import Any

from gangline.core.errors import UsageError
from gangline.policies.predictors.identity import require_same_model
from gangline.policies.predictors.saved import load_predictor
from gangline.runtime.hash_routing import HashRouting
from gangline.runtime.policy_choice import PolicyChoice


def execute_predictions(model: Any, choice: PolicyChoice) -> None:
    """Skip the routers of a loaded model until it is closed; banner and statistics then say so.

    Args:
        model: from ``gangline.load`` or ``attach``; closed if an error is raised.
        choice: a policy whose prediction is to be executed, with the file of its predictor.

    Raises:
        UsageError: the file holds another kind of predictor or is of another model, or the model's routers
            cannot be replaced.
    """
    try:
        _execute(model, choice)
    except BaseException:
        model.gangline.close()
        raise


def _execute(model: Any, choice: PolicyChoice) -> None:
    file, runtime = choice.learned, model.gangline
    if file is None:
        raise UsageError(f"policy {choice.name} has no predictor to execute; give --predictor FILE")
    saved = load_predictor(file)
    if saved.kind != "sida":
        raise UsageError(f"{file} is a {saved.kind} predictor; only one of kind sida can be executed")
    require_same_model(saved.about, runtime.view, file)
    held_out = saved.about.get("held_out") or {}
    agrees = f", {held_out['top1']:.0%} of first choices right on held-out text" if "top1" in held_out else ""
    routing = HashRouting(model, saved.network, mode="execute", agreement=agrees)
    runtime.on_close(routing.close)

"""Which policy a model runs under, and where that was decided."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from gangline.core.errors import UsageError
from gangline.core.home import cache_dir, write_record
from gangline.policies.compositions import Composition, composition, find_composition, require_exact, to_dict

logger = logging.getLogger(__name__)

SCHEMA = 1

PredictionMode = Literal["hint", "execute", "mixed"]
"""What a policy may do with the answers: nothing, compute what its predictor says, or compute experts in low
precision and leave some out."""


@dataclass(frozen=True)
class PolicyChoice:
    """A composition and its origin.

    Attributes:
        name: as the user wrote it.
        composition: what it stands for.
        source: whether it is the ``default``, was ``asked`` for, or was ``tuned`` for this model, memory and
            machine.
        learned: file of a trained predictor, or folder of a trace, that its parts learn from.
    """

    name: str
    composition: Composition
    source: Literal["default", "asked", "tuned"] = "default"
    learned: Path | None = None

    def words(self, *, idle: bool = False) -> str:
        """Return what a banner says of it."""
        notes: list[str] = ["tuned"] if self.source == "tuned" else []
        left_out = self.composition.left_out
        if idle:
            notes.append("idle: all experts are in memory")
        elif left_out:
            notes.append(left_out)
        return f"policy {self.name}" + (f" ({'; '.join(notes)})" if notes else "")


DEFAULT = PolicyChoice("default", composition("default"))


def asked_policy(
    policy: str | None, learned: str | None, mode: PredictionMode = "hint"
) -> PolicyChoice | None:
    """Return what the user asked for, or None if nothing.

    Of a composition whose prediction is executed the cache is left: the tables themselves say what to read.

    Raises:
        UsageError: there is no such composition, it is not one that an engine can run, what it learned from
            is not there, or its prediction cannot be executed.
    """
    if mode not in get_args(PredictionMode):
        raise UsageError(f"mode {mode!r} must be hint, execute or mixed")
    choice = _asked(policy, learned, mixed=mode == "mixed")
    if mode == "hint":
        return choice
    if mode == "mixed":
        if choice is None or choice.composition.precision is None:
            raise UsageError(
                "mode mixed computes in two precisions, which is a part of policy hobbit: give "
                "--policy hobbit, or a .yaml file with a precision, beside --mode mixed"
            )
        return choice
    if choice is None or choice.composition.predictor != "sida" or choice.learned is None:
        raise UsageError(
            "only SiDA's prediction can be executed: give --policy sida and --predictor FILE beside "
            "--mode execute"
        )
    cache_alone = replace(choice.composition, predictor="none", prefetcher=None, unlike="")
    return replace(choice, composition=cache_alone)


def _asked(policy: str | None, learned: str | None, *, mixed: bool) -> PolicyChoice | None:
    if policy is None:
        if learned is not None:
            raise UsageError("a predictor serves a policy: name it, for example --policy sida")
        return None
    found = find_composition(policy)
    require_live(policy, found, mixed=mixed)
    place = None if learned is None else Path(learned).expanduser()
    if place is not None and not place.exists():
        raise UsageError(f"{place} does not exist; give a file of 'gangline predict train', or a trace")
    return PolicyChoice(policy, found, "asked", place)


def require_live(name: str, found: Composition, *, mixed: bool = False) -> None:
    """Refuse what only the simulator can run.

    Args:
        name: what the user called it.
        found: the composition.
        mixed: whether it may compute experts in a second, lower precision.

    Raises:
        UsageError: the composition changes the output, or knows the future.
    """
    if not mixed:
        require_exact(name, found)
    if found.predictor == "oracle" or found.cache in ("belady", "belady-bypass", "window-oracle"):
        raise UsageError(f"{name} knows the future, as only the simulator does; choose another policy")


def tuned_file(model: str, precision: str, memory: int | None) -> Path:
    """Return where the choice for a model on this machine is stored.

    Args:
        model: what identifies the model's files.
        precision: of its experts.
        memory: the budget in bytes; None for what the machine has free.
    """
    import hashlib

    from gangline.runtime.machine import hardware

    text = f"{SCHEMA}|{model}|{precision}|{memory}|{hardware().key}"
    return cache_dir("tuned") / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def store_tuned(file: Path, choice: PolicyChoice, about: dict[str, Any]) -> None:
    """Write a choice with what it rests on; the file appears only when it is complete."""
    data = {
        "schema": SCHEMA,
        "policy": choice.name,
        "composition": to_dict(choice.composition),
        "learned": None if choice.learned is None else str(choice.learned.resolve()),
        **about,
    }
    write_record(file, data)


def tuned_policy(model: str, precision: str, memory: int | None) -> PolicyChoice | None:
    """Return the stored choice, or None if there is none that can be followed."""
    if not any(cache_dir("tuned").iterdir()):
        return None  # nothing was ever tuned: ask for no hardware
    file = tuned_file(model, precision, memory)
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found = Composition(**data["composition"])
        learned = None if data["learned"] is None else Path(data["learned"])
        require_live(data["policy"], found)
    except (ValueError, KeyError, TypeError, UsageError):
        logger.warning("%s is not a choice of this version; 'gangline tune' makes a new one", file)
        return None
    if learned is not None and not learned.exists():
        logger.warning("the tuned policy needs %s, which is gone; 'gangline tune' chooses anew", learned)
        return None
    return PolicyChoice(data["policy"], found, "tuned", learned)

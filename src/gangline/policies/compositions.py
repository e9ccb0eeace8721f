"""Published systems as compositions of the parts in this package, and compositions of one's own as YAML.

A composition is exact only if every part is. ``unlike`` says what of the system is left out so that it stays
exact, or because it lies elsewhere.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangline.core.errors import UsageError

if TYPE_CHECKING:
    from gangline.policies.precision.mixed import Mixed


@dataclass(frozen=True)
class Composition:
    """Names of the parts; None where a system has none or any will do.

    Attributes:
        cache: a key of ``caches.CACHES``.
        scope: whether the cache partitions its slots by layer.
        predictor: a key of ``predictors.PREDICTORS``.
        ahead: layers that the predictor looks ahead, where it has a choice.
        prefetcher: a class of ``prefetch``.
        precision: a class of ``precision``.
        scheduler: a class of ``schedule``.
        batching: a class or function of ``batching``.
        exact: whether all parts are.
        unlike: what differs from the system.
        otherwise: name of the composition that stands in where a model's routers are no plain matrices.
        cache_options, predictor_options, prefetcher_options, precision_options: parameters of these parts.
    """

    cache: str
    scope: str = "layer"
    predictor: str = "none"
    ahead: int | None = None
    prefetcher: str | None = None
    precision: str | None = None
    scheduler: str | None = None
    batching: str | None = None
    exact: bool = True
    unlike: str = ""
    otherwise: str | None = None
    cache_options: Mapping[str, Any] = field(default_factory=dict)
    predictor_options: Mapping[str, Any] = field(default_factory=dict)
    prefetcher_options: Mapping[str, Any] = field(default_factory=dict)
    precision_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def left_out(self) -> str:
        """What an engine with slots in memory and one user leaves out of the system, in words."""
        notes = [self.unlike]
        if self.scheduler is not None:
            notes.append("its schedule needs a GPU tier: here its cache and prefetch run")
        if self.batching is not None:
            notes.append("its batching needs a server's queue")
        return "; ".join(note for note in notes if note)


COMPOSITIONS: dict[str, Composition] = {
    # HOBBIT's look ahead and a cache of recent uses; layer quotas and no forecasts while a prompt streams.
    "default": Composition(
        "phased",
        "global",
        "next-gate",
        2,
        "FirstMissing",
        otherwise="layer-lru",
        predictor_options={"most_tokens": 8, "least_precision": 0.5},
    ),
    "layer-lru": Composition("layer-lru"),
    "sida": Composition(
        "sida", "global", "sida", prefetcher="WholeSet", unlike="the router stays: the prediction is a hint"
    ),
    "moe-infinity": Composition("moe-infinity", "global", "trace-matching", prefetcher="AllLater"),
    "pre-gated": Composition(
        "lru", "layer", "pre-gate", 1, "WholeSet", unlike="the pre-gate is a hint; the paper executes it"
    ),
    "expertflow": Composition(
        "read-me", "global", "expertflow", prefetcher="Plec", batching="regroup", unlike="threshold 0.5"
    ),
    "fate": Composition(
        "fate", "layer", "next-gate", 1, "FatePrefetch", unlike="no INT4 and INT2 copies, hence exact"
    ),
    "hobbit": Composition(
        "hobbit",
        "global",
        "next-gate",
        3,
        "FirstMissing",
        precision="HobbitPrecision",
        exact=False,
        unlike="weights of the cache are equal, not fitted",
    ),
    "hobbit-exact": Composition(
        "hobbit",
        "global",
        "next-gate",
        3,
        "FirstMissing",
        unlike="misses always in full precision, none skipped",
    ),
    "hybrimoe": Composition("mrs", "layer", "next-gate", 3, "ByGain", scheduler="HybriMoESchedule"),
    "fiddler": Composition("static-hot", "global", scheduler="Fiddler"),
    "freetoken": Composition("lru", "global", scheduler="FreeTokenSchedule"),
    "read-me": Composition(
        "read-me", "global", "read-me", prefetcher="WholeSet", batching="ExpertAwareBatching"
    ),
    "towards-moe-deployment": Composition("buffering", batching="dispatch"),
    "se-moe": Composition("lru", scheduler="LayerRing", unlike="for prefill and large batches only"),
}
"""Systems by name."""

_PARTS = ("cache", "predictor", "prefetcher", "precision")
_PLAIN = ("scope", "ahead", "unlike")


def composition(name: str) -> Composition:
    """Return a composition by name.

    Raises:
        UsageError: the name is not known.
    """
    if name not in COMPOSITIONS:
        close = difflib.get_close_matches(name, COMPOSITIONS, n=1)
        nearest = f" (did you mean {close[0]!r}?)" if close else ""
        known = ", ".join(sorted(COMPOSITIONS))
        raise UsageError(
            f"no composition is called {name!r}{nearest}; choose one of {known}, or name a .yaml file"
        )
    return COMPOSITIONS[name]


def find_composition(text: str) -> Composition:
    """Return a composition by name, or read it from a ``.yaml`` or ``.yml`` file.

    Raises:
        UsageError: the name is not known, or the file is no composition.
    """
    if text.endswith((".yaml", ".yml")):
        return read_composition(Path(text).expanduser())
    return composition(text)


def require_exact(name: str, found: Composition) -> None:
    """Refuse a composition that changes the output.

    Raises:
        UsageError: names its exact part, and what allows the other one.
    """
    if not found.exact:
        part = f"its exact part is {name}-exact" if f"{name}-exact" in COMPOSITIONS else "leave precision out"
        raise UsageError(
            f"{name} computes some experts in a second, lower precision or not at all, which changes the "
            f"answers; {part}, or allow it with --mode mixed"
        )


def read_composition(path: Path) -> Composition:
    """Read a composition of one's own.

    Keys: ``like`` (a name to begin from; default ``layer-lru``, which reads nothing ahead), ``cache``,
    ``predictor``, ``prefetcher`` and ``precision`` (a name, or a mapping with ``name`` and the part's own
    parameters), ``scope``, ``ahead``, ``unlike``. Schedules and batching cannot be changed: they are not
    parts that every engine has.

    Raises:
        UsageError: the file cannot be read, or has another key or a value of the wrong kind.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({error}); name a YAML file or a composition") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    keys = ("like", *_PARTS, *_PLAIN)
    if not isinstance(data, dict) or not data:
        raise UsageError(f"{path} must hold lines such as 'cache: lfru'; its keys are {', '.join(keys)}")
    if unknown := [key for key in data if key not in keys]:
        raise UsageError(f"{path}: there is no key {unknown[0]!r}; the keys are {', '.join(keys)}")
    base = composition(str(data.get("like", "layer-lru")))
    changes: dict[str, Any] = {key: data[key] for key in _PLAIN if key in data}
    for part in _PARTS:
        if part in data:
            changes[part], changes[f"{part}_options"] = _named(path, part, data[part])
    found = replace(base, **changes)
    _check_kinds(path, found)
    return replace(found, exact=found.precision is None or make_precision(found).rule.exact)


def make_precision(found: Composition) -> "Mixed":
    """Return the rule and the storage of a composition's second precision.

    Raises:
        UsageError: there is no such rule, or a parameter is not known or out of its range.
    """
    from gangline.policies.precision.mixed import make_mixed

    assert found.precision is not None
    return make_mixed(found.precision, found.precision_options)


def _named(path: Path, part: str, value: Any) -> tuple[str | None, dict[str, Any]]:
    """Return name and parameters of ``cache: lru`` or ``cache: {name: lfru, window: 64}``."""
    if isinstance(value, dict):
        options = {str(key): item for key, item in value.items()}
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise UsageError(f"{path}: {part} needs a name, as in '{part}: {{name: NAME, KEY: VALUE}}'")
        return name, options
    if value is None and part != "cache":
        return ("none" if part == "predictor" else None), {}
    if not isinstance(value, str):
        raise UsageError(f"{path}: {part} must be a name or a mapping with one, not {value!r}")
    return value, {}


def _check_kinds(path: Path, found: Composition) -> None:
    if found.scope not in ("layer", "global"):
        raise UsageError(f"{path}: scope {found.scope!r} must be layer or global")
    if found.ahead is not None and (not isinstance(found.ahead, int) or found.ahead < 1):
        raise UsageError(f"{path}: ahead {found.ahead!r} must be a number of layers, at least 1")


def to_dict(found: Composition) -> dict[str, Any]:
    """Return plain data for JSON."""
    return {item.name: _plain(getattr(found, item.name)) for item in fields(found)}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value

"""Published systems as compositions of the parts in this package.

A composition is exact only if every part is. ``unlike`` says what of the system is left out so that it stays
exact, or because it lies elsewhere.
"""

from dataclasses import dataclass

from gangline.core.errors import UsageError


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


COMPOSITIONS: dict[str, Composition] = {
    "default": Composition("layer-lru"),
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
        "hobbit", "global", "next-gate", 3, "FirstMissing", precision="HobbitPrecision", exact=False
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


def composition(name: str) -> Composition:
    """Return a composition by name.

    Raises:
        UsageError: the name is not known.
    """
    if name not in COMPOSITIONS:
        known = ", ".join(sorted(COMPOSITIONS))
        raise UsageError(f"no composition is called {name!r}; choose one of {known}")
    return COMPOSITIONS[name]

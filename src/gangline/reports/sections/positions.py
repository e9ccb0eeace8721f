"""Section: does the place in a document matter?"""

from dataclasses import asdict
from itertools import pairwise

import numpy as np

from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section, Table, percent
from gangline.reports.study import Study
from gangline.traces.statistics.position import PositionEffects, position_effects

TITLE = "Does the place in a document matter?"
FACTOR = 1.0


def positions_section(study: Study) -> Section:
    """Report load by position and the drops of a capacity limit."""
    position_R = study.rows.tokens.position
    starts = [0, 1]
    while starts[-1] * 2 <= int(position_R.max()):
        starts.append(starts[-1] * 2)
    found = [
        position_effects(
            study.rows.layer(n),
            study.used(n),
            position_R,
            study.doc_R,
            np.array(starts),
            study.rng(7, n),
            FACTOR,
        )
        for n in study.layers
    ]
    mean = {
        name: np.mean([getattr(one, name) for one in found], axis=0)
        for name in ("distance", "distance_chance", "dropped", "dropped_chance")
    }
    early, late = mean["dropped"][: len(starts) // 2 + 1].mean(), mean["dropped"][-1]
    trend = (
        "so a limit hurts the end of a text most"
        if late > early + 0.02
        else "so a limit would not favour any place"
    )
    says = (
        f"The first token's experts differ from those of all others by {mean['distance'][0]:.2f} (0 the "
        f"same, 1 none in common; as many random tokens: {mean['distance_chance'][0]:.2f}). With room for "
        f"exactly the mean load per expert (capacity factor {FACTOR:g}), {percent(float(early))} of the "
        f"choices of early tokens and {percent(float(late))} of those from token {starts[-1]} on would be "
        f"dropped, {trend}. gangline itself drops nothing."
    )
    return Section(
        "positions",
        TITLE,
        says,
        "As many tokens of random positions; the limit filled in random order.",
        {"capacity_factor": FACTOR, "layers": [asdict(one) for one in found]},
        _pictures(starts, mean),
        [_table(starts, found, mean)],
        source="Drop towards the end: arXiv 2402.01739.",
    )


def _pictures(starts: list[int], mean: dict[str, np.ndarray]) -> list[Picture]:
    places, labels = [_at(start) for start in starts], [str(start) for start in starts]
    draw_distance = chart(
        "How the load of a position differs from the rest",
        "position in the document (from)",
        "distance (0 to 1)",
        _lines(starts, mean, "distance", "this position", "random tokens"),
        ticks=places,
        tick_labels=labels,
    )
    draw_drops = chart(
        f"What a capacity limit of {FACTOR:g} would drop",
        "position in the document (from)",
        "choices dropped",
        _lines(starts, mean, "dropped", "filled in order", "filled in random order"),
        shares=True,
        ticks=places,
        tick_labels=labels,
    )
    return [
        Picture("position_load", "Distance of the load by position", draw_distance, 3.5),
        Picture("position_drops", "Share of choices dropped by position", draw_drops, 3.5),
    ]


def _lines(starts: list[int], mean: dict[str, np.ndarray], name: str, label: str, chance: str) -> list[Line]:
    x = [_at(start) for start in starts]
    values = (mean[name].tolist(), mean[f"{name}_chance"].tolist())
    return [Line(label, x, values[0]), Line(chance, x, values[1], chance=True)]


def _at(start: int) -> float:
    """Bins double, so they stand at equal distances."""
    return 0.0 if start == 0 else float(np.log2(start)) + 1


def _table(starts: list[int], found: list[PositionEffects], mean: dict[str, np.ndarray]) -> Table:
    ends = [f"{a}" if b - a == 1 else f"{a} to {b - 1}" for a, b in pairwise(starts)]
    rows = [
        [name, found[0].tokens[n], f"{mean['distance'][n]:.3f}", f"{mean['distance_chance'][n]:.3f}"]
        + [percent(float(mean[key][n]), 1) for key in ("dropped", "dropped_chance")]
        for n, name in enumerate([*ends, f"from {starts[-1]}"])
    ]
    head = ["position", "tokens", "distance", "random", "dropped", "random order"]
    return Table("By position, mean over layers", head, rows)

"""Section: is the work spread evenly over the experts?"""

from dataclasses import asdict
from typing import Any

import numpy as np

from gangline.reports.figure import COLOURS, GREY, Line, chart, heat, legend_below
from gangline.reports.section import Draw, Picture, Section, Table, percent
from gangline.reports.study import Study
from gangline.traces.rows import Array
from gangline.traces.statistics.load import ExpertLoad, expert_load, violation_by_document

SOURCE = "MaxVio: arXiv 2408.15664."


def load_section(study: Study) -> Section:
    """Report load, evenness and idle experts."""
    counts = [study.load(layer) for layer in study.layers]
    found = [expert_load(counts_N, study.rng(1, n)) for n, counts_N in enumerate(counts)]
    within = (
        [violation_by_document(study.used(n), study.doc_R) for n in study.layers] if study.trace else None
    )
    dead = sum(load.dead for load in found)
    experts = sum(study.header.experts)
    violation = float(np.mean([load.max_violation for load in found]))
    null = float(np.mean([load.max_violation_null.high for load in found]))
    uneven = sum(load.max_violation > load.max_violation_null.high for load in found)
    says = (
        f"The busiest expert of a layer has {1 + violation:.1f} times the mean load on average; chance "
        f"alone would give at most {1 + null:.2f} times. {uneven} of {len(found)} layers are more uneven "
        f"than chance. {dead} of {experts} experts were never used (chance: "
        f"{sum(x.dead_null for x in found):.1f})."
    )
    lacks = [] if study.trace else ["Evenness within documents needs single tokens: record with --mode ids."]
    return Section(
        "load",
        "Is the work spread evenly?",
        says,
        "As many choices, every expert equally likely.",
        {"layers": [asdict(load) for load in found], "max_violation_within_documents": within},
        [
            Picture("load_map", "Heat map of each layer's experts, busiest on top", _map(counts), 4.2),
            Picture("load_violation", "MaxVio of each layer beside chance", _violation(found, within)),
            Picture("load_lorenz", "Lorenz curves of three layers", _lorenz(counts), 3.6),
        ],
        [_table(found, within)],
        lacks,
        SOURCE,
    )


def _map(counts: list[Array]) -> Draw:
    most = max(len(counts_N) for counts_N in counts)
    values = np.full((most, len(counts)), np.nan)
    for layer, counts_N in enumerate(counts):
        values[: len(counts_N), layer] = np.log2(np.sort(np.maximum(counts_N, 0.5)) / counts_N.mean())
    limit = min(4.0, float(np.nanmax(np.abs(values))))
    return heat(
        "Load of every expert",
        "MoE layer",
        "experts, sorted by load",
        values,
        "load over the layer's mean (log2: +1 is twice)",
        low=-limit,
        high=limit,
    )


def _violation(found: list[ExpertLoad], within: list[float] | None) -> Draw:
    layers = list(range(len(found)))
    nulls = [load.max_violation_null for load in found]
    lines = [Line("all texts", layers, [load.max_violation for load in found])]
    if within is not None:
        lines.append(Line("within a document", layers, within))
    lines.append(
        Line(
            "chance (95%)",
            layers,
            [n.mean for n in nulls],
            [n.low for n in nulls],
            [n.high for n in nulls],
            True,
        )
    )
    return chart("How far the busiest expert is above the mean", "MoE layer", "MaxVio (0 = even)", lines)


def _lorenz(counts: list[Array]) -> Draw:
    picked = sorted({0, len(counts) // 2, len(counts) - 1})

    def draw(axes: Any) -> None:
        for number, layer in enumerate(picked):
            ordered = np.sort(counts[layer]) / counts[layer].sum()
            share = np.concatenate([[0], np.cumsum(ordered)])
            style = ("-", "--", "-.")[number]
            axes.plot(
                np.linspace(0, 1, len(share)), share, style, color=COLOURS[number], label=f"layer {layer}"
            )
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 2)), label="all equal")
        axes.set_title("How much of the work the least used experts do")
        axes.set_xlabel("share of experts, least used first")
        axes.set_ylabel("share of choices")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")
        legend_below(axes, 4)

    return draw


def _table(found: list[ExpertLoad], within: list[float] | None) -> Table:
    head = [
        "layer",
        "MaxVio",
        "chance up to",
        "within documents",
        "Gini",
        "entropy",
        "never used",
        "below 10%",
    ]
    rows = [
        [
            layer,
            f"{load.max_violation:.2f}",
            f"{load.max_violation_null.high:.2f}",
            "-" if within is None else f"{within[layer]:.2f}",
            f"{load.gini:.2f}",
            percent(load.entropy, 1),
            load.dead,
            load.cold,
        ]
        for layer, load in enumerate(found)
    ]
    return Table("Load by layer (entropy: of the loads, 100% = even)", head, rows)

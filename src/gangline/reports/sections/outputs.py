"""Section: which experts must not be touched?"""

from dataclasses import asdict
from typing import Any

import numpy as np

from gangline.reports.figure import COLOURS, GREY, legend_below
from gangline.reports.section import Draw, Picture, Section, Table
from gangline.reports.study import Study
from gangline.traces.expert_outputs import ExpertOutputs
from gangline.traces.statistics.super_experts import SuperExpert, SuperExperts, super_experts

TITLE = "Which experts must not be touched?"


def outputs_section(study: Study) -> Section:
    """Report super experts, where outputs were measured."""
    outputs = study.outputs
    if outputs is None:
        lack = (
            "Super experts show in the size of their outputs, which no trace holds: --outputs loads the "
            "model of the trace and measures them on its texts."
        )
        return Section("super_experts", TITLE, lacks=[lack])
    peaks = [np.array(layer) for layer in outputs.peaks]
    found = super_experts(peaks, outputs.shared, outputs.depth, outputs.decoder_layers)
    if found is None:
        return Section(
            "super_experts", TITLE, lacks=["No MoE layer in the first three quarters of the model."]
        )
    unused = int(sum(np.isnan(layer).sum() for layer in peaks))
    says = "No expert's outputs stand out so far that the rule calls it super."
    if found.found:
        names = ", ".join(f"{_name(one)} ({one.output:,.0f})" for one in found.found[:5])
        many = "One super expert" if len(found.found) == 1 else f"{len(found.found)} super experts"
        says = f"{many}: {names}. Never prune them, and keep them at the highest precision."
    numbers = {**asdict(found), "tokens": outputs.tokens, "peaks": outputs.peaks, "shared": outputs.shared}
    lacks = [f"{unused} experts were not used by the {outputs.tokens:,} tokens measured."] if unused else []
    rows = [[e.layer, "shared" if e.expert < 0 else e.expert, f"{e.output:.1f}"] for e in found.found]
    first, second = found.percentile_threshold, found.tenth_threshold
    thresholds = f"{first:,.1f} (99.5th percentile) and {second:,.1f} (a tenth of the maximum)"
    return Section(
        "super_experts",
        TITLE,
        says,
        f"Both thresholds must be exceeded: {thresholds}; only the first three quarters of the layers count.",
        numbers,
        [Picture("super_experts", "Largest output of every expert by layer", _scatter(outputs, found), 3.6)],
        [Table("Super experts", ["layer", "expert", "largest output"], rows)] if rows else [],
        lacks,
        "arXiv 2507.23279.",
    )


def _name(one: SuperExpert) -> str:
    return f"{'the shared expert' if one.expert < 0 else f'expert {one.expert}'} of layer {one.layer}"


def _scatter(outputs: ExpertOutputs, found: SuperExperts) -> Draw:
    def draw(axes: Any) -> None:
        x = np.concatenate([np.full(len(layer), n) for n, layer in enumerate(outputs.peaks)])
        y = np.concatenate([np.array(layer) for layer in outputs.peaks])
        axes.scatter(x, y, s=9, color=COLOURS[0], alpha=0.6, label="an expert", linewidths=0)
        if found.found:
            mine = [(e.layer, e.output) for e in found.found]
            axes.scatter(*zip(*mine, strict=True), s=40, marker="s", color=COLOURS[1], label="super")
        level = max(found.percentile_threshold, found.tenth_threshold)
        axes.axhline(level, color=GREY, linestyle=(0, (4, 2)), label="threshold")
        axes.axvspan(
            found.layers - 0.5, len(outputs.peaks) - 0.5, color="#000000", alpha=0.06, label="not counted"
        )
        axes.set_yscale("log")
        axes.set_title("Largest output of every expert")
        axes.set_xlabel("MoE layer")
        axes.set_ylabel("largest |output| (log)")
        legend_below(axes, 4)

    return draw

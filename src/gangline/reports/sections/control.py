"""Section: is it more than similar inputs?"""

from dataclasses import asdict

import numpy as np

from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section, percent
from gangline.reports.study import Study
from gangline.traces.statistics.hidden_control import hidden_control

TITLE = "Is it more than similar inputs?"


def control_section(study: Study) -> Section:
    """Report the hidden-state control."""
    if study.rows.layer(0).inputs_RD is None:
        lack = "The control needs the routers' inputs: record with --inputs (all traces; large)."
        return Section("hidden_control", TITLE, lacks=[lack])
    found = []
    for n in study.layers:
        inputs_RD = study.rows.layer(n).inputs_RD
        assert inputs_RD is not None
        found.append(hidden_control(study.used(n), inputs_RD, study.group_R, study.rng(10, n)))
    layers = list(study.layers)
    explained = float(np.mean([f.explained for f in found]))
    says = f"How alike two tokens' inputs are explains {percent(explained)} of how many experts they share."
    lines = [Line("explained by the inputs", layers, [f.explained for f in found])]
    if found[0].other is not None:
        plain = float(np.mean([f.same - (f.other or 0.0) for f in found]))
        rest = float(np.mean([(f.same_residual or 0.0) - (f.other_residual or 0.0) for f in found]))
        says += (
            f" Tokens of one group share {percent(plain, 1)} more of their experts than tokens of two; at "
            f"equal similarity of inputs {percent(rest, 1)} is left of that."
        )
        lines.append(Line("more within a group", layers, [f.same - (f.other or 0.0) for f in found]))
        rests = [(f.same_residual or 0.0) - (f.other_residual or 0.0) for f in found]
        lines.append(Line("of it left at equal inputs", layers, rests))
    draw = chart("Routing beside its inputs", "MoE layer", "share", lines, shares=True, bottom=None)
    return Section(
        "hidden_control",
        TITLE,
        says,
        "Routing that follows from the inputs leaves nothing.",
        {"layers": [asdict(f) for f in found]},
        [Picture("hidden_control", "Routing overlap explained by input similarity", draw, 3.6)],
    )

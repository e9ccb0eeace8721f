"""Section: how sure are the routers?"""

from dataclasses import asdict

import numpy as np

from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section, percent
from gangline.reports.study import Study
from gangline.traces.statistics.router_entropy import router_entropy

TITLE = "How sure are the routers?"


def certainty_section(study: Study) -> Section:
    """Report the entropy of the routers' scores."""
    if study.rows.layer(0).logits_RN is None:
        lack = "The routers' entropy needs their logits: record with --logits (all traces)."
        return Section("router_entropy", TITLE, lacks=[lack])
    found = []
    for layer in study.layers:
        scores_RN = study.rows.scores(layer)
        assert scores_RN is not None
        found.append(router_entropy(scores_RN, study.used(layer)))
    layers = list(study.layers)
    says = (
        f"On average a router's best expert has {percent(float(np.mean([f.first for f in found])))} of the "
        f"score and the chosen ones together {percent(float(np.mean([f.kept for f in found])))}; a router "
        f"that does not care would give {percent(float(np.mean([f.kept_uniform for f in found])))}. What is "
        "not kept is thrown away, so layers with little kept are those where another choice would matter "
        "least."
    )
    lines = [
        Line("entropy (1 = does not care)", layers, [f.entropy for f in found]),
        Line("kept by the chosen experts", layers, [f.kept for f in found]),
        Line("best expert", layers, [f.first for f in found]),
        Line("kept, uniform router", layers, [f.kept_uniform for f in found], chance=True),
    ]
    draw = chart("Certainty of the routers", "MoE layer", "share of the score", lines, shares=True, top=1.0)
    return Section(
        "router_entropy",
        TITLE,
        says,
        "A router whose scores are all equal.",
        {"layers": [asdict(f) for f in found]},
        [Picture("router_certainty", "Entropy and score shares by layer", draw)],
    )

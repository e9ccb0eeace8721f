"""Section: how early in training is the routing settled?"""

from dataclasses import asdict

import numpy as np

from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section, Table, percent
from gangline.reports.study import Study
from gangline.traces import Trace
from gangline.traces.rows import Array
from gangline.traces.statistics.membership import first_choice, used
from gangline.traces.statistics.saturation import Saturation, saturation

TITLE = "How early in training is the routing settled?"


def training_section(study: Study) -> Section:
    """Report router saturation over checkpoints."""
    if not study.earlier:
        lack = (
            "One checkpoint only: give the traces of several, oldest first, on the same texts (and name "
            "the model or its --revision differently)."
        )
        return Section("training", TITLE, lacks=[lack])
    found: dict[str, list[Saturation]] = {}
    lacks = []
    for name, trace in study.earlier.items():
        rows = common_rows(trace, study.rows)
        if rows is None:
            lacks.append(f"{name}: no text in common with the last checkpoint's traces.")
            continue
        found[name] = [_compare(study, trace, layer, *rows) for layer in study.layers]
    if not found:
        return Section("training", TITLE, lacks=lacks)
    mean = {name: float(np.mean([one.saturation for one in layers])) for name, layers in found.items()}
    churn = {name: float(np.mean([one.churn for one in layers])) for name, layers in found.items()}
    first = next(iter(found))
    says = (
        f"At {first} a token already used {percent(mean[first])} of the experts that it uses at the last "
        f"checkpoint (chance {percent(study.chance)}), and {percent(churn[first])} of the token ids had "
        "another favourite first choice."
    )
    lines = [
        Line(name, list(study.layers), [one.saturation for one in layers]) for name, layers in found.items()
    ]
    chance = next(iter(found.values()))
    lines.append(Line("chance (K/N)", list(study.layers), [one.chance for one in chance], chance=True))
    draw = chart(
        "Experts in common with the last checkpoint", "MoE layer", "share", lines[-7:], shares=True, top=1.0
    )
    rows_ = [
        [name, percent(mean[name], 1), percent(study.chance, 1), percent(churn[name], 1)] for name in found
    ]
    return Section(
        "training",
        TITLE,
        says,
        "Two unrelated routers: K/N.",
        {name: [asdict(one) for one in layers] for name, layers in found.items()},
        [Picture("saturation", "Router saturation by layer and checkpoint", draw, 3.6)],
        [
            Table(
                "Mean over layers", ["checkpoint", "in common", "chance", "ids with another favourite"], rows_
            )
        ],
        lacks,
        "Router saturation: arXiv 2409.02060. Early routing learning: arXiv 2402.01739.",
    )


def common_rows(one: Trace, other: Trace) -> tuple[Array, Array] | None:
    """Return the rows of two traces that hold the same positions of the same texts; None if there are "
    "none."""
    places = []
    for trace in (one, other):
        texts = {document.number: document.sha256 for document in trace.documents}
        pairs = zip(trace.tokens.doc.tolist(), trace.tokens.position.tolist(), strict=True)
        places.append({(texts[doc], position): row for row, (doc, position) in enumerate(pairs)})
    common = [(row, places[1][key]) for key, row in places[0].items() if key in places[1]]
    if not common:
        return None
    pairs_P2 = np.array(common)
    return pairs_P2[:, 0], pairs_P2[:, 1]


def _compare(study: Study, trace: Trace, layer: int, earlier: Array, last: Array) -> Saturation:
    before, after = trace.layer(layer).take(earlier), study.rows.layer(layer).take(last)
    experts = study.header.layers[layer].experts
    return saturation(
        used(before, experts),
        used(after, experts),
        first_choice(before),
        first_choice(after),
        study.rows.tokens.input_id[last],
    )

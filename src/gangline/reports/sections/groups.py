"""Section: do different texts use different experts?"""

from dataclasses import asdict
from itertools import combinations

import numpy as np

from gangline.reports.figure import Line, bars, chart
from gangline.reports.section import Picture, Section, Table, percent
from gangline.reports.study import Study
from gangline.traces.statistics.specialisation import Matched, Specialisation, matched, specialisation
from gangline.traces.statistics.spread import discoveries

TITLE = "Do different texts use different experts?"
DRAWS = 500
_PAIRS = 6
SOURCE = "Definition as in arXiv 2409.02060; the comparison on shared tokens is ours."


def groups_section(study: Study) -> Section:
    """Report the affinity of experts for groups of texts."""
    if len(study.groups) < 2:
        lack = (
            "One group of texts only: give traces of several domains or languages, or label their documents."
        )
        return Section("groups", TITLE, lacks=[lack])
    counts = np.bincount(study.group_D, minlength=len(study.groups))
    if (counts < 2).any():
        few = ", ".join(name for name, n in zip(study.groups, counts, strict=True) if n < 2)
        lack = f"Groups are compared over documents, and {few} has fewer than two: record more documents."
        return Section("groups", TITLE, lacks=[lack])
    found = [
        specialisation(study.used(n), study.doc_R, study.group_D, study.rng(3, n), DRAWS)
        for n in study.layers
    ]
    pairs = {pair: _pair(study, *pair) for pair in combinations(range(len(study.groups)), 2)}
    real = discoveries(np.array([one.null.p_value for one in found]))
    strongest = int(np.argmax([one.divergence for one in found]))
    mean = float(np.mean([one.divergence for one in found]))
    says = (
        f"In {int(real.sum())} of {len(found)} layers the groups ({', '.join(study.groups)}) use the "
        f"experts differently, beyond chance at a false discovery rate of 5%. Layer {strongest} parts them "
        f"most. 0 would be no difference and 1 no expert in common; the mean is {mean:.3f}. "
        f"{_matched_says(study, pairs)}"
    )
    numbers = {
        "kind": study.group_kind,
        "groups": study.groups,
        "documents": counts.tolist(),
        "layers": [asdict(one) for one in found],
        "discovered_layers": np.flatnonzero(real).tolist(),
        "matched": [
            {"groups": [study.groups[a], study.groups[b]], "layers": [one and asdict(one) for one in layers]}
            for (a, b), layers in pairs.items()
        ],
    }
    return Section(
        "groups",
        TITLE,
        says,
        "Groups dealt out to the documents anew (documents, not tokens, are what varies). On shared "
        "tokens: groups dealt out among the occurrences of each token.",
        numbers,
        [_divergence(found), _bars(study, found[strongest], strongest), _matched_picture(study, pairs)],
        [_table(study, found[strongest], strongest)],
        source=SOURCE,
    )


def _pair(study: Study, a: int, b: int) -> list[Matched | None]:
    rows = np.isin(study.group_R, (a, b))
    token_R = study.rows.tokens.input_id[rows]
    group_R = (study.group_R[rows] == b).astype(np.int64)
    return [matched(study.used(n)[rows], token_R, group_R, study.rng(4, a, b, n), 10) for n in study.layers]


def _matched_says(study: Study, pairs: dict[tuple[int, int], list[Matched | None]]) -> str:
    known = {pair: [one for one in layers if one] for pair, layers in pairs.items()}
    known = {pair: layers for pair, layers in known.items() if layers}
    if not known:
        return "The groups share no token, so nothing can be said apart from their vocabulary."
    all_layers = [one for layers in known.values() for one in layers]
    value = float(np.mean([one.divergence for one in all_layers]))
    chance = float(np.mean([one.null.mean for one in all_layers]))
    return (
        f"Compared on the same tokens only, {value:.3f} is left (chance {chance:.3f}): that much is not a "
        "matter of different words."
    )


def _divergence(found: list[Specialisation]) -> Picture:
    layers = list(range(len(found)))
    nulls = [one.null for one in found]
    lines = [
        Line(
            "groups (95%)",
            layers,
            [f.divergence for f in found],
            [f.low for f in found],
            [f.high for f in found],
        ),
        Line(
            "chance (95%)",
            layers,
            [n.mean for n in nulls],
            [n.low for n in nulls],
            [n.high for n in nulls],
            True,
        ),
    ]
    draw = chart("How differently the groups route", "MoE layer", "Jensen-Shannon divergence (bits)", lines)
    return Picture("groups_divergence", "Divergence between groups of texts by layer, beside chance", draw)


def _bars(study: Study, found: Specialisation, layer: int) -> Picture:
    shares = np.array(found.shares)
    order = np.argsort(-np.ptp(shares, axis=0))[:8]
    draw = bars(
        f"Layer {layer}: the experts that part the groups most",
        "share of the group's tokens",
        [f"{n}" for n in order],
        shares[:, order].tolist(),
        study.groups,
        study.header.layers[layer].top_k / study.header.layers[layer].experts,
    )
    return Picture("groups_experts", "Share of each group's tokens that use an expert", draw, 3.6)


def _matched_picture(study: Study, pairs: dict[tuple[int, int], list[Matched | None]]) -> Picture:
    lines = []
    for (a, b), layers in pairs.items():
        known = [n for n, one in enumerate(layers) if one is not None]
        if known:
            y = [layers[n].divergence for n in known]  # type: ignore[union-attr]
            lines.append(Line(f"{study.groups[a]} / {study.groups[b]}", known, y))
    lines.sort(key=lambda line: -float(np.mean([y for y in line.y if y is not None])))
    shown, title = lines[:_PAIRS], "The same on shared tokens only"
    if len(lines) > _PAIRS:
        title += f" ({_PAIRS} largest of {len(lines)})"
    layers_null = [
        [one.null.high for layers in pairs.values() if (one := layers[n]) is not None] for n in study.layers
    ]
    if all(layers_null):
        chance = [float(max(highs)) for highs in layers_null]
        shown = [*shown, Line("chance, highest 97.5%", list(study.layers), chance, chance=True)]
    draw = chart(title, "MoE layer", "divergence (bits)", shown)
    return Picture("groups_matched", "Divergence of pairs of groups on the tokens that both hold", draw, 3.7)


def _table(study: Study, found: Specialisation, layer: int) -> Table:
    shares = np.array(found.shares)
    order = np.argsort(-np.ptp(shares, axis=0))[:12]
    rows = [[int(n), *(percent(shares[g, n], 1) for g in range(len(study.groups)))] for n in order]
    return Table(f"Layer {layer}: share of tokens that use an expert", ["expert", *study.groups], rows)

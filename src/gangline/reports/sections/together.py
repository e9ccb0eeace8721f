"""Section: which experts work together, in a layer and from one to the next?"""

from dataclasses import asdict
from typing import Any

import numpy as np

from gangline.reports.figure import Line, chart, heat
from gangline.reports.section import Draw, Picture, Section, Table, percent
from gangline.reports.study import Study
from gangline.traces.rows import Array
from gangline.traces.statistics.coactivation import Coactivation, coactivation, lift
from gangline.traces.statistics.membership import first_choice
from gangline.traces.statistics.repetition import Repetition, repetition
from gangline.traces.statistics.transition import Transition, transition

MOST_NAMES = 32
ROWS = 4096
"""Tokens on which slots are shuffled: the null repeats the count many times."""


def together_section(study: Study) -> Section:
    """Report co-activation, transitions between layers, and repetition from token to token."""
    rng = study.rng(2)
    rows = np.sort(rng.choice(len(study.rows), size=min(ROWS, len(study.rows)), replace=False))
    pairs = [
        coactivation(study.rows.layer(n).take(rows), layer.experts, rng, draws=10)
        if layer.top_k > 1
        else None
        for n, layer in enumerate(study.header.layers)
    ]
    moves = [transition(study.used(n)[rows], study.used(n + 1)[rows], rng, 5) for n in study.layers[:-1]]
    repeats = (
        repetition(first_choice(study.rows.layer(n)), study.used(n), study.doc_R, rng) for n in study.layers
    )
    again = [one for one in repeats if one is not None]
    numbers: dict[str, Any] = {
        "tokens": len(rows),
        "coactivation": [None if one is None else asdict(one) for one in pairs],
        "transition": [asdict(one) for one in moves],
        "repetition": [asdict(one) for one in again],
    }
    return Section(
        "together",
        "Which experts work together?",
        _says(pairs, moves, again),
        "Pairs: slots shuffled between tokens, loads kept. Layers: tokens permuted. Repetition: tokens in "
        "random order.",
        numbers,
        _pictures(pairs, moves, again, len(rows)),
        [table for table in (_pairs_table(pairs), _repetition_table(again)) if table.rows],
        [] if any(pairs) else ["With one expert per token there is no co-activation."],
        "Repetition: arXiv 2401.04088.",
    )


def _says(pairs: list[Coactivation | None], moves: list[Transition], again: list[Repetition]) -> str:
    some = [one for one in pairs if one is not None]
    text = ""
    if some:
        text = (
            f"{percent(float(np.mean([one.excess for one in some])))} of the pairs of experts that a token "
            "uses are not explained by how busy each is (chance: "
            f"{percent(float(np.mean([o.null.high for o in some])), 1)}). "
        )
    if again:
        overlap = float(np.mean([one.overlap for one in again]))
        chance = float(np.mean([one.overlap_chance for one in again]))
        text += f"A token shares {percent(overlap)} of its experts with the one before; in random order "
        text += f"{percent(chance)}."
    if moves:
        share = float(np.mean([move.share for move in moves]))
        text += (
            f" Knowing an expert tells {percent(share)} of what there is to know about one of the next layer."
        )
    return text


def _pictures(
    pairs: list[Coactivation | None], moves: list[Transition], again: list[Repetition], tokens: int
) -> list[Picture]:
    made = []
    known = [n for n, one in enumerate(pairs) if one is not None]
    if known:
        strongest = max(known, key=lambda n: pairs[n].excess)  # type: ignore[union-attr]
        one = pairs[strongest]
        assert one is not None
        made.append(
            Picture("coactivation", "Lift of all pairs of one layer", _matrix(strongest, one, tokens), 4.4)
        )
        nulls = [pairs[n].null for n in known]  # type: ignore[union-attr]
        lines = [
            Line("pairs beyond their loads", known, [pairs[n].excess for n in known]),  # type: ignore[union-attr]
            Line(
                "chance (95%)",
                known,
                [n.mean for n in nulls],
                [n.low for n in nulls],
                [n.high for n in nulls],
                True,
            ),
        ]
        draw = chart("Co-activation beyond loads", "MoE layer", "share of pairs", lines, shares=True)
        made.append(Picture("coactivation_layers", "Co-activation of each layer beside chance", draw))
    if again:
        layers = list(range(len(again)))
        lines = [
            Line("same first choice", layers, [a.first for a in again]),
            Line("shared experts", layers, [a.overlap for a in again]),
            Line("same first choice, by chance", layers, [a.first_chance for a in again], chance=True),
        ]
        draw = chart("What a token takes over from the one before", "MoE layer", "share", lines, shares=True)
        made.append(Picture("repetition", "Repetition of experts from token to token", draw))
    if moves:
        layers = list(range(len(moves)))
        lines = [
            Line("bits about the next layer", layers, [m.information for m in moves]),
            Line("chance", layers, [m.null.mean for m in moves], chance=True),
        ]
        draw = chart(
            "What an expert tells about the next layer", "MoE layer", "mutual information (bits)", lines
        )
        made.append(Picture("transition", "Mutual information between neighbouring layers", draw))
    return made


def _matrix(layer: int, found: Coactivation, tokens: int) -> Draw:
    together = np.array(found.together)
    value = np.log2(np.maximum(lift(together, tokens), 2.0**-4))
    np.fill_diagonal(value, np.nan)
    order = clustered(np.nan_to_num(value))
    limit = min(4.0, float(np.nanmax(np.abs(value))))
    return heat(
        f"Layer {layer}: which experts go together",
        "expert (alike ones side by side)",
        "expert",
        value[np.ix_(order, order)],
        "lift (log2: +1 is twice as often as their loads say)",
        low=-limit,
        high=limit,
        names=[str(n) for n in order] if len(order) <= MOST_NAMES else None,
    )


def clustered(similarity_NN: Array) -> list[int]:
    """Return an order in which each row stands beside the row most like it among those left."""
    left = list(range(len(similarity_NN)))
    start = int(similarity_NN.sum(axis=1).argmax())
    order = [start]
    left.remove(start)
    while left:
        best = max(left, key=lambda n: (similarity_NN[order[-1], n], -n))
        order.append(best)
        left.remove(best)
    return order


def _pairs_table(pairs: list[Coactivation | None]) -> Table:
    all_pairs = [(n, pair) for n, one in enumerate(pairs) if one is not None for pair in one.pairs]
    all_pairs.sort(key=lambda item: -item[1].deviations)
    rows = [
        [n, f"{p.first} and {p.second}", p.together, f"{p.lift:.1f}", f"{p.deviations:.0f}"]
        for n, p in all_pairs[:12]
    ]
    head = ["layer", "experts", "tokens", "lift", "standard deviations above chance"]
    return Table("The strongest pairs", head, rows)


def _repetition_table(again: list[Repetition]) -> Table:
    rows = [
        [
            n,
            *(
                percent(v, 1)
                for v in (a.first, a.first_chance, a.any, a.any_chance, a.overlap, a.overlap_chance)
            ),
        ]
        for n, a in enumerate(again)
    ]
    head = ["layer", "same first", "chance", "any in common", "chance", "overlap", "chance"]
    return Table("From one token to the next", head, rows)

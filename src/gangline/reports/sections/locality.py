"""Section: does a text stay with its experts for a while?"""

from dataclasses import asdict
from typing import Any

import numpy as np

from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section, Table, percent
from gangline.reports.study import Study, sample
from gangline.traces.rows import Array
from gangline.traces.statistics import segment_cache
from gangline.traces.statistics.consistency import WINDOWS, SegmentRouting, segment_routing, window_counts
from gangline.traces.statistics.membership import used

TITLE = "Does a text stay with its experts?"
SCH_TOKENS = 1024
SCH_WINDOW = 16
RHOS = (1, 2, 3)


def locality_section(study: Study) -> Section:
    """Report SRP, rho_hat and SCH."""
    longest = int(np.bincount(study.doc_R).max())
    windows = [m for m in WINDOWS if m <= longest]
    if not windows:
        return Section("locality", TITLE, lacks=[f"No document has {WINDOWS[0]} tokens: record longer ones."])
    order = study.rng(11).permutation(len(study.rows))
    model, null, by_layer = {}, {}, {}
    for m in windows:
        counts = [window_counts(study.used(n), study.doc_R, m)[0] for n in study.layers]
        chance = [window_counts(study.used(n)[order], study.doc_R, m)[0] for n in study.layers]
        model[m] = segment_routing(np.sum(counts, axis=0), study.rng(12, m))
        null[m] = segment_routing(np.sum(chance, axis=0))
        by_layer[m] = [
            (segment_routing(one), segment_routing(other)) for one, other in zip(counts, chance, strict=True)
        ]
    known = [m for m in windows if model[m] is not None and null[m] is not None]
    lacks = [
        f"SRP({m}) needs documents of {m} tokens: record longer ones." for m in WINDOWS if m not in known
    ]
    cache, cached_tokens = _segment_cache(study)
    numbers: dict[str, Any] = {
        "srp": [{**asdict(model[m]), "chance": asdict(null[m])} for m in known],  # type: ignore[arg-type]
        "srp_layers": {m: [[one and asdict(one) for one in pair] for pair in by_layer[m]] for m in known},
        "sch": cache,
        "sch_tokens": cached_tokens,
    }
    return Section(
        "locality",
        TITLE,
        _says(model, null, known),
        "The same tokens in random order. SCH knows the coming tokens but is no upper bound; Belady's "
        "cache in the section above is.",
        numbers,
        _pictures(study, model, null, by_layer, known),
        [_table(model, null, known), _cache_table(cache, cached_tokens)],
        lacks,
        "arXiv 2505.16056.",
    )


Found = dict[int, SegmentRouting | None]


def _says(model: Found, null: Found, known: list[int]) -> str:
    m = 16 if 16 in known else known[-1]
    mine, chance = model[m], null[m]
    assert mine is not None and chance is not None
    gain = mine.srp - chance.srp
    verdict = (
        "Much more: what was just used is used again, and caches will profit."
        if gain > 0.1
        else "A little more: a cache profits from the loads, less from the moment."
        if gain > 0.03
        else "No more: a cache can profit from the loads at most."
    )
    return (
        f"Fixing the experts of {m} tokens at a time would serve {percent(mine.srp, 1)} (F1, SRP({m})) of "
        f"what they use, and run {mine.rho_hat:.2f} experts for each that is used; with the tokens in "
        f"random order it is {percent(chance.srp, 1)}. {verdict} Published models have SRP(16) between 19% "
        "(Switch) and 78% (LLaMA-MoE-v2); OLMoE 51%, Mixtral-8x7B 49%. Compare models at the same K/N only."
    )


def _segment_cache(study: Study) -> tuple[list[dict[str, Any]], int]:
    """SCH in both definitions, over all layers of the same size; on a part of the tokens."""
    part = sample(study.rows, study.group_kind, SCH_TOKENS)
    doc_R = part.tokens.doc
    tables: dict[tuple[int, int], list[Array]] = {}
    for number, layer in enumerate(study.header.layers):
        tables.setdefault((layer.experts, layer.top_k), []).append(used(part.layer(number), layer.experts))
    found = []
    for rho in RHOS:
        totals = np.zeros(4, dtype=np.int64)
        for (_, top_k), parts in tables.items():
            totals[:2] += segment_cache.sliding(np.stack(parts), doc_R, SCH_WINDOW, rho * top_k)
            for one in parts:
                totals[2:] += segment_cache.windows(one, doc_R, SCH_WINDOW, rho * top_k)
        rates = [int(a) / int(b) if b else None for a, b in (totals[:2], totals[2:])]
        share = float(np.mean([min(1, rho * layer.top_k / layer.experts) for layer in study.header.layers]))
        found.append(
            {"rho": rho, "window": SCH_WINDOW, "sliding": rates[0], "windows": rates[1], "resident": share}
        )
    return found, len(part)


def _pictures(
    study: Study, model: Found, null: Found, by_layer: dict[int, Any], known: list[int]
) -> list[Picture]:
    mine = [model[m] for m in known]
    lines = [
        Line(
            "this text (95%)",
            known,
            [one.srp for one in mine if one],
            [one.low or one.srp for one in mine if one],
            [one.high or one.srp for one in mine if one],
        ),
        Line("tokens in random order", known, [one.srp for m in known if (one := null[m])], chance=True),
    ]
    draw = chart(
        "Segment routing best performance",
        "window m (tokens)",
        "SRP(m)",
        lines,
        shares=True,
        log_x=True,
        ticks=known,
    )
    made = [Picture("srp", "SRP over window length beside chance", draw)]
    m = 16 if 16 in known else known[-1]
    layers = [n for n, pair in enumerate(by_layer[m]) if all(pair)]
    lines = [
        Line("this text", layers, [by_layer[m][n][0].srp for n in layers]),
        Line("tokens in random order", layers, [by_layer[m][n][1].srp for n in layers], chance=True),
    ]
    draw = chart(f"SRP({m}) of each layer", "MoE layer", f"SRP({m})", lines, shares=True)
    return [*made, Picture("srp_layers", f"SRP({m}) by layer beside chance", draw)]


def _table(model: Found, null: Found, known: list[int]) -> Table:
    rows = []
    for m in known:
        mine, chance = model[m], null[m]
        assert mine is not None and chance is not None
        interval = f"{percent(mine.low, 1)} to {percent(mine.high, 1)}"
        rows.append(
            [m, percent(mine.srp, 1), interval, percent(chance.srp, 1), f"{mine.rho_hat:.2f}", mine.alpha]
        )
    head = ["window m", "SRP", "95%", "random order", "rho_hat", "alpha"]
    return Table("Whole model (rho_hat: experts run for each that is used)", head, rows)


def _cache_table(cache: list[dict[str, Any]], tokens: int) -> Table:
    rows = [
        [row["rho"], percent(row["resident"]), percent(row["sliding"], 1), percent(row["windows"], 1)]
        for row in cache
    ]
    caption = (
        f"SCH({SCH_WINDOW}, rho): rho times K slots a layer, {SCH_WINDOW} tokens ahead; {tokens:,} tokens"
    )
    return Table(caption, ["rho", "of all experts", "hits, sliding", "hits, windows"], rows)

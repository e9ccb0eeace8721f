"""Section: do two languages meet in the same experts?"""

from dataclasses import asdict

import numpy as np

from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section, Table
from gangline.reports.study import Study
from gangline.traces import Trace
from gangline.traces.rows import Array
from gangline.traces.statistics.alignment import Alignment, alignment
from gangline.traces.statistics.membership import numbered, used

TITLE = "Do languages meet in the same experts?"
LEAST_TOKENS = 4
_LACK = (
    "Languages can only be compared on translations: record documents with labels lang and pair (the same "
    "pair for a sentence and its translation); scripts/trace_texts.py makes such a file."
)


def languages_section(study: Study) -> Section:
    """Report cross-lingual alignment, the first language against each of the others."""
    source = study.parallel
    if source is None:
        return Section("languages", TITLE, lacks=[_LACK])
    names = source.header.labels["lang"]
    logits = source.layer(0).logits_RN is not None
    found: dict[str, list[Alignment]] = {}
    for number, name in enumerate(names[1:], 1):
        rows = _pairs(source.tokens.labels["lang"], source.tokens.labels["pair"], number)
        if rows.any():
            sentence_R, _ = numbered(source.tokens.labels["pair"][rows])
            second_R = source.tokens.labels["lang"][rows] == number
            found[name] = [
                alignment(_scores(source, n)[rows], sentence_R, second_R, study.rng(8, number, n))
                for n in study.layers
            ]
    if not found:
        return Section(
            "languages",
            TITLE,
            lacks=[f"No sentence in two languages with {LEAST_TOKENS} tokens each. {_LACK}"],
        )
    lacks = (
        []
        if logits
        else ["Without --logits the chosen experts stand in for the router's distribution: approximate."]
    )
    return Section(
        "languages",
        TITLE,
        _says(names[0], found),
        "A sentence against itself: its odd tokens against its even ones.",
        {
            "first": names[0],
            "from_logits": logits,
            "layers": {k: [asdict(a) for a in v] for k, v in found.items()},
        },
        [_picture(study, names[0], found)],
        [_table(found)],
        lacks,
        "arXiv 2510.04694.",
    )


def _pairs(lang_R: Array, pair_R: Array, other: int) -> Array:
    """Rows of the sentences that both languages have, with enough tokens in each."""
    pairs = int(pair_R.max()) + 1
    counts = [np.bincount(pair_R[lang_R == lang], minlength=pairs) for lang in (0, other)]
    both = (counts[0] >= LEAST_TOKENS) & (counts[1] >= LEAST_TOKENS)
    return np.asarray(both[pair_R] & np.isin(lang_R, (0, other)))


def _scores(source: Trace, layer: int) -> Array:
    """The router's distribution over experts; the chosen experts' shares where no logits were recorded."""
    scores_RN = source.scores(layer)
    if scores_RN is None:
        scores_RN = used(source.layer(layer), source.header.layers[layer].experts).astype(np.float32)
    return np.asarray(scores_RN / np.maximum(scores_RN.sum(axis=1, keepdims=True), 1e-20))


def _says(first: str, found: dict[str, list[Alignment]]) -> str:
    parts = []
    for name, layers in found.items():
        d = np.array([one.divergence for one in layers])
        third = max(1, len(d) // 3)
        middle = d[third:-third].mean() if len(d) > 2 else d.mean()
        ends = np.concatenate([d[:third], d[-third:]]).mean()
        within = float(np.mean([one.within for one in layers]))
        shape = (
            "less in the middle layers than at both ends" if middle < 0.9 * ends else "no less in the middle"
        )
        parts.append(
            f"{first} and {name} differ by {d.mean():.3f} on {layers[0].sentences} translated sentences "
            f"(the halves of one sentence: {within:.3f}): {shape} ({middle:.3f} against {ends:.3f})."
        )
    return (
        " ".join(parts) + " Models that share what they know between languages show a U: a dip in the middle."
    )


def _picture(study: Study, first: str, found: dict[str, list[Alignment]]) -> Picture:
    x = list(study.layers)
    lines = [
        Line(f"{first} / {name} (95%)", x, [a.divergence for a in v], [a.low for a in v], [a.high for a in v])
        for name, v in list(found.items())[:6]
    ]
    within = np.mean([[a.within for a in v] for v in found.values()], axis=0).tolist()
    lines.append(Line("halves of one sentence", x, within, chance=True))
    draw = chart(
        "How differently translations are routed", "MoE layer", "normalised divergence (0 to 1)", lines
    )
    return Picture("languages", "Cross-lingual divergence by layer", draw)


def _table(found: dict[str, list[Alignment]]) -> Table:
    rows = [
        [n, name, f"{a.divergence:.4f}", f"{a.low:.4f} to {a.high:.4f}", f"{a.within:.4f}"]
        for name, layers in found.items()
        for n, a in enumerate(layers)
    ]
    return Table("By layer", ["layer", "language", "divergence", "95%", "within a sentence"], rows)

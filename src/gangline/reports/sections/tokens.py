"""Section: do experts belong to tokens?"""

from dataclasses import asdict
from typing import Any

import numpy as np

from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section, Table, percent
from gangline.reports.study import Study
from gangline.traces.rows import Array
from gangline.traces.statistics.context_independence import ContextIndependence, context_independence
from gangline.traces.statistics.vocabulary import LEAST, Vocabulary, top_tokens, vocabulary

TITLE = "Do experts belong to tokens?"
_COLUMNS = {"input_id": "token that enters", "pred_id": "predicted token", "next_id": "token that follows"}
_LACKS = {
    "input_id": "The traces do not know the tokens that entered.",
    "pred_id": "Predicted tokens were not recorded: record with --predictions.",
    "next_id": "The tokens that followed were not recorded.",
}


def tokens_section(study: Study) -> Section:
    """Report vocabulary specialisation and context independence."""
    table = study.rows.tokens
    known = {name: np.asarray(getattr(table, name)) for name in _COLUMNS}
    lacks = [_LACKS[name] for name, ids in known.items() if (ids < 0).mean() > 0.5]
    known = {name: ids for name, ids in known.items() if (ids < 0).mean() <= 0.5}
    if "input_id" not in known:
        return Section("tokens", TITLE, lacks=lacks)
    special = {name: _vocabulary(study, ids, number) for number, (name, ids) in enumerate(known.items())}
    special = {name: layers for name, layers in special.items() if all(layers)}
    input_R = known["input_id"]
    free = [context_independence(study.used(n), input_R, study.rng(6, n), 10) for n in study.layers]
    if study.words is None:
        lacks.append("No tokenizer of this model is at hand, so tokens are shown by number.")
    numbers: dict[str, Any] = {
        "vocabulary": {name: [asdict(one) for one in layers if one] for name, layers in special.items()},
        "context_independence": [None if one is None else asdict(one) for one in free],
        "top_tokens": _numbers(study, input_R),
    }
    return Section(
        "tokens",
        TITLE,
        _says(special, free, study.chance),
        f"Token ids permuted over the text. Ids with fewer than {LEAST} occurrences are left out of the "
        "first picture; a maximum over experts is above K/N even by chance.",
        numbers,
        _pictures(special, free),
        [_table(study, input_R)],
        lacks,
        "Vocabulary specialisation: arXiv 2409.02060. Context independence: arXiv 2402.01739.",
    )


def _vocabulary(study: Study, ids_R: Array, number: int) -> list[Vocabulary | None]:
    rows = ids_R >= 0
    return [
        vocabulary(study.used(n)[rows], ids_R[rows], study.rng(5, number, n), draws=5) for n in study.layers
    ]


def _says(
    special: dict[str, list[Vocabulary | None]], free: list[ContextIndependence | None], chance: float
) -> str:
    some = [one for one in free if one is not None]
    if not some:
        return "No token occurs twice, so nothing can be said."
    mean = float(np.mean([one.explained for one in some]))
    first, last = some[0].explained, some[-1].explained
    text = (
        f"The token alone explains {percent(mean)} of the routing on average ({percent(first)} in the first "
        f"layer, {percent(last)} in the last); the rest depends on context. By chance it would be 0."
    )
    if "input_id" in special:
        layers = [one for one in special["input_id"] if one]
        value, null = (float(np.mean([get(o) for o in layers])) for get in (_value, _null))
        text += (
            f" A token's favourite expert sees {percent(value)} of its occurrences (chance {percent(null)}, "
            f"K/N {percent(chance)})."
        )
    return text


def _value(one: Vocabulary) -> float:
    return one.specialisation


def _null(one: Vocabulary) -> float:
    return one.null.mean


def _pictures(
    special: dict[str, list[Vocabulary | None]], free: list[ContextIndependence | None]
) -> list[Picture]:
    made = []
    if special:
        layers = list(range(len(free)))
        lines = [
            Line(_COLUMNS[name], layers, [one.specialisation for one in found if one])
            for name, found in special.items()
        ]
        null = [one.null.mean for one in next(iter(special.values())) if one]
        lines.append(Line("chance", layers, null, chance=True))
        draw = chart(
            "The favourite expert of a token", "MoE layer", "share of its occurrences", lines, shares=True
        )
        made.append(Picture("vocabulary", "Vocabulary specialisation by layer, beside chance", draw, 3.7))
    known = [n for n, one in enumerate(free) if one is not None]
    if known:
        found = [one for one in free if one is not None]
        lines = [
            Line("explained by the token id", known, [one.explained for one in found]),
            Line("chance", known, [one.null.mean for one in found], chance=True),
        ]
        draw = chart(
            "How much of the routing the token explains",
            "MoE layer",
            "share of variance",
            lines,
            shares=True,
            bottom=None,
        )
        made.append(Picture("context_independence", "Context independence by layer, beside chance", draw))
    return made


def _numbers(study: Study, input_R: Array) -> list[list[list[dict[str, Any]]]]:
    layers = [top_tokens(study.used(n), input_R) for n in study.layers]
    word = study.words or (lambda token: "")
    return [[[asdict(t) | {"text": word(t.token)} for t in top] for top in layer] for layer in layers]


def visible(text: str) -> str:
    """Return a token between quotes; of one that is nothing but space, the space."""
    inside = text.strip() or repr(text)[1:-1].replace(" ", "␣")
    return f"‘{inside}’"


def _table(study: Study, input_R: Array) -> Table:
    """The top tokens of the layer in the middle: one row an expert."""
    layer = len(study.layers) // 2
    show = study.words or (lambda token: f"#{token}")
    rows: list[list[Any]] = []
    for expert, top in enumerate(top_tokens(study.used(layer), input_R, top=6)[:32]):
        share = f"{study.used(layer)[:, expert].mean():.1%}"
        rows.append([expert, share, ", ".join(f"{visible(show(t.token))} x{t.lift:.1f}" for t in top) or "-"])
    caption = f"Layer {layer}: tokens that an expert sees more than its share (x2.0: twice as often)"
    return Table(caption, ["expert", "of all tokens", "its tokens"], rows)

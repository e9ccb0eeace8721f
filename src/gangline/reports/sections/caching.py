"""Section: is it worth caching experts, and how many?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gangline.core.sizes import format_size
from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section, Table, percent
from gangline.reports.study import Study

TITLE = "Is it worth caching experts, and how many?"
BOUND = "belady-bypass@global"
WORTH = 0.05
"""Hit rate above the resident share from which a cache that follows the text earns its name."""
COVERED = 0.8


def caching_section(study: Study) -> Section:
    """Report hit rates over capacity, the slots worth having, and modelled speed."""
    slots = _static_slots(study)
    if not study.simulations:
        lack = "No cache was simulated: it needs single tokens (--mode ids or full) and --sim-tokens above 0."
        return Section(
            "caching", TITLE, lacks=[lack], tables=[_slots_table(slots)], numbers={"static_slots": slots}
        )
    curve = study.simulations[0]
    rows = [row for row in curve["rows"] if "oracle" not in row["policy"]]
    policies = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != BOUND))
    advice = recommendation(rows, curve["experts"], len(study.header.layers))
    speeds = [speed for one in study.simulations for speed in _speeds(one)]
    numbers = {
        "kind": "simulated",
        "advice": advice,
        "static_slots": slots,
        "simulations": list(study.simulations),
    }
    lacks = [note[0].upper() + note[1:] + "." for note in curve["notes"] if not note.startswith("no times")]
    if not speeds:
        lacks.append("No speed is modelled: give --link, or run 'gangline doctor' once to measure the disk.")
    return Section(
        "caching",
        TITLE,
        _says(rows, curve, speeds),
        "A cache that knows nothing of the text hits as often as the share of experts that it holds.",
        numbers,
        _pictures(rows, policies, curve, speeds),
        [_table(rows, curve), *([_speed_table(speeds)] if speeds else []), _slots_table(slots)],
        lacks,
        "Belady's bound: IBM Systems Journal 1966. All of this section is simulated.",
        _headline(advice),
    )


def recommendation(rows: Sequence[Mapping[str, Any]], experts: int, layers: int) -> dict[str, Any]:
    """Say whether caching pays, and how many slots gain most over a cache that knows nothing.

    Returns:
        ``worth``, the best capacity's ``slots`` (in all and per layer), its ``resident`` share, ``hit_rate``,
        ``policy``, ``gain`` over the resident share, and ``of_bound`` (hits over those of Belady's cache).
    """
    causal = [row for row in rows if row["policy"] != BOUND and row["slots"] < experts]
    bound = {row["slots"]: row["hit_rate"] for row in rows if row["policy"] == BOUND}
    if not causal:
        return {"worth": False}
    best = max(causal, key=lambda row: row["hit_rate"] - row["slots"] / experts)
    resident = best["slots"] / experts
    top = bound.get(best["slots"])
    return {
        "worth": bool(best["hit_rate"] - resident >= WORTH),
        "slots": best["slots"],
        "slots_per_layer": best["slots"] / layers,
        "resident": resident,
        "policy": best["policy"],
        "hit_rate": best["hit_rate"],
        "gain": best["hit_rate"] - resident,
        "of_bound": best["hit_rate"] / top if top else None,
    }


def _headline(advice: dict[str, Any]) -> str:
    if "slots" not in advice:
        return "All experts fit into every capacity that was simulated."
    where = f"{advice['slots_per_layer']:.1f} slots a layer ({percent(advice['resident'])} of the experts)"
    found = f"{advice['policy']} finds {percent(advice['hit_rate'], 1)} of the experts in memory"
    if advice["worth"]:
        return (
            f"Yes. A cache gains most at {where}: {found}, {100 * advice['gain']:.0f} points more than a "
            f"cache that knows nothing of the text and {percent(advice['of_bound'])} of what no cache can "
            "beat. More memory still helps, only less for each slot."
        )
    return (
        f"Hardly. At best ({where}) {found}, about as many as if the cache held random ones. Hold as many "
        "experts as memory allows, and compute the others where they lie or store them smaller; a cleverer "
        "cache gains little."
    )


def _says(rows: list[Mapping[str, Any]], curve: Mapping[str, Any], speeds: list[dict[str, Any]]) -> str:
    experts = curve["experts"]
    middle = min({row["slots"] for row in rows}, key=lambda slots: abs(slots / experts - 0.5))
    rates = {row["policy"]: row["hit_rate"] for row in rows if row["slots"] == middle}
    bound = rates.pop(BOUND, None)
    best = max(rates, key=lambda name: float(rates[name]))
    text = (
        f"With {percent(middle / experts)} of the experts in memory {best} finds {percent(rates[best], 1)} "
        f"of what a token needs; knowing the future, it could be {percent(bound, 1)}. What lies between is "
        "what a better cache or prediction can still win."
    )
    near = [
        f"{_speed(s['tokens_per_second'])} tokens/s at {_rate(s)}" for s in speeds if s["slots"] == middle
    ]
    if near:
        limit = any("no time" in note for note in curve["notes"])
        more = " (upper limits: see the notes below)" if limit else ""
        text += f" Modelled speed there: {', '.join(near)}{more}."
    return text + f" Replayed: {curve['tokens']:,} tokens, {curve['replay']}."


def _pictures(
    rows: list[Mapping[str, Any]], policies: list[str], curve: Mapping[str, Any], speeds: list[dict[str, Any]]
) -> list[Picture]:
    experts = curve["experts"]

    def line(policy: str, label: str, *, bound: bool = False) -> Line:
        mine = sorted((r for r in rows if r["policy"] == policy), key=lambda r: int(r["slots"]))
        return Line(
            label, [r["slots"] / experts * 100 for r in mine], [r["hit_rate"] for r in mine], bound=bound
        )

    shares = sorted({row["slots"] / experts for row in rows})
    lines = [line(policy, policy) for policy in policies]
    lines.append(line(BOUND, "Belady: no cache beats it", bound=True))
    lines.append(Line("knows nothing", [100 * s for s in shares], shares, chance=True))
    draw = chart(
        "How often a cache has the expert (simulated)",
        "slots, % of all experts",
        "hit rate",
        lines,
        shares=True,
        top=1.0,
    )
    made = [Picture("hit_rate", "Hit rate over capacity for each cache, beside Belady's bound", draw, 3.9)]
    if speeds:
        lines = []
        for rate in dict.fromkeys(_rate(speed) for speed in speeds):
            mine = sorted((s for s in speeds if _rate(s) == rate), key=lambda s: int(s["slots"]))
            x = [s["slots"] / experts * 100 for s in mine]
            lines.append(Line(rate, x, [s["tokens_per_second"] for s in mine]))
        draw = chart(
            "What if the link were so fast (simulated)", "slots, % of all experts", "tokens/s", lines
        )
        made.append(Picture("what_if", "Modelled tokens per second over capacity and link speed", draw, 3.7))
    return made


def _speeds(simulation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fastest cache at each capacity, where time was modelled."""
    timed = [
        r
        for r in simulation["rows"]
        if r["tokens_per_second"] is not None and not r["policy"].startswith("belady")
    ]
    found = []
    for slots in sorted({row["slots"] for row in timed}):
        best = max((r for r in timed if r["slots"] == slots), key=lambda r: float(r["tokens_per_second"]))
        names = ("policy", "slots", "hit_rate", "tokens_per_second", "bound_share")
        found.append({name: best[name] for name in names} | {"link": simulation["link_bytes_per_second"]})
    return found


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"


def _rate(speed: Mapping[str, Any]) -> str:
    return f"{speed['link'] / 1e9:.2g} GB/s"


def _table(rows: list[Mapping[str, Any]], curve: Mapping[str, Any]) -> Table:
    made = []
    for row in sorted(rows, key=lambda r: (r["slots"], r["policy"] == BOUND)):
        moved = (
            row["levels"][0]["bytes_per_token"]
            if row["levels"]
            else row["misses_per_token"] * curve["expert_bytes"]
        )
        name = "Belady (bound)" if row["policy"] == BOUND else row["policy"]
        resident = percent(row["slots"] / curve["experts"])
        cells = [
            name,
            row["slots"],
            resident,
            percent(row["hit_rate"], 1),
            percent(row["of_belady"], 1),
            format_size(moved),
        ]
        made.append(cells)
    head = ["cache", "slots", "of all", "hit rate", "of Belady", "read per token"]
    return Table("Simulated caches", head, made)


def _speed_table(speeds: list[dict[str, Any]]) -> Table:
    rows = [
        [
            _rate(s),
            s["policy"],
            s["slots"],
            percent(s["hit_rate"], 1),
            _speed(s["tokens_per_second"]),
            percent(s["bound_share"]),
        ]
        for s in speeds
    ]
    head = ["link", "best cache", "slots", "hit rate", "tokens/s", "of the bound"]
    return Table("What if (simulated)", head, rows)


def _static_slots(study: Study) -> list[dict[str, Any]]:
    """For each layer how many of its most used experts cover most choices, and how many it uses at all."""
    found = []
    for layer in study.layers:
        ordered = np.sort(study.load(layer))[::-1]
        share = np.cumsum(ordered) / ordered.sum()
        p = ordered[ordered > 0] / ordered.sum()
        found.append(
            {
                "layer": layer,
                "experts": len(ordered),
                "top_k": study.header.layers[layer].top_k,
                "covering": int(np.searchsorted(share, COVERED - 1e-9)) + 1,
                "effective": float(np.exp(-(p * np.log(p)).sum())),
            }
        )
    return found


def _slots_table(slots: list[dict[str, Any]]) -> Table:
    rows = [[s["layer"], s["experts"], s["top_k"], s["covering"], f"{s['effective']:.1f}"] for s in slots]
    head = ["layer", "experts", "K", f"cover {percent(COVERED)} of choices", "effective experts"]
    return Table("Slots by layer (effective: e to the entropy of the loads)", head, rows)

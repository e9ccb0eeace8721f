"""Check every MoE family and write the table of supported models from the results.

Usage: python scripts/make_supported_table.py [--seed N]

For each family a tiny random model is built from its own config class. Its routers are compared with
gangline's rule on 64 random rows, and its logits with those of the same model whose experts run through
gangline's reference kernel, on three draws of text, all in fp32. Writes docs/_generated/supported_models.json
and .md.
"""

import argparse
import json
import random
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from gangline.core.errors import GanglineError  # noqa: E402
from gangline.models import MoEView, check_conformance, find_moe, install, resident_forward  # noqa: E402
from tiny_models import FAMILIES, tiny_inputs, tiny_model  # noqa: E402

DRAWS = 3
TOLERANCE = 1e-4


def check_family(family: str, seed: int) -> dict[str, Any]:
    """Return one row of the table; ``problem`` is empty if everything agreed."""
    model = tiny_model(family, seed)
    row: dict[str, Any] = {"family": family, "class": type(model).__name__}
    try:
        view = find_moe(model)
        check_conformance(view, seed=seed)
    except GanglineError as error:
        return row | {"problem": str(error)}
    row |= describe(view)
    row["max_logit_difference"] = max(logit_difference(view, seed + draw) for draw in range(DRAWS))
    row["problem"] = "" if row["max_logit_difference"] < TOLERANCE else "logits differ from the plain model"
    return row


def describe(view: MoEView) -> dict[str, Any]:
    """Say how the family holds and routes its experts."""
    block = view.blocks[0]
    flags = {
        "has_bias": "bias",
        "interleaved": "interleaved",
        "transposed": "transposed",
        "has_post_norm": "norm",
    }
    layout = [word for name, word in flags.items() if getattr(block, name)]
    layout += [] if block.has_gate else ["no gate"]
    layout += ["own gate function"] if block.has_gate and not block.default_gate else []
    return {
        "adapter": block.adapter.name,
        "matrices": [field.name for field in block.fields],
        "layout": layout,
        "routing": sorted({b.router_spec.kind if b.router_spec else b.router_reason for b in view.blocks}),
        "shared": sorted({name.rpartition(".")[2] for b in view.blocks for name, _ in b.shared}),
        "notes": list(view.notes),
    }


@torch.no_grad()
def logit_difference(view: MoEView, seed: int) -> float:
    """Largest difference between the plain model and the one with our forward installed."""
    inputs = tiny_inputs(view.model, seed=seed)
    plain = view.model(**inputs).logits
    undos = [install(block, resident_forward(block)) for block in view.blocks]
    ours = view.model(**inputs).logits
    for undo in undos:
        undo()
    return float((ours - plain).abs().max())


def markdown(result: dict[str, Any]) -> str:
    """Lay the rows out as a table."""
    lines = [
        f"Checked on {result['date']} with transformers {result['versions']['transformers']} and torch "
        f"{result['versions']['torch']} in fp32 on text, seed {result['seed']}: {result['passed']} of "
        f"{len(result['rows'])} families agree. The last column is the largest difference of a logit from "
        "the plain model.",
        "",
        "| family | matrices | layout | routing | shared experts | result |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        verdict = row["problem"] or f"same routing; {row['max_logit_difference']:.0e}".replace("0e+00", "0")
        cells = [f"`{row['family']}`", *(", ".join(row.get(k, [])) for k in ("matrices", "layout"))]
        cells += ["; ".join(row.get("routing", [])), ", ".join(f"`{name}`" for name in row.get("shared", []))]
        lines.append(f"| {' | '.join([*cells, verdict])} |")
    notes = [f"- `{row['family']}`: {note}." for row in result["rows"] for note in row.get("notes", [])]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def main() -> None:
    """Run all families, write both files, fail if one disagrees."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    seed = parser.parse_args().seed
    rows = []
    for family in FAMILIES:
        rows.append(check_family(family, seed))
        print(f"{family}: {rows[-1]['problem'] or 'ok'}", flush=True)
    result = {
        "command": "python scripts/make_supported_table.py",
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tolerance": TOLERANCE,
        "passed": sum(not row["problem"] for row in rows),
        "rows": rows,
    }
    folder = ROOT / "docs" / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "supported_models.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "supported_models.md").write_text(markdown(result), encoding="utf-8")
    if result["passed"] < len(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

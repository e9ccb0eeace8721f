"""Write the tables of results from the stored files, so that no number in them is typed by hand.

python scripts/readme_tables.py            # rewrite the tables
python scripts/readme_tables.py --check    # exit 1 if they differ from the files

docs/measured.md has every row of every file; README has those whose work matches HEADLINES.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results: start -->", "<!-- results: end -->"
RESULTS = ROOT / "benchmarks" / "results"

# Files whose rows README shows, and which of their rows: losses as well as wins.
HEADLINES = {
    "native_vs_peers": r"decode|prefill|first token",
    "native_int8_vs_peers": r"decode|prefill",
    "half_memory_vs_peers": r"decode|prefill",
    "ram_disk": r"(uniform routing|routing of demo), (default|layer-lru)",
    "offload_vs_peers": r"decode|prefill 512|whole life",
    "exactness": r"^(demo|tiny mixtral|tiny olmoe|tiny qwen3_moe|tiny gpt_oss|tiny deepseek_v3),",
    "plan_vs_reality": r"",
    "quality_by_precision": r"debian",
    "demo_quality": r"^demo as shipped",
    "policies_live": r"english, rho 2, ((default|moe-infinity|hobbit-exact|hybrimoe)$|(lru|lfu|belady-b))",
    "sida": r"switch-base-128.*(SST2|MultiRC) lengths, SiDA, execute",
    "sida_fidelity": r"",
    "samoyeds_cpu_layer": r"OLMoE.*decode",
    "sparsify_quality": r"8192 tokens",
}


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def table(result: dict[str, Any], where: str, pattern: str = "") -> list[str]:
    """The rows of one result file, which lies ``where``, whose work matches, as Markdown."""
    lines = [
        f"**{result['name']}**, {result['date'][:10]}, {where}:",
        f"`{result['command']}`",
        "",
        "| work | metric | gangline | peer | its value | ratio | share of the bound | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if not re.search(pattern, row["work"]):
            continue
        share = "" if row["bound_share"] is None else f"{row['bound_share']:.0%}"
        cells = [
            row["work"],
            row["metric"] + ("" if row["kind"] == "measured" else f" ({row['kind']})"),
            number(row["ours"]),
            row["peer"] or "",
            number(row["peer_value"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            share,
            str(row["n"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def everything() -> str:
    """All stored results, in the order of their names."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        lines += table(result, f"`benchmarks/results/{path.name}`")
    return "\n".join(lines)


def headlines() -> str:
    """What README shows, in the order of HEADLINES."""
    lines: list[str] = []
    for name, pattern in HEADLINES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            lines += table(result, f"[{path.name}](benchmarks/results/{path.name})", pattern)
    return "\n".join(lines)


def filled(path: Path, content: str) -> tuple[str, str]:
    """The text of a file, and what it should be."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return text, f"{before}{START}\n\n{content}\n{END}{after}"


def main() -> int:
    """Rewrite or check both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if one is out of date")
    arguments = parser.parse_args()
    status = 0
    for path, content in (
        (ROOT / "README.md", headlines()),
        (ROOT / "docs" / "measured.md", everything()),
    ):
        text, wanted = filled(path, content)
        if not arguments.check:
            path.write_text(wanted, encoding="utf-8")
        elif text != wanted:
            where = path.relative_to(ROOT)
            print(f"{where} differs from benchmarks/results: run scripts/readme_tables.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Write README's table of results from the stored files, so that no number in it is typed by hand.

python scripts/readme_tables.py            # rewrite the table
python scripts/readme_tables.py --check    # exit 1 if README differs from the files
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results: start -->", "<!-- results: end -->"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def table(result: dict[str, Any], file: str) -> list[str]:
    """One result file as Markdown."""
    rows = result["rows"]
    lines = [
        f"**{result['name']}**, {result['date'][:10]}, [{file}](benchmarks/results/{file}):",
        f"`{result['command']}`",
        "",
        "| work | metric | gangline | peer | its value | ratio | share of the bound | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
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


def render() -> str:
    """All stored results, in the order of their names."""
    lines: list[str] = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        lines += table(json.loads(path.read_text(encoding="utf-8")), path.name)
    return "\n".join(lines)


def main() -> int:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README is out of date"
    )
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    wanted = f"{before}{START}\n\n{render()}\n{END}{after}"
    if arguments.check:
        if text != wanted:
            print("README.md differs from benchmarks/results: run scripts/readme_tables.py", file=sys.stderr)
        return int(text != wanted)
    readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

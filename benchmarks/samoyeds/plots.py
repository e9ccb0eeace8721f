"""Pictures of stored Samoyeds results: how many times as fast as each peer.

    python benchmarks/samoyeds/plots.py benchmarks/results/samoyeds_*.json --folder benchmarks/results/plots

Bars, one group a shape, for layers on the processor and for whole models; lines over the number of tokens for
layers on a GPU. What a result does not hold is not drawn.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gangline.benchmarks.result import read_result
from gangline.reports.figure import COLOURS, GREY, Line, chart, png
from gangline.reports.section import Picture

OF_TOKENS = re.compile(
    r"(?P<shape>\S+) (?P<codec>\S+), (?P<tokens>\d+) tokens, (?P<part>layer, \S+|down matrix)"
)
OF_SHAPES = re.compile(r"(?P<shape>\S+), (?P<codec>\S+), (?P<part>.+)")

Ratios = Mapping[str, Mapping[str, float]]


def pictures(rows: list[dict[str, Any]]) -> Iterator[Picture]:
    """Yield the pictures of one result's rows."""
    lines: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    groups: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["ratio"] is None:
            continue
        if found := OF_TOKENS.fullmatch(row["work"]):
            title = f"{found['shape']}, {found['codec']}, {found['part']}"
            lines[title][row["peer"]][int(found["tokens"])] = row["ratio"]
        elif found := OF_SHAPES.fullmatch(row["work"]):
            # The share of a prompt that an expert gets differs from shape to shape.
            part = re.sub(r" \(\d+ an expert\)", "", found["part"])
            groups[part][f"{found['codec']} to {row['peer']}"][found["shape"]] = row["ratio"]
    yield from (over_tokens(title, of_peers) for title, of_peers in lines.items())
    yield from (over_shapes(title, of_series) for title, of_series in groups.items())


def over_tokens(title: str, of_peers: Mapping[str, Mapping[int, float]]) -> Picture:
    """Lines over the number of tokens, one a peer."""
    drawn = [Line(peer, sorted(at), [at[tokens] for tokens in sorted(at)]) for peer, at in of_peers.items()]
    ends = [min(drawn[0].x), max(drawn[0].x)]
    drawn.append(Line("as fast", ends, [1.0, 1.0], chance=True))
    return Picture(
        file_name(title),
        f"How many times as fast as each peer: {title}",
        chart(title, "tokens", "times as fast", drawn, log_x=True),
        height=4.2,
    )


def over_shapes(title: str, of_series: Ratios) -> Picture:
    """Groups of bars from left to right, one group a shape and one bar a series."""
    shapes = list(dict.fromkeys(shape for series in of_series.values() for shape in series))
    wide = 0.8 / len(of_series)

    def draw(axes: Any) -> None:
        for number, (label, series) in enumerate(of_series.items()):
            places = [index + number * wide for index, shape in enumerate(shapes) if shape in series]
            lengths = [series[shape] for shape in shapes if shape in series]
            axes.barh(places, lengths, wide, color=COLOURS[number % len(COLOURS)], label=label, align="edge")
        axes.axvline(1.0, color=GREY, linestyle=(0, (4, 2)), linewidth=1.3)
        axes.set_yticks([index + 0.4 for index in range(len(shapes))], shapes)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("times as fast")
        axes.set_title(title)
        axes.figure.legend(loc="outside lower left")

    height = 1.2 + 0.2 * len(of_series) * (len(shapes) + 1)
    return Picture(file_name(title), f"How many times as fast as each peer: {title}", draw, height)


def file_name(title: str) -> str:
    """A title as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def main() -> None:
    """Draw every result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results/plots"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for path in arguments.results:
        for picture in pictures(read_result(path)["rows"]):
            target = arguments.folder / f"{path.stem}-{picture.name}.png"
            target.write_bytes(png(picture))
            print(target)


if __name__ == "__main__":
    main()

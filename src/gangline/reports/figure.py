"""How all pictures look: dark on light, in colours that everyone tells apart, with text for a phone."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gangline.core.errors import UsageError
from gangline.reports.section import Draw, Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, those that stand out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
MAP = "cividis"
# A phone shows a picture about 340 points wide, so text keeps its size there.
WIDTH = 4.7
DPI = 200
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: for the legend.
        x, y: points; a y that is None is left out.
        low, high: a band around it.
        chance: drawn grey and dashed: what chance gives.
        bound: drawn black and dashed: what nothing exceeds.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    chance: bool = False
    bound: bool = False


def require_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "pictures need matplotlib, which is not installed: pip install 'gangline[plot]' (--json "
            "without -o gives the numbers without pictures)"
        ) from error


def figure(picture: Picture) -> "Figure":
    """Return a picture as a matplotlib figure.

    Raises:
        UsageError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        made = Figure(figsize=(WIDTH, picture.height), layout="constrained")
        picture.draw(made.add_subplot())
        return made


def png(picture: Picture) -> bytes:
    """Return a picture as the bytes of a PNG file.

    Raises:
        UsageError: matplotlib is not installed.
    """
    made = figure(picture)
    file = io.BytesIO()
    made.savefig(file, dpi=DPI, format="png", metadata={"Software": None})
    return file.getvalue()


def chart(
    title: str,
    x: str,
    y: str,
    lines: Sequence[Line],
    *,
    shares: bool = False,
    log_x: bool = False,
    bottom: float | None = 0.0,
    top: float | None = None,
    ticks: Sequence[float] | None = None,
    tick_labels: Sequence[str] | None = None,
) -> Draw:
    """Return a function that draws lines, chance and bounds among them, with a legend below."""

    def draw(axes: Any) -> None:
        for number, line in enumerate(lines):
            _line(axes, line, sum(not (one.chance or one.bound) for one in lines[:number]))
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log_x:
            axes.set_xscale("log", base=2)
        if ticks is not None:
            axes.set_xticks(ticks, tick_labels or [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if shares:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(bottom=bottom, top=top)
        legend_below(axes, len(lines))

    return draw


def legend_below(axes: Any, entries: int) -> None:
    """Put the legend below the picture, where it hides nothing."""
    if entries > 1:
        axes.figure.legend(loc="outside lower left", ncols=2 if entries > 2 else entries)


def _line(axes: Any, line: Line, number: int) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    style: dict[str, Any] = {"color": colour, "marker": marker if len(line.x) <= 12 else None}
    if len(line.x) > 12 and number:
        style["linestyle"] = ("-", "--", "-.", ":")[number % 4]
    if line.chance:
        style = {"color": GREY, "linestyle": (0, (4, 2)), "linewidth": 1.3}
    if line.bound:
        style = {"color": "#000000", "linestyle": (0, (1, 1)), "linewidth": 1.6}
    y = np.array([np.nan if value is None else value for value in line.y], dtype=float)
    axes.plot(line.x, y, label=line.label, **style)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0)


def heat(
    title: str,
    x: str,
    y: str,
    values: Any,
    colours: str,
    *,
    low: float | None = None,
    high: float | None = None,
    names: Sequence[str] | None = None,
) -> Draw:
    """Return a function that draws a matrix with its colour bar; ``names`` label both axes, one a row."""

    def draw(axes: Any) -> None:
        image = axes.imshow(
            values, aspect="auto", cmap=MAP, vmin=low, vmax=high, interpolation="nearest", origin="lower"
        )
        axes.grid(False)
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if names is None:
            _whole_numbers(axes)
        else:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        axes.figure.colorbar(image, ax=axes, label=colours, location="bottom", shrink=0.8, aspect=30)

    return draw


def bars(
    title: str,
    y: str,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    level: float,
) -> Draw:
    """Return a function that draws groups of bars (``values[label][name]``) and a line at chance."""

    def draw(axes: Any) -> None:
        wide = 0.8 / len(labels)
        for number, (label, mine) in enumerate(zip(labels, values, strict=True)):
            at = np.arange(len(names)) + (number - (len(labels) - 1) / 2) * wide
            hatch = ("", "///", "...", "xx", "\\\\\\")[number % 5]
            axes.bar(at, mine, wide, label=label, color=COLOURS[number % 7], hatch=hatch, edgecolor="white")
        axes.axhline(level, color=GREY, linestyle=(0, (4, 2)), label="chance (K/N)")
        axes.set_xticks(
            range(len(names)),
            names,
            rotation=45 if len(names) > 6 else 0,
            ha="right" if len(names) > 6 else "center",
        )
        axes.grid(axis="x", visible=False)
        axes.set_title(title)
        axes.set_ylabel(y)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        legend_below(axes, len(labels) + 1)

    return draw


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))

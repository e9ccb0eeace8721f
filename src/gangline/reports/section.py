"""What a report is made of: sections with numbers, pictures and tables, and one sentence on what they say."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Draw = Callable[[Any], None]
"""Draws on a matplotlib axes."""


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: file name without its end, unique in a report.
        alt: what it shows, for people who do not see it.
        draw: draws it.
        height: inches; all pictures are equally wide.
    """

    name: str
    alt: str
    draw: Draw
    height: float = 3.3


@dataclass(frozen=True)
class Table:
    """One table: a caption, the headings, and the rows. Strings stand left, everything else right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """One question about the routing.

    Attributes:
        name: key of its numbers.
        title: what is asked.
        says: the answer in plain language; None if the traces lack what is needed.
        null: what the numbers are held against.
        numbers: all of them, plain data for JSON.
        pictures, tables: to look at.
        lacks: what the traces do not hold, and what to record for it.
        source: where the definitions come from.
        headline: what to do, for the top of the page.
    """

    name: str
    title: str
    says: str | None = None
    null: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    lacks: Sequence[str] = ()
    source: str = ""
    headline: str = ""


def percent(share: float | None, digits: int = 0) -> str:
    """Write a share for people."""
    return "-" if share is None else f"{share:.{digits}%}"

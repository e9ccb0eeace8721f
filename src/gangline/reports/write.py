"""Write a report: a folder with the page, the pictures and the numbers, or the page alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gangline.core.errors import UsageError
from gangline.reports.build import Report
from gangline.reports.figure import png
from gangline.reports.page import page

PAGE = "index.html"
NUMBERS = "report.json"


def check_place(output: Path) -> None:
    """Check that a report can be written there.

    Raises:
        UsageError: a file stands where a folder is to be, or the other way round.
    """
    if output.suffix == ".html":
        if output.is_dir():
            raise UsageError(f"{output} is a folder; name a file, or a folder without .html at its end")
    elif output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; name a folder, or a file that ends in .html")


def write_report(
    report: Report, output: Path, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write the report.

    Args:
        report: what to write.
        output: a folder (page, pictures, numbers), or a file that ends in ``.html`` (the page alone, with
            its pictures inside).
        progress: called with pictures done and pictures in all.

    Returns:
        The files, the page first.

    Raises:
        UsageError: see :func:`check_place`; or matplotlib is not installed.
    """
    check_place(output)
    shown = [picture for section in report.sections for picture in section.pictures]
    images: dict[str, bytes] = {}
    for number, picture in enumerate(shown):
        images[picture.name] = png(picture)
        if progress is not None:
            progress(number + 1, len(shown))
    text = page(report, images)
    if output.suffix == ".html":
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    (output / PAGE).write_text(text, encoding="utf-8")
    for name, data in images.items():
        (output / f"{name}.png").write_bytes(data)
    numbers = json.dumps(plain(report.to_dict()), indent=1, ensure_ascii=False) + "\n"
    (output / NUMBERS).write_text(numbers, encoding="utf-8")
    return [output / PAGE, *(output / f"{name}.png" for name in images), output / NUMBERS]


def plain(value: Any) -> Any:
    """Return data that every JSON reader takes: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

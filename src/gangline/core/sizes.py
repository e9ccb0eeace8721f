"""Byte sizes as people write them: ``6GiB``, ``500 MB``."""

import re

from gangline.core.errors import UsageError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str | int) -> int:
    """Return bytes from ``"6GiB"`` (2**30), ``"6GB"`` (10**9) or an integer number of bytes.

    Raises:
        UsageError: no unit, an unknown unit, or a size that is not above zero.
    """
    if isinstance(text, int):
        if text <= 0:
            raise UsageError(f"memory size {text} is not above zero; write for example 6GiB")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise UsageError(
            f"cannot read the size {text!r}; write a number and a unit, for example 6GiB or 500MB"
        )
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise UsageError(f"memory size {text!r} is not above zero; write for example 6GiB")
    return size


def format_size(size: float) -> str:
    """Return a size in binary units with three or four digits, for example ``5.93 GiB``."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"

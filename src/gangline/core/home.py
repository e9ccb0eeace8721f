"""Folders that gangline writes: derived data only, never inside the Hub cache."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_dir(*parts: str) -> Path:
    """Return (and create) a folder under ``GANGLINE_HOME``, or under the platform's cache folder.

    Args:
        parts: names of nested folders, for example ``("packs",)``.
    """
    root = os.environ.get("GANGLINE_HOME")
    if root is None:
        import platformdirs

        root = platformdirs.user_cache_dir("gangline")
    path = Path(root).expanduser().joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Put a record into a JSON file at once, so that no reader meets a part of it.

    Raises:
        OSError: the folder cannot be written to.
    """
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, prefix=".", suffix=".tmp", delete=False, encoding="utf-8"
    ) as part:
        try:
            json.dump(record, part, indent=1)
        except BaseException:
            Path(part.name).unlink()
            raise
    Path(part.name).replace(file)

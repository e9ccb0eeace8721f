"""Folders that gangline writes: derived data only, never inside the Hub cache."""

import os
from pathlib import Path


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

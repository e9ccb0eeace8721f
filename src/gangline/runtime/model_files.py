"""What transformers finds when it looks through its model files, remembered while they stay as they are.

To know which module has which name, transformers reads the text of its thousands of files whenever it is
imported, twice. Their sizes and times tell sooner whether it would find the same again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from gangline.core.home import cache_dir, write_record
from gangline.runtime.imported import WATCH

logger = logging.getLogger(__name__)

SCHEMA = 1
_HOME = "transformers.utils.import_utils"
_LOOK = "create_import_structure_from_path"


@contextmanager
def one_look_at_models() -> Iterator[None]:
    """Let transformers, if it is imported meanwhile, look through its model files once, or not at all.

    It asks the same cached function for the same folder by the folder and by a file in it.
    """
    restore: list[Callable[[], None]] = []

    def put(home: ModuleType) -> None:
        look: Any = getattr(home, _LOOK, None)
        if not hasattr(look, "cache_info") or home.__file__ is None:
            return
        models = Path(home.__file__).parents[1] / "models"
        found: list[Any] = []

        def look_once(path: Any) -> Any:
            if Path(path) not in (models, models / "__init__.py"):
                return look(path)
            if not found:
                found.append(_look(look, models, Path(home.__file__ or "")))
            return found[0]

        setattr(home, _LOOK, look_once)
        restore.append(lambda: setattr(home, _LOOK, look))

    WATCH.when_imported(_HOME, put)
    try:
        yield
    finally:
        WATCH.forget(_HOME, put)
        for call in restore:
            call()


def _look(look: Callable[[Any], Any], models: Path, reader: Path) -> Any:
    """Return what is known of the folder if its files are the same ones still, else look and write it down.

    Args:
        look: reads the folder.
        models: the folder.
        reader: the file that ``look`` comes from.
    """
    try:
        name = hashlib.sha256(os.fsencode(models)).hexdigest()[:24]
        file = cache_dir("starts") / f"models-{name}.json"
        state = _state(models, reader)
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["state"] == state:
                return _decode(record["found"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.debug("no record of transformers' model files: %s", error)
        found = look(models)
        encoded = _encode(found)
        if _decode(encoded) == found:
            write_record(file, {"state": state, "found": encoded})
        return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.debug("transformers' model files are read every time: %s", error)
        return look(models)


def _state(models: Path, reader: Path) -> str:
    """Return a digest that changes when any file does."""
    files = [SCHEMA, *_stat(reader.stat())]
    folders = [str(models)]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name == "__pycache__":
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                else:
                    files += [entry.path, *_stat(entry.stat())]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _stat(found: os.stat_result) -> list[Any]:
    return [found.st_size, found.st_mtime_ns]


def _encode(found: dict[Any, Any]) -> list[Any]:
    """Return as JSON: needs (a frozenset) -> modules -> names (a set), folder -> the same again, in order.

    Raises:
        TypeError, AttributeError: there is something else in it.
    """
    return [
        [sorted(key), [[module, sorted(names)] for module, names in value.items()]]
        if isinstance(key, frozenset)
        else [str(key), _encode(value)]
        for key, value in found.items()
    ]


def _decode(encoded: list[Any]) -> dict[Any, Any]:
    return {
        key if isinstance(key, str) else frozenset(key): _decode(value)
        if isinstance(key, str)
        else {module: set(names) for module, names in value}
        for key, value in encoded
    }

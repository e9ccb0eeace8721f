"""Begin to read experts before the libraries are imported that say which: as they were read the last time.

Importing torch and transformers takes longer than reading the experts of a small model, and one core. So
where a command has loaded a model with all its experts in memory, the contents of its store are written
down, and the next command begins at once. The loader takes the store only if the checkpoint, read anew, asks
for the very same contents; otherwise it is closed and the record forgotten.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from gangline import __version__
from gangline.core.errors import GanglineError
from gangline.core.home import cache_dir, write_record
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog, ExpertLayout, Extent, FieldSpec
from gangline.policies.caches import CachePolicy
from gangline.policies.caches.fifo import FIFO
from gangline.runtime.store import ExpertStore
from gangline.runtime.store_opening import IO_THREADS, Contents, open_contents, request_all

logger = logging.getLogger(__name__)

SCHEMA = 1


class HeadStart:
    """Experts of one model that may be on their way already. :meth:`close` it after loading.

    Args:
        asked: everything by which a user chooses the bytes: the name of the model, its precision, ...
    """

    def __init__(self, *asked: str | None) -> None:
        digest = hashlib.sha256(json.dumps([SCHEMA, __version__, *asked]).encode()).hexdigest()
        self._name = f"{digest[:24]}.json"
        self._store: ExpertStore | None = None
        self._contents: Contents | None = None
        self._taken = 0
        self._over = threading.Event()  # claimed or closed
        self._opening, self._taking = threading.Lock(), threading.Lock()

    def begin(self) -> None:
        """Take memory and begin to read, if it is known what, and if that still lies there unchanged.

        Without room for it, or with a record that cannot be used, nothing happens. May run in any thread; it
        goes on until it has the memory or somebody calls :meth:`claim` or :meth:`close`.
        """
        with self._taking:
            with self._opening:
                store = None if self._over.is_set() else self._open()
            if store is None:
                return
            for taken in store.take_pages():
                self._taken += taken
                if self._over.is_set():
                    return
        with self._opening:
            if not self._over.is_set():
                store.read_with(1)

    def _open(self) -> ExpertStore | None:
        """Return a store in which everything is asked for and nothing is read yet."""
        try:
            record = json.loads(self._file().read_text(encoding="utf-8"))
            contents = _contents(record)
            if psutil.virtual_memory().available < int(record["memory"]):
                return None
            store = open_contents(contents, [FIFO() for _ in contents.pools], threads=0)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, GanglineError) as error:
            logger.debug("no head start: %s", error)
            return None
        request_all(store, contents.catalog)
        self._store, self._contents = store, contents
        return store

    @property
    def taken_bytes(self) -> int:
        """Bytes of memory that slots have taken so far."""
        return self._taken

    def claim(self, contents: Contents, caches: Sequence[CachePolicy]) -> ExpertStore | None:
        """Return the store that is being filled, if it has just these contents; else close it.

        It is the caller's then. ``caches``: its policies from now on, one for each kind of slot.
        """
        store = self._end()
        if store is None or self._contents != contents:
            self._discard(store)
            return None
        store.follow(caches)
        store.read_with(IO_THREADS)
        return store

    def close(self) -> None:
        """Stop reading what nobody has claimed, free its memory, and forget the record that misled."""
        self._discard(self._end())

    def _end(self) -> ExpertStore | None:
        """Let :meth:`begin` come to its end, and return its store, once."""
        self._over.set()
        with self._taking, self._opening:
            store, self._store = self._store, None
            return store

    def _discard(self, store: ExpertStore | None) -> None:
        self._taken = 0
        if store is None:
            return
        store.close()
        try:
            self._file().unlink(missing_ok=True)
        except OSError as error:
            logger.debug("a record that misleads stays: %s", error)

    def remember(self, contents: Contents, memory: int) -> None:
        """Write down what a store was opened with, for the next time.

        Args:
            contents: of the store.
            memory: bytes that must be available to begin so early.
        """
        try:
            write_record(self._file(), _record(contents) | {"memory": memory})
        except OSError as error:
            logger.debug("no head start the next time: %s", error)

    def _file(self) -> Path:
        return cache_dir("starts") / self._name


def _record(contents: Contents) -> dict[str, Any]:
    """Plain JSON of what :func:`_contents` reads, with sizes and times of the files."""
    catalog = contents.catalog
    return {
        "files": [[str(path), *_stat(path)] for path in catalog.files],
        "layouts": [[asdict(field) for field in layout.fields] for layout in catalog.layouts],
        "extents": [
            [key.layer, key.expert, [[part.file, part.offset, part.nbytes] for part in parts]]
            for key, parts in catalog.extents.items()
        ],
        "checksums": None
        if catalog.checksums is None
        else [[key.layer, key.expert, crc] for key, crc in catalog.checksums.items()],
        "pools": contents.pools,
        "io": contents.io,
        "warm": contents.warm,
    }


def _contents(record: dict[str, Any]) -> Contents:
    """Read a record; ValueError if its files have changed or it contradicts itself."""
    for path, *stat in record["files"]:
        if stat != _stat(Path(path)):
            raise ValueError(f"{path} has changed")
    checksums = record["checksums"]
    catalog = ExpertCatalog(
        files=tuple(Path(path) for path, *_ in record["files"]),
        layouts=tuple(ExpertLayout(tuple(_field(**field) for field in each)) for each in record["layouts"]),
        extents={
            ExpertKey(layer, expert): tuple(Extent(*part) for part in parts)
            for layer, expert, parts in record["extents"]
        },
        checksums=None
        if checksums is None
        else {ExpertKey(layer, expert): crc for layer, expert, crc in checksums},
    )
    pools = tuple((size, count, tuple(layers)) for size, count, layers in record["pools"])
    for parts in catalog.extents.values():
        for part in parts:
            if not (0 <= part.file < len(catalog.files) and part.offset >= 0 and part.nbytes > 0):
                raise ValueError(f"{part} is nowhere")
    return Contents(catalog, pools, record["io"], record["warm"])


def _field(shape: list[int], **others: Any) -> FieldSpec:
    rows, columns = shape
    return FieldSpec(shape=(rows, columns), **others)


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]

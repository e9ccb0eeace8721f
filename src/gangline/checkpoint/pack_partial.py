"""An expert pack under construction: a folder that other processes ignore, with a journal of finished layers.

A layer is in the journal only after its bytes have reached the disk, so whatever ends the process (Ctrl-C, a
full disk, power) costs at most the layer at hand.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gangline.checkpoint.pack_index import (
    DATA_FILE,
    FORMAT,
    INDEX_FILE,
    VERSION,
    PackIndex,
    PackLayout,
    parse_checksums,
)
from gangline.core.errors import PackError
from gangline.kernels.cpu.checksum import crc32

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"
VERIFIED_LAYERS = 2
"""Finished layers that are read again before a pack is continued."""
_AHEAD = 2
"""Experts that may wait for the writing thread; bounds the memory."""
_READ_BYTES = 1 << 24

Fields = tuple[Tensor, ...]


@dataclass
class PartialPack:
    """A pack being written.

    Attributes:
        folder: the folder under construction.
        key: what the pack is made for.
        layout: the records to be written.
        checksums: CRC-32 of every expert, for the layers that are finished.
    """

    folder: Path
    key: str
    layout: PackLayout
    checksums: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def finished_bytes(self) -> int:
        """Bytes of the finished layers."""
        return self.layout.starts[len(self.checksums)]

    def resume(self) -> None:
        """Take up what an earlier run left, if it belongs to this pack and its last layers are intact."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checksums = self._read_journal()
        data = self.folder / DATA_FILE
        size = data.stat().st_size if data.exists() else 0
        while self.checksums and self.finished_bytes > size:
            self.checksums.pop()
        while self.checksums and not self._last_layers_intact(data):
            logger.warning(
                "%s: layer %d is damaged and is written again", self.folder, len(self.checksums) - 1
            )
            self.checksums.pop()
        with data.open("ab"):
            os.truncate(data, self.finished_bytes)
        self._rewrite_journal()

    def _read_journal(self) -> list[tuple[int, ...]]:
        path = self.folder / JOURNAL_FILE
        checksums: list[tuple[int, ...]] = []
        if not path.is_file():
            return checksums
        lines = path.read_bytes().split(b"\n")
        try:
            if json.loads(lines[0]) != self._header():
                return checksums
            for line in lines[1:-1]:
                entry = json.loads(line)
                count = self.layout.experts[len(checksums)]
                checksums.append(parse_checksums(entry["crc32"], count, path))
        except (ValueError, LookupError, TypeError, RecursionError, PackError):
            # A torn last line is what a crash leaves; everything before it counts.
            logger.info("%s: the journal ends after %d layers", path, len(checksums))
        return checksums

    def _header(self) -> dict[str, Any]:
        header = {"format": FORMAT, "version": VERSION, "key": self.key, "layers": self.layout.to_json()}
        decoded: dict[str, Any] = json.loads(json.dumps(header))
        return decoded

    def _last_layers_intact(self, data: Path) -> bool:
        last = len(self.checksums)
        return all(
            layer_checksums(data, self.layout, layer) == self.checksums[layer]
            for layer in range(max(0, last - VERIFIED_LAYERS), last)
        )

    def _rewrite_journal(self) -> None:
        lines = [json.dumps(self._header())]
        lines += [_journal_line(layer, sums) for layer, sums in enumerate(self.checksums)]
        new = self.folder / f"{JOURNAL_FILE}.new"
        write_durably(new, "".join(f"{line}\n" for line in lines))
        new.replace(self.folder / JOURNAL_FILE)

    @contextmanager
    def writer(self, on_bytes: Callable[[int], None]) -> Iterator[Callable[[Iterator[Fields]], None]]:
        """Give a function that appends the next layer from its experts in order; ``on_bytes`` counts bytes.

        Reading (the caller's iterator) and writing overlap. Leaving the context waits for what is under way.
        """
        data = os.open(self.folder / DATA_FILE, os.O_WRONLY)
        journal = os.open(self.folder / JOURNAL_FILE, os.O_WRONLY | os.O_APPEND)
        pool = ThreadPoolExecutor(1, thread_name_prefix="gangline-pack")
        try:
            yield lambda experts: self._append_layer(experts, data, journal, pool, on_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
            os.close(journal)
            os.close(data)

    def _append_layer(
        self,
        experts: Iterator[Fields],
        data: int,
        journal: int,
        pool: ThreadPoolExecutor,
        on_bytes: Callable[[int], None],
    ) -> None:
        layer = len(self.checksums)
        stride, position = self.layout.record_bytes(layer), self.finished_bytes
        pending: deque[Future[int]] = deque()
        checksums: list[int] = []

        def collect() -> None:
            checksums.append(pending.popleft().result())
            on_bytes(stride)

        for fields in experts:
            pending.append(pool.submit(_write_record, data, fields, position, stride))
            position += stride
            if len(pending) > _AHEAD:
                collect()
        while pending:
            collect()
        if len(checksums) != self.layout.experts[layer]:
            raise PackError(
                f"{self.folder}: layer {layer} has {len(checksums)} experts, not {self.layout.experts[layer]}"
            )
        os.fsync(data)
        _write_all(journal, memoryview(f"{_journal_line(layer, checksums)}\n".encode()))
        os.fsync(journal)
        self.checksums.append(tuple(checksums))

    def publish(self, folder: Path, origin: str) -> PackIndex:
        """Write the index and give the pack its final name, in one step that either happens or does not."""
        index = PackIndex(self.key, origin, self.layout, tuple(self.checksums))
        write_durably(self.folder / INDEX_FILE, json.dumps(index.to_json()))
        sync_folder(self.folder)
        self.folder.rename(folder)
        sync_folder(folder.parent)
        (folder / JOURNAL_FILE).unlink()
        return index


def _journal_line(layer: int, checksums: Sequence[int]) -> str:
    return json.dumps({"layer": layer, "crc32": list(checksums)})


def _write_record(data: int, fields: Fields, position: int, stride: int) -> int:
    """Write one expert and its padding; return its CRC-32."""
    checksum = 0
    end = position
    for tensor in fields:
        view = memoryview(tensor.numpy().data).cast("B")
        checksum = crc32(view, checksum)
        _write_all(data, view, end)
        end += len(view)
    _write_all(data, memoryview(bytes(position + stride - end)), end)
    return checksum


def _write_all(descriptor: int, view: memoryview, position: int | None = None) -> None:
    done = 0
    while done < len(view):
        if position is None:
            done += os.write(descriptor, view[done:])
        else:
            done += os.pwrite(descriptor, view[done:], position + done)


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def layer_checksums(data: Path, layout: PackLayout, layer: int) -> tuple[int, ...]:
    """CRC-32 of every expert of a layer, read from the data file in steps of about 16 MiB."""
    nbytes, stride = layout.layouts[layer].nbytes, layout.record_bytes(layer)
    start, experts = layout.starts[layer], layout.experts[layer]
    group = max(1, _READ_BYTES // stride)
    buffer = memoryview(bytearray(group * stride))
    checksums: list[int] = []
    with data.open("rb", buffering=0) as stream:
        for first in range(0, experts, group):
            count = min(group, experts - first)
            _read_all(stream.fileno(), buffer[: count * stride], start + first * stride)
            checksums += [crc32(buffer[i * stride : i * stride + nbytes]) for i in range(count)]
    return tuple(checksums)


def _read_all(descriptor: int, view: memoryview, position: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            # The checksum of what is missing cannot match.
            view[done:] = bytes(len(view) - done)
            return
        done += count

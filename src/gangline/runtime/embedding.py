"""The input embedding left in the checkpoint's file: only a bounded part of it is ever resident.

transformers maps a dense weight that needs no conversion, so a row becomes resident when a token looks it up,
and with it whatever the kernel maps along, on recent Linux up to the whole 2 MiB folio of the page cache: a
prompt of some hundred tokens can make half of a large embedding resident. A prompt's rows are therefore
looked up in the order of the file, a part of it at a time, and each part's pages are given back before the
next. The row of a single token is read from the file and maps nothing.

Shape suffixes: V vocabulary, D hidden, U different tokens.
"""

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

PART_BYTES = 8 << 20  # of the table between two releases
FOLIO_BYTES = 2 << 20  # mapped by one fault at most: the largest folio that one page table holds
RESIDENT_BYTES = PART_BYTES + 2 * FOLIO_BYTES
_PAGE = mmap.PAGESIZE
_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT, _SWAPPED, _FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def lookup_table(model: nn.Module) -> str | None:
    """Return the name of an input embedding that can stay in its file, None if there is none.

    It can where only its rows are read (no output head shares it) and the system says which of its pages are
    there.

    Args:
        model: a transformers model, also one on ``meta``.
    """
    if not sys.platform.startswith("linux") or not os.access(_PAGEMAP, os.R_OK):
        return None
    table = model.get_input_embeddings()  # type: ignore[operator]
    if type(table) is not nn.Embedding or table.max_norm is not None:
        return None
    uses = [name for name, found in model.named_parameters(remove_duplicate=False) if found is table.weight]
    return uses[0] if len(uses) == 1 else None


def leave_in_file(table: nn.Embedding) -> Callable[[], None]:
    """Make an embedding whose weight is mapped from a file keep few of its pages; returns how to undo it.

    It computes what it did before, from the same weight.
    """
    pages = _TablePages(table.weight)
    if not pages.mapped_from_file():
        logger.warning(
            "the input embedding is not mapped from its file and takes %d MiB that were not planned",
            pages.nbytes >> 20,
        )
        return lambda: None
    lookup = _BoundedLookup(table, pages)
    table.forward = lookup  # type: ignore[method-assign, assignment]

    def undo() -> None:
        table.__dict__.pop("forward", None)
        lookup.close()

    return undo


def give_back(weight_OI: Tensor) -> None:
    """Give the pages of a weight that is not needed any more back to its file, if it is mapped from one."""
    pages = _TablePages(weight_OI)
    if pages.nbytes and sys.platform.startswith("linux") and pages.mapped_from_file():
        pages.release(0, weight_OI.shape[0] - 1)


class _BoundedLookup:
    """``nn.Embedding.forward`` on a mapped weight, part by part."""

    def __init__(self, table: nn.Embedding, pages: "_TablePages") -> None:
        self._table = table
        self._pages = pages
        self._weight = table.weight
        self._part_rows = max(1, PART_BYTES // (pages.nbytes // table.num_embeddings))
        self._rows = pages.open_file()

    def __call__(self, ids: Tensor) -> Tensor:
        if self._table.weight is not self._weight:  # exchanged by the user: nothing of ours holds any more
            return nn.Embedding.forward(self._table, ids)
        if ids.numel() == 1:
            return self._one(ids)
        ids_U, inverse = ids.unique(return_inverse=True)
        parts = []
        _, counts = (ids_U // self._part_rows).unique_consecutive(return_counts=True)
        for part_ids in ids_U.split(counts.tolist()):
            parts.append(nn.functional.embedding(part_ids, self._weight))
            self._pages.release(int(part_ids[0]), int(part_ids[-1]))
        return torch.cat(parts)[inverse]

    def close(self) -> None:
        """Close the file; lookups go through memory from then on."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _one(self, ids: Tensor) -> Tensor:
        token, width = int(ids), self._table.embedding_dim
        if self._rows is not None and 0 <= token < self._table.num_embeddings:
            row = self._rows.read(token) if self._pages.unchanged(self._weight, token) else None
            if row is not None:
                return row.view(self._weight.dtype).view(*ids.shape, width)
        found = nn.functional.embedding(ids, self._weight)
        if 0 <= token < self._table.num_embeddings:
            self._pages.release(token, token)
        return found


class _RowFile:
    """The file that a weight is mapped from."""

    def __init__(self, path: str, offset: int, row_bytes: int) -> None:
        self._offset, self._row_bytes = offset, row_bytes
        self._descriptor = os.open(path, os.O_RDONLY)
        # Rows follow no order: what the system would read beside them is for nobody.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, row: int) -> Tensor | None:
        """Return the bytes of a row, uint8; None where the file does not have them any more."""
        data = bytearray(self._row_bytes)
        count = os.preadv(self._descriptor, [data], self._offset + row * self._row_bytes)
        return torch.frombuffer(data, dtype=torch.uint8) if count == self._row_bytes else None


class _TablePages:
    """The pages of a weight ``[V, D]``."""

    def __init__(self, weight_VD: Tensor) -> None:
        self._begin = weight_VD.data_ptr()
        self._row_bytes = weight_VD.shape[1] * weight_VD.element_size()
        self.nbytes = weight_VD.numel() * weight_VD.element_size()

    def mapped_from_file(self) -> bool:
        """Whether one mapping of a file holds the weight."""
        return self._mapping() is not None

    def open_file(self) -> _RowFile | None:
        """Open the file that the weight is mapped from; None if its name leads elsewhere by now."""
        found = self._mapping()
        if found is None:
            return None
        path, offset, inode = found
        try:
            if Path(path).stat().st_ino != inode:
                return None
            return _RowFile(path, offset, self._row_bytes)
        except OSError as error:
            logger.debug("the input embedding's file %s cannot be opened: %s", path, error)
            return None

    def unchanged(self, weight_VD: Tensor, row: int) -> bool:
        """Whether a row of the weight is what its file holds, as far as nobody wrote the file."""
        if weight_VD.data_ptr() != self._begin:
            return False
        first = (self._begin + row * self._row_bytes) // _PAGE * _PAGE
        last = (self._begin + (row + 1) * self._row_bytes - 1) // _PAGE * _PAGE
        return not self._any_written(first, last + _PAGE - first)

    def _mapping(self) -> tuple[str, int, int] | None:
        """Return the file that holds the weight, where in it the weight begins, and its inode."""
        start, length = self._range(0, self.nbytes)
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            span, _, offset, _, inode, *name = line.split(maxsplit=5)
            low, high = (int(part, 16) for part in span.split("-"))
            if low <= start and start + length <= high:
                if not name or not name[0].startswith("/") or name[0].startswith("/dev/"):
                    return None
                return name[0], int(offset, 16) + self._begin - low, int(inode)
        return None

    def release(self, first: int, last: int) -> None:
        """Give the pages around rows ``first`` to ``last`` back to the file, unless one was written.

        A written page is no longer the file's: to give it back would undo what the user did to the weights.
        """
        low = first * self._row_bytes - FOLIO_BYTES
        high = (last + 1) * self._row_bytes + FOLIO_BYTES
        start, length = self._range(max(0, low), min(self.nbytes, high))
        if length <= 0 or self._any_written(start, length):
            return
        failed = _libc().madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED)
        )
        if failed:
            logger.debug("the pages of the input embedding cannot be given back")

    def _any_written(self, start: int, length: int) -> bool:
        with _PAGEMAP.open("rb", buffering=0) as file:
            file.seek(start // _PAGE * 8)
            states = np.frombuffer(file.read(length // _PAGE * 8), dtype=np.uint64)
        held = states[(states & (_PRESENT | _SWAPPED)) != 0]
        return not bool(np.all(held & _FILE))

    def _range(self, low: int, high: int) -> tuple[int, int]:
        """Return address and bytes of the whole pages between two offsets in the weight."""
        start = -(-(self._begin + low) // _PAGE) * _PAGE
        return start, (self._begin + high) // _PAGE * _PAGE - start


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)

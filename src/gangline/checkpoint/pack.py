"""The expert pack: all experts of a model in one file, each expert's matrices side by side and aligned.

It is derived data: made once per checkpoint and precision, read in place, checked by checksums, made again if
deleted.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gangline.checkpoint.pack_index import DATA_FILE, INDEX_FILE, PackIndex, PackLayout, read_index
from gangline.checkpoint.pack_partial import Fields, PartialPack, layer_checksums
from gangline.checkpoint.recode import recode, recode_layout
from gangline.checkpoint.source import ExpertSource
from gangline.core.errors import CheckpointError, PackError
from gangline.core.layout import ExpertCatalog, ExpertLayout
from gangline.core.sizes import format_size

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_SPARE_BYTES = 1 << 20
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_pack(
    source: ExpertSource,
    folder: str | Path,
    *,
    key: str,
    codec: str | None = None,
    origin: str = "",
    progress: Progress | None = None,
) -> ExpertCatalog:
    """Make the expert pack of a checkpoint, or use the one that is there.

    The experts pass through memory one after another. An interrupted run is continued by the next one. If
    another process is at work on the same pack, this one waits for it and uses its result.

    Args:
        source: the experts.
        folder: the folder to make; its parent must be on the disk where the pack shall lie.
        key: what the pack is made for: the same key must mean the same bytes.
        codec: codec to store every matrix in (approximate, unless it holds the stored values exactly), or
            ``None`` to keep the source's bytes. With a codec every matrix is laid ``(out, in)``. The word
            ``tiled`` means the order in which the native kernels read, without a change of any weight
            (``recode.py``).
        origin: the checkpoint, in words, for whoever reads the index.
        progress: called with bytes done and bytes in all.

    Raises:
        PackError: too little room on the disk (nothing is lost: run it again), the folder holds something
            else, or it cannot be written.
        FormatError: the codec cannot hold a matrix.
        CheckpointError: the source cannot be read.
    """
    folder = Path(folder)
    layout = PackLayout(tuple(recode_layout(item, codec) for item in source.layouts), tuple(source.experts))
    with _disk_errors(folder, layout):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            index = _finished(folder, key)
            if index is None:
                index = _make(source, layout, folder, key, origin, progress)
    return index.catalog(folder)


def open_pack(folder: str | Path, key: str | None = None) -> ExpertCatalog:
    """Return where every expert lies in a finished pack; only the index is read.

    Raises:
        PackError: there is no pack, its index is damaged, or it was made for another ``key``.
    """
    folder = Path(folder)
    index = read_index(folder)
    if key is not None and index.key != key:
        raise _other_key(folder)
    return index.catalog(folder)


def verify_pack(folder: str | Path, progress: Progress | None = None) -> int:
    """Read a whole pack and compare every checksum; returns the number of experts.

    Raises:
        PackError: names the first damaged expert.
    """
    folder = Path(folder)
    index = read_index(folder)
    layout = index.layout
    for layer, wanted in enumerate(index.checksums):
        found = layer_checksums(folder / DATA_FILE, layout, layer)
        for expert, (have, want) in enumerate(zip(found, wanted, strict=True)):
            if have != want:
                raise PackError(
                    f"{folder / DATA_FILE}: layer {layer}, expert {expert} fails its checksum; "
                    f"delete the folder {folder}, and it will be made again"
                )
        if progress is not None:
            progress(layout.starts[layer + 1], layout.nbytes)
    return sum(layout.experts)


def pack_bits(folder: str | Path) -> float:
    """True bits per weight of a finished pack, scales included."""
    return read_index(Path(folder)).layout.bits_per_weight


def _finished(folder: Path, key: str) -> PackIndex | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / INDEX_FILE).is_file():
        raise PackError(f"{folder} exists and is not an expert pack; move it away or delete it")
    index = read_index(folder)
    if index.key != key:
        raise _other_key(folder)
    return index


def _other_key(folder: Path) -> PackError:
    return PackError(
        f"{folder} was made for another model or precision; delete it, and it will be made again"
    )


def _make(
    source: ExpertSource, layout: PackLayout, folder: Path, key: str, origin: str, progress: Progress | None
) -> PackIndex:
    partial = PartialPack(folder.with_name(f".{folder.name}.partial"), key, layout)
    partial.resume()
    done, total = partial.finished_bytes, layout.nbytes
    if done:
        logger.info("%s: continued after %s", folder, format_size(done))
    _check_room(folder, total - done)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    on_bytes(0)
    with partial.writer(on_bytes) as append:
        for layer in range(len(partial.checksums), len(layout.layouts)):
            append(_recoded(source, layer, layout.layouts[layer]))
    return partial.publish(folder, origin)


def _recoded(source: ExpertSource, layer: int, target: ExpertLayout) -> Iterator[Fields]:
    """The experts of a layer in the layout of the pack."""
    specs = list(zip(source.layouts[layer].fields, target.fields, strict=True))
    experts = source.read_layer(layer)
    while True:
        try:
            _, fields = next(experts)
        except StopIteration:
            return
        except OSError as error:
            raise CheckpointError(
                f"layer {layer}: the checkpoint cannot be read ({error.strerror}: {error.filename}); "
                "check the disk it lies on"
            ) from error
        yield tuple(recode(raw, old, new) for raw, (old, new) in zip(fields, specs, strict=True))


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if needed + _SPARE_BYTES > free:
        raise PackError(
            f"{folder}: the expert pack needs {format_size(needed)} more, and the disk has "
            f"{format_size(free)} free; make room, or set GANGLINE_HOME to a folder on another disk"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time per pack. The lock file stays: without it two processes could hold two locks."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is making the expert pack %s; waiting for it", folder)
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(folder: Path, layout: PackLayout) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise PackError(
                f"{folder}: the expert pack cannot be written ({error.strerror or error})"
            ) from error
        free = shutil.disk_usage(folder.parent).free
        raise PackError(
            f"{folder}: the disk is full ({format_size(free)} free; the whole expert pack takes "
            f"{format_size(layout.nbytes)}); make room and run it again, it continues where it stopped"
        ) from error

import os
import threading

import pytest

from gangline.core.errors import UsageError
from gangline.runtime import bandwidth
from gangline.runtime.bandwidth import measure_disk, measure_ram


@pytest.fixture
def reads(monkeypatch):
    """Record every read: place, size and how many were in flight."""
    seen = []
    flight = 0
    lock = threading.Lock()
    preadv = os.preadv

    def watch(fd, buffers, place):
        nonlocal flight
        with lock:
            flight += 1
            seen.append((place, len(buffers[0]), flight))
        try:
            return preadv(fd, buffers, place)
        finally:
            with lock:
                flight -= 1

    monkeypatch.setattr(bandwidth.os, "preadv", watch)
    return seen


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(8 * bandwidth.MIB))
    return path


def test_disk_reads_are_aligned_spread_and_whole(data, reads):
    rate = measure_disk(data, size=100_000, depth=2, seconds=0.2)
    assert rate > 0
    size = 102_400
    places = [place for place, _, _ in reads]
    assert all(place % 4096 == 0 and nbytes == size for place, nbytes, _ in reads)
    first_round = places[: data.stat().st_size // size]
    assert len(set(first_round)) == len(first_round)
    assert max(flight for _, _, flight in reads) <= 2


def test_rate_is_bytes_read_over_time(data, reads):
    seconds = 0.3
    rate = measure_disk(data, size=65536, depth=1, seconds=seconds)
    # The clock stops no earlier than `seconds`: the rate cannot exceed all bytes over that time.
    assert rate <= sum(nbytes for _, nbytes, _ in reads) / seconds


def test_folder_gets_a_scratch_file_and_is_left_empty(tmp_path, monkeypatch, reads):
    monkeypatch.setattr(bandwidth, "SCRATCH_BYTES", 4 * bandwidth.MIB)
    assert measure_disk(tmp_path, size=bandwidth.MIB, depth=1, seconds=0.1) > 0
    assert {place for place, _, _ in reads} <= {0, bandwidth.MIB, 2 * bandwidth.MIB, 3 * bandwidth.MIB}
    assert list(tmp_path.iterdir()) == []


def test_folder_with_a_large_file_uses_it(data, monkeypatch, reads):
    monkeypatch.setattr(bandwidth, "SCRATCH_BYTES", 8 * bandwidth.MIB)
    monkeypatch.setattr(bandwidth, "_write_scratch", lambda *_: pytest.fail("wrote a scratch file"))
    assert measure_disk(data.parent, size=bandwidth.MIB, seconds=0.1) > 0


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bandwidth.os, "fsync", full)
    monkeypatch.setattr(bandwidth, "SCRATCH_BYTES", bandwidth.MIB)
    with pytest.raises(UsageError, match="No space left"):
        measure_disk(tmp_path, size=4096, seconds=0.1)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(data, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        measure_disk(tmp_path / "none")
    with pytest.raises(UsageError, match="less than one read"):
        measure_disk(data, size=9 * bandwidth.MIB)
    with pytest.raises(UsageError, match="depth 0"):
        measure_disk(data, depth=0)
    with pytest.raises(UsageError, match="0 threads"):
        measure_ram(0)


def test_ram_uses_one_block_per_thread(monkeypatch):
    monkeypatch.setattr(bandwidth, "RAM_BLOCK_BYTES", bandwidth.MIB)
    assert measure_ram(2, seconds=0.05) > 0

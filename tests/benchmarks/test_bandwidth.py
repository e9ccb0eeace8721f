import os
import random
import threading

import pytest

from gangline.core.errors import UsageError
from gangline.runtime import bandwidth, best_bandwidth
from gangline.runtime.bandwidth import measure_disk, measure_ram
from gangline.runtime.best_bandwidth import DiskPeak, Way, best_disk, ways_to_read


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
    # The last of a round may be overtaken by the other thread, which begins the next.
    first_round = places[: data.stat().st_size // size - 1]
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


def test_records_are_read_in_chunks_one_after_another(data, reads):
    size, chunk = 3 * 4096, 2 * 4096
    measure_disk(data, size=size, chunk=chunk, depth=1, seconds=0.05)
    places = [(place, length) for place, length, _ in reads]
    for first, second in zip(places[::2], places[1::2], strict=False):
        assert first[0] % size == 0
        assert (first[1], second) == (chunk, (first[0] + chunk, size - chunk))


@pytest.fixture
def windows(monkeypatch):
    """Replace the disk by a list of rates; return what was asked of it."""
    asked = []

    def play(rates):
        remaining = iter(rates)

        def measure(file, *, size, chunk, depth, seconds, direct):
            asked.append((file, Way(chunk, depth, direct)))
            return next(remaining)

        monkeypatch.setattr(best_bandwidth, "measure_disk", measure)
        monkeypatch.setattr(best_bandwidth, "_delivered", lambda: None)
        return asked

    return play


def test_the_bound_is_the_best_of_interleaved_windows(tmp_path, windows):
    record = 12 * bandwidth.MIB
    ways = ways_to_read(record)
    rates = [float(n) for n in range(1, 2 * len(ways) + 1)]
    random.shuffle(rates)
    asked = windows(rates)
    peak = best_disk([tmp_path / "a", tmp_path / "b"], record, rounds=2)
    assert [way for _, way in asked] == ways * 2
    assert peak == DiskPeak(max(rates), str(ways[rates.index(max(rates)) % len(ways)]), len(rates))
    assert {way.direct for way in ways} == {True, False}


def test_small_records_are_not_read_the_same_way_twice(tmp_path, windows):
    ways = ways_to_read(4096)
    assert len(ways) == len(set(ways)) < len(ways_to_read(12 * bandwidth.MIB))
    assert all(way.chunk == 4096 for way in ways)


def test_pages_in_memory_are_not_the_disks_speed(data):
    if best_bandwidth._delivered() is None:
        pytest.skip("this system does not count what the disk delivers")
    data.read_bytes()
    rate = best_bandwidth._at_most_delivered(lambda: 1e15)
    assert rate < 1e12


def test_best_of_real_windows(data):
    peak = best_disk([data], bandwidth.MIB, rounds=1, window=0.02)
    assert peak.rate > 0
    assert "depth" in peak.way


def test_memory_takes_the_best_window(monkeypatch):
    rates = iter([3.0, 7.0, 5.0])
    monkeypatch.setattr(bandwidth, "_rate", lambda *_: next(rates))
    monkeypatch.setattr(bandwidth, "RAM_BLOCK_BYTES", 4096)
    assert measure_ram(1, seconds=0.01, windows=3) == 7.0

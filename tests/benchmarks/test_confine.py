import os
import sys
from pathlib import Path

import pytest

from gangline.benchmarks import confine
from gangline.benchmarks.confine import leave_report, read_ahead, run_confined, storage_bytes_read
from gangline.benchmarks.roofline import Beside, beside_disk, beside_ram, best_disk
from gangline.core.errors import UsageError
from gangline.runtime.bandwidth import measure_disk

MIB = 2**20
LEAVE = "from gangline.benchmarks.confine import leave_report; leave_report({'answer': 41 + 1})"


def python(code):
    return [sys.executable, "-c", code]


def has_memory_groups():
    group = Path("/sys/fs/cgroup/memory")
    return sys.platform == "linux" and group.is_dir() and os.access(group, os.W_OK)


@pytest.fixture
def source_path(monkeypatch):
    """Let children import the package wherever it was imported from here."""
    monkeypatch.setenv("PYTHONPATH", str(Path(confine.__file__).parents[2]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestRun:
    def test_report_and_peak_are_seen_from_outside(self, source_path):
        plain = run_confined(python("import time; time.sleep(0.3)"))
        large = run_confined(python(f"x = b'1' * {200 * MIB}; import time; time.sleep(0.3); {LEAVE}"))
        assert (plain.returncode, plain.report, plain.peak_group_bytes) == (0, None, None)
        assert large.report == {"answer": 42}
        assert 200 * MIB <= large.peak_resident_bytes - plain.peak_resident_bytes < 300 * MIB
        assert large.seconds > 0.3

    def test_a_failure_shows_its_last_words(self):
        seen = run_confined(python("raise SystemExit('out of luck')"))
        assert seen.returncode == 1
        assert "out of luck" in seen.stderr_tail

    def test_a_run_that_takes_too_long_is_ended(self):
        seen = run_confined(python("import time; time.sleep(60)"), timeout=0.2)
        assert seen.returncode == -9
        assert seen.seconds < 30

    def test_environment_reaches_the_child(self):
        seen = run_confined(python("import os, sys; sys.exit(int(os.environ['CODE']))"), env={"CODE": "7"})
        assert seen.returncode == 7

    @pytest.mark.skipif(not has_memory_groups(), reason="needs root and a version 1 memory controller")
    def test_the_limit_counts_and_kills(self, source_path):
        fits = run_confined(python(f"x = b'1' * {50 * MIB}; {LEAVE}"), memory=200 * MIB)
        assert fits.report == {"answer": 42}
        assert 50 * MIB < fits.peak_group_bytes <= 200 * MIB
        killed = run_confined(python(f"x = b'1' * {400 * MIB}; {LEAVE}"), memory=200 * MIB)
        assert (killed.returncode, killed.report) == (-9, None)
        assert not (confine.CGROUP_ROOT / "memory" / f"gangline-bench-{os.getpid()}").exists()


def test_a_machine_without_groups_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(confine, "CGROUP_ROOT", tmp_path)
    with pytest.raises(UsageError, match="no memory controller"):
        run_confined(python("pass"), memory=MIB)


def test_version_2_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(confine, "CGROUP_ROOT", tmp_path)
    (tmp_path / "cgroup.controllers").write_text("memory")
    with confine._group(123 * MIB) as group:
        assert (group / "memory.max").read_text() == str(123 * MIB)
        (group / "memory.peak").write_text("77")
        assert confine._peak_of_group(group) == 77
        for file in group.iterdir():
            file.unlink()
    assert not group.exists()


def test_reports_are_printed_without_a_parent(monkeypatch, capsys):
    monkeypatch.delenv(confine.REPORT_ENV, raising=False)
    leave_report({"answer": 42})
    assert '"answer": 42' in capsys.readouterr().out


def test_read_ahead_is_restored_also_after_an_error(tmp_path, monkeypatch):
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192\n")
    monkeypatch.setattr(confine, "_read_ahead_setting", lambda path: setting)
    with pytest.raises(KeyError), read_ahead(tmp_path, 128):
        assert setting.read_text() == "128\n"
        raise KeyError
    assert setting.read_text() == "8192\n"
    with read_ahead(tmp_path, None):
        assert setting.read_text() == "8192\n"
    setting.unlink()
    with pytest.raises(UsageError, match="read-ahead"), read_ahead(tmp_path, 128):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_direct_reads_are_counted(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(4 * MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    before = storage_bytes_read()
    if path.stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("the temporary folder lies in memory")
    measure_disk(path, size=MIB, depth=1, seconds=0.01)
    assert storage_bytes_read() - before >= MIB


def test_share_of_the_limit():
    beside = Beside(before=1e9, after=3e9)
    assert beside.best == 3e9
    assert beside.share(1.5e9, 1.0) == pytest.approx(0.5)


def test_measured_around_the_run(tmp_path, monkeypatch):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(2 * MIB))
    assert best_disk([path], 65536) > 0
    rates = iter([5.0, 7.0])
    monkeypatch.setattr("gangline.benchmarks.roofline.best_disk", lambda *_: next(rates))
    assert beside_disk([path], 4096, lambda: "done") == ("done", Beside(5.0, 7.0))
    rams = iter([1.0, 2.0])
    monkeypatch.setattr("gangline.runtime.best_bandwidth.best_ram", lambda threads: next(rams))
    assert beside_ram(2, lambda: 3) == (3, Beside(1.0, 2.0))

import importlib.metadata
import json

import pytest

from gangline.cli import health
from gangline.runtime import machine, measure
from gangline.runtime.machine import (
    DiskSpeed,
    ExpertSpeed,
    GemmSpeed,
    LayerCost,
    MachineProfile,
    RecordSpeed,
    hardware,
)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measuring takes no time, and is remembered."""
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path))
    calls = []

    def quickly(folder, *, quick, progress):
        calls.append(quick)
        progress("disk")
        profile = MachineProfile(
            hardware=hardware(folder),
            features=("avx2",),
            block=2**22,
            disk=(DiskSpeed(1, None, 1e9), DiskSpeed(2, 2e9, 1.5e9)),
            ram=3e10,
            gemm=(GemmSpeed(1, 1e9, 2e9),),
            records=(RecordSpeed(2**22, 1e9, 2e9, 3e9),),
            experts=(ExpertSpeed("bf16", 1, 1e-9), ExpertSpeed("bf16", 64, 4e-9)),
            layer_cost=LayerCost(1e-3, 1e-4, 2e-4),
            date="2026-01-01T00:00:00+00:00",
            quick=quick,
        )
        machine.save_profile(profile)
        return profile

    monkeypatch.setattr(measure, "measure_machine", quickly)
    return calls


def test_measures_and_stores(gangline, measured, tmp_path):
    result = gangline("doctor", "--json", "--quick")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ok"] is True
    assert found["machine"]["ram"] == 3e10
    assert measured == [True]
    assert machine.load_profile(tmp_path).to_dict()["quick"] is True
    assert result.stderr == "disk\n"


def test_names_processor_memory_disk_and_extras(gangline, measured):
    lines = {line["name"]: line for line in json.loads(gangline("doctor", "--json").stdout)["lines"]}
    assert {"python", "processor", "native core", "memory", "cache", "extra gguf"} <= set(lines)
    assert all(line["status"] in ("ok", "info", "warn") for line in lines.values())


def test_without_measuring_shows_what_is_stored(gangline, measured):
    result = gangline("doctor", "--no-measure")
    assert result.exit_code == 0
    assert "not measured yet" in result.stdout
    gangline("doctor")
    again = gangline("doctor", "--no-measure")
    assert "2.00 GB/s (direct, depth 2" in again.stdout
    assert measured == [False]


def test_only_fail_changes_the_exit_code(gangline, measured, monkeypatch):
    found = [health.Line("ok", "a", ""), health.Line("info", "b", ""), health.Line("warn", "c", "")]
    monkeypatch.setattr(health, "health", lambda folder: iter(found))
    assert gangline("doctor", "--no-measure").exit_code == 0
    found.append(health.Line("FAIL", "d", "broken; mend it"))
    result = gangline("doctor")
    assert result.exit_code == 3
    assert "FAIL  d" in result.stdout
    assert measured == []


def test_missing_and_old_libraries_fail(monkeypatch):
    wanted = ["torch>=999", "no-such-library>=1", "numpy>=1", "pytest>=1; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    lines = {line.name: line for line in health._libraries()}
    assert {name: line.status for name, line in lines.items()} == {
        "torch": "FAIL",
        "no-such-library": "FAIL",
        "numpy": "ok",
    }
    assert "pip install 'torch>=999'" in lines["torch"].detail
    assert "not installed" in lines["no-such-library"].detail


def test_folder_that_cannot_be_written_fails(monkeypatch, tmp_path):
    def refuse(**where):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(health.tempfile, "TemporaryFile", refuse)
    (line,) = health._disk(tmp_path)
    assert line.status == "FAIL"
    assert "GANGLINE_HOME" in line.detail


def test_little_space_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    (line,) = health._disk(tmp_path)
    assert line.status == "warn"
    assert "1.00 GiB free" in line.detail

import json
from pathlib import Path

import pytest

from gangline.runtime import machine
from gangline.runtime.machine import MachineProfile, hardware, load_profile, measure_machine


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Real measurements, but of a tiny file and tiny matrices."""
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    full = machine.scratch_file
    monkeypatch.setattr(machine, "scratch_file", lambda folder: full(folder, 8 * 2**20))
    monkeypatch.setattr(machine, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(machine, "_GEMM_SIDE", 64)
    monkeypatch.setattr(machine, "_GEMM_POOL_BYTES", 64 * 64 * 8)
    real_disk = machine.measure_disk
    monkeypatch.setattr(
        machine,
        "measure_disk",
        lambda file, seconds, **how: real_disk(file, seconds=0.01, **how),
    )
    median = machine._median_seconds
    monkeypatch.setattr(machine, "_median_seconds", lambda call, seconds: median(call, 0))
    monkeypatch.setattr(machine, "measure_ram", lambda cores, seconds: 1e9 * cores)
    return tmp_path


def test_measured_profile_is_stored_and_read_back(short):
    steps = []
    profile = measure_machine(short, quick=True, progress=steps.append)
    assert [point.depth for point in profile.disk] == [1, 2, 4, 8]
    assert all(point.cached > 0 for point in profile.disk)
    assert [point.rows for point in profile.gemm] == [1, 64, 512]
    assert all(point.fp32 > 0 and point.bf16 > 0 for point in profile.gemm)
    assert 0 < profile.call_overhead < 1
    assert profile.ram == 1e9 * profile.hardware.cores
    assert len(steps) == 3
    assert load_profile(short) == profile
    assert not list(short.glob(".gangline*")), "the scratch file is gone"


def test_profile_survives_json(short):
    profile = measure_machine(short, quick=True)
    again = MachineProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again == profile


def test_best_disk_takes_the_fastest_way(short):
    profile = measure_machine(short, quick=True)
    mode, depth, rate = profile.best_disk
    rates = [point.cached for point in profile.disk] + [point.direct or 0 for point in profile.disk]
    assert rate == max(rates)
    point = next(point for point in profile.disk if point.depth == depth)
    assert getattr(point, mode) == rate


def test_no_profile_yet(monkeypatch, tmp_path):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path))
    assert load_profile() is None


def test_profile_of_another_machine_is_refused(short, monkeypatch):
    measure_machine(short, quick=True)
    monkeypatch.setattr(machine, "_cpu_name", lambda: "Some Other CPU")
    assert load_profile(short) is None


def test_profile_moved_from_another_machine_is_refused(short):
    measure_machine(short, quick=True)
    (file,) = (short / "home" / "machine").glob("*.json")
    data = json.loads(file.read_text())
    data["hardware"]["cpu"] = "Some Other CPU"
    file.write_text(json.dumps(data))
    assert load_profile(short) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"hardware": 3}', '{"hardware": {"cpu": 1}}', "\x00"])
def test_damaged_profile_counts_as_none(short, content):
    measure_machine(short, quick=True)
    (file,) = (short / "home" / "machine").glob("*.json")
    file.write_text(content)
    assert load_profile(short) is None


def test_profile_of_another_schema_is_refused(short):
    measure_machine(short, quick=True)
    (file,) = (short / "home" / "machine").glob("*.json")
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "schema": 0}))
    assert load_profile(short) is None


def test_hardware_names_cpu_and_disk(tmp_path):
    found = hardware(tmp_path)
    assert found.cpu
    assert found.cores >= 1
    assert found.ram > 2**20
    assert found.key == hardware(tmp_path).key


def test_cpu_name_is_read_from_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fancy 9000\n")
    assert machine._cpu_name(cpuinfo) == "Fancy 9000"
    assert machine._cpu_name(Path(tmp_path / "absent"))

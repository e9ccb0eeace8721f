import json
from pathlib import Path

import pytest
import torch

from gangline.runtime import calibrate, machine, measure
from gangline.runtime.calibrate import expert_speeds, layer_cost
from gangline.runtime.machine import LayerCost, MachineProfile, hardware, load_profile
from gangline.runtime.measure import measure_machine

CODECS = ("bf16", "int4g64", "ggml:Q4_0")


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Real measurements, but of a tiny file and tiny matrices."""
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    full = measure.scratch_file
    monkeypatch.setattr(measure, "scratch_file", lambda folder: full(folder, 8 * 2**20))
    monkeypatch.setattr(measure, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(measure, "RECORDS", (2**18, 2**20))
    monkeypatch.setattr(measure, "_GEMM_SIDE", 64)
    monkeypatch.setattr(measure, "_GEMM_POOL_BYTES", 64 * 64 * 8)
    monkeypatch.setattr(calibrate, "WIDTH", 256)
    monkeypatch.setattr(calibrate, "POOL_BYTES", 0)
    real_disk, real_experts, real_times = measure.measure_disk, expert_speeds, calibrate.typical_seconds
    monkeypatch.setattr(
        measure,
        "measure_disk",
        lambda file, seconds, **how: real_disk(file, seconds=0.01, **how),
    )
    for module in (measure, calibrate):
        monkeypatch.setattr(module, "typical_seconds", lambda call, seconds: real_times(call, 0))
    monkeypatch.setattr(measure, "expert_speeds", lambda seconds: real_experts(seconds, CODECS))
    monkeypatch.setattr(measure, "layer_cost", lambda: LayerCost(1e-3, 1e-4, 2e-4))
    monkeypatch.setattr(measure, "measure_ram", lambda cores, seconds: 1e9 * cores)
    return tmp_path


def test_measured_profile_is_stored_and_read_back(short):
    steps = []
    profile = measure_machine(short, quick=True, progress=steps.append)
    assert [point.depth for point in profile.disk] == [1, 2, 4, 8]
    assert all(point.cached > 0 for point in profile.disk)
    assert [point.rows for point in profile.gemm] == [1, 64, 512]
    assert all(point.fp32 > 0 and point.bf16 > 0 for point in profile.gemm)
    assert {(at.codec, at.rows) for at in profile.experts} == {
        (codec, rows) for codec in CODECS for rows in calibrate.ROWS
    }
    assert all(0 < at.seconds < 1 for at in profile.experts)
    assert all(0 < at.low <= at.median <= at.high for at in profile.records)
    assert profile.ram == 1e9 * profile.hardware.cores
    assert len(steps) == 5
    assert load_profile(short) == profile
    assert not list(short.glob(".gangline*")), "the scratch file is gone"


def test_layers_cost_time_apart_from_their_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path))
    state = torch.random.get_rng_state()
    found = layer_cost(tokens=3)
    assert min(found.layer, found.expert, found.prompt_expert) >= 0
    assert 0 < found.layer + found.expert < 1
    assert torch.equal(torch.random.get_rng_state(), state), "measuring draws no number of the user's"
    assert not list((tmp_path / "attached").iterdir())


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

"""CPU feature detection: the native answer agrees with the system's; the fallback reads what it is given."""

import platform
from pathlib import Path

import pytest

from gangline.kernels.cpu import cpu_features, native
from gangline.kernels.cpu.features import _ARM64, _X86, features_from_system

CPUINFO = Path("/proc/cpuinfo")


def write_cpuinfo(path: Path, key: str, flags: list[str]) -> Path:
    path.write_text(f"processor\t: 0\nmodel name\t: any\n{key}\t\t: {' '.join(flags)}\n\nprocessor\t: 1\n")
    return path


@pytest.mark.skipif(not CPUINFO.is_file(), reason="no /proc/cpuinfo on this system")
def test_native_agrees_with_the_operating_system():
    core = native()
    if core is None:
        pytest.skip("the native core is not built here")
    assert core.cpu_features() == features_from_system()


def test_features_imply_their_base():
    found = cpu_features()
    for name, is_there in found.items():
        if is_there and name.startswith("avx512"):
            assert found["avx512f"], name
        if is_there and name in ("avx2", "fma", "f16c", "avx512f"):
            assert found["avx"], name
    if platform.machine() in ("aarch64", "arm64"):
        assert found["neon"]


@pytest.mark.parametrize(
    ("machine", "key", "table", "always"),
    [("x86_64", "flags", _X86, set()), ("aarch64", "Features", _ARM64, {"neon"})],
)
def test_fallback_reads_each_flag(tmp_path, machine, key, table, always):
    for name, flag in table.items():
        found = features_from_system(write_cpuinfo(tmp_path / "cpuinfo", key, ["other", flag]), machine)
        assert {feature for feature, is_there in found.items() if is_there} == {name} | always


def test_fallback_without_cpuinfo_knows_only_the_baseline(tmp_path):
    assert not any(features_from_system(tmp_path / "missing", "x86_64").values())
    arm = features_from_system(tmp_path / "missing", "arm64")
    assert [name for name, is_there in arm.items() if is_there] == ["neon"]
    assert features_from_system(tmp_path / "missing", "riscv64") == {}

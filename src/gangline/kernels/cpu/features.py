"""CPU features without native code: the kernel's list in ``/proc/cpuinfo``, under the native core's names."""

import platform
from pathlib import Path

# our name -> the kernel's name in the "flags" line
_X86 = {
    "pclmulqdq": "pclmulqdq",
    "sse4_1": "sse4_1",
    "sse4_2": "sse4_2",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512dq": "avx512dq",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512_vbmi": "avx512vbmi",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
}
# our name -> the kernel's name in the "Features" line
_ARM64 = {
    "neon": "asimd",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "fp16": "asimdhp",
    "sve": "sve",
}


def features_from_system(
    cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None
) -> dict[str, bool]:
    """Return feature name -> bool as the operating system reports it.

    The Linux kernel drops a flag whose registers it does not save, so the flag alone is enough. Where there
    is no ``cpuinfo`` only what the architecture guarantees is true.

    Args:
        cpuinfo: file in the format of ``/proc/cpuinfo``.
        machine: architecture as ``platform.machine()`` names it; by default this machine's.
    """
    architecture = (machine or platform.machine()).lower()
    if architecture in ("x86_64", "amd64", "i386", "i686"):
        flags = _flags(cpuinfo, "flags")
        return {name: flag in flags for name, flag in _X86.items()}
    if architecture in ("aarch64", "arm64"):
        flags = _flags(cpuinfo, "Features") | {"asimd"}
        return {name: flag in flags for name, flag in _ARM64.items()}
    return {}


def _flags(cpuinfo: Path, key: str) -> set[str]:
    if not cpuinfo.is_file():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return set(value.split())
    return set()

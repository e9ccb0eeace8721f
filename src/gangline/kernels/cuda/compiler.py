"""Compile CUDA sources with NVRTC, once for each GPU architecture, options and compiler version.

NVRTC needs no GPU: kernels can be compiled, and are tested to compile, on any machine that has it.
"""

import hashlib
import io
import logging
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec

from gangline.core.home import cache_dir
from gangline.kernels.cuda.errors import CudaKernelError
from gangline.kernels.cuda.sources import source_folder, source_hash

_log = logging.getLogger(__name__)
_ARCH = re.compile(r"sm_\d{2,3}a?")
_INSTALL = "install it with: pip install 'gangline[cuda]'"


@dataclass(frozen=True)
class KernelBuild:
    """One kernel to compile.

    Attributes:
        source: file name in ``csrc/cuda``.
        name: of the kernel, declared ``extern "C"``.
        defines: preprocessor macros that choose its sizes.
    """

    source: str
    name: str
    defines: tuple[tuple[str, str], ...] = ()


def compiler_missing() -> str | None:
    """Why nothing can be compiled here, or None if it can."""
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return f"the package cuda-core is not installed; {_INSTALL}"
    try:
        _nvrtc_version()
    except CudaKernelError as error:
        return str(error)
    return None


def compile_cubin(build: KernelBuild, arch: str) -> bytes:
    """Machine code of a kernel for ``arch`` (``sm_80``, ``sm_90a``, ...), from the cache if it is there.

    The cache is ``cubin/`` in gangline's cache folder. Its key is the hash of all sources, the kernel, its
    macros, the architecture and NVRTC's version. A file gets its name only when it is complete.

    Raises:
        CudaKernelError: cuda-core or NVRTC is missing, or the source does not compile; with its message.
    """
    if not _ARCH.fullmatch(arch):
        raise CudaKernelError(f"{arch!r} is no GPU architecture; write it like sm_80 or sm_90a")
    missing = compiler_missing()
    if missing is not None:
        raise CudaKernelError(f"CUDA kernels cannot be compiled: {missing}")
    options = repr((source_hash(), build, arch, _nvrtc_version()))
    key = hashlib.sha256(options.encode()).hexdigest()[:32]
    path = cache_dir("cubin") / f"{build.name}-{arch}-{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = _compile(build, arch)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(code)
    partial.replace(path)
    return code


def _compile(build: KernelBuild, arch: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    folder = source_folder()
    options = ProgramOptions(
        name=build.source,
        std="c++17",
        arch=arch,
        include_path=[str(folder)],
        define_macro=list(build.defines) or None,
    )
    log = io.StringIO()
    _log.info("compiling %s (%s) for %s", build.source, dict(build.defines), arch)
    try:
        program = Program((folder / build.source).read_text(), "c++", options)
        return bytes(program.compile("cubin", logs=log).code)
    except Exception as error:
        # cuda-core raises errors of several packages for the same thing; none may pass as something else.
        raise CudaKernelError(
            f"{build.source} does not compile for {arch} with NVRTC {'.'.join(map(str, _nvrtc_version()))}: "
            f"{error} {log.getvalue()}; a newer NVRTC may know this architecture"
        ) from error


def _nvrtc_version() -> tuple[int, int]:
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CudaKernelError(f"NVRTC cannot be loaded ({error}); {_INSTALL}") from error
    if int(status) != 0:
        raise CudaKernelError(f"NVRTC answers {status}; {_INSTALL}")
    return int(major), int(minor)

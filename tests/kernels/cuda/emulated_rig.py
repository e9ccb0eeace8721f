"""Run the CUDA sources on the CPU, as they are: a launcher that compiles them with a C++ compiler.

``emulated/ptx.cuh`` stands in for the device instructions; ``emulated/fibers.hpp`` says what it checks
besides the result.
"""

import ctypes
import functools
import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gangline.kernels.cuda.compiler import KernelBuild
from gangline.kernels.cuda.launcher import Argument, Launch
from gangline.kernels.cuda.sources import source_folder

_HERE = Path(__file__).parent / "emulated"


def compiler() -> str:
    """A C++ compiler; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        pytest.skip("no C++ compiler: the CUDA sources cannot be run on the CPU")
    return found


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="gangline-emulated-")


def _compile(arguments: list[str]) -> None:
    options = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    run = subprocess.run([compiler(), *options, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@functools.cache
def _machine() -> tuple[str, ...]:
    """Object files of the emulated GPU."""
    objects = []
    for name in ("fibers", "warpgroups"):
        objects.append(str(Path(_folder().name, f"{name}.o")))
        _compile(["-c", str(_HERE / f"{name}.cpp"), "-o", objects[-1]])
    return tuple(objects)


@functools.cache
def library(build: KernelBuild) -> ctypes.CDLL:
    """The kernel as a library, compiled once in a run."""
    name = hashlib.sha256(repr(build).encode()).hexdigest()[:16]
    path = Path(_folder().name, f"{name}.so")
    macros = [
        f"-D{key}={value}"
        for key, value in (
            *build.defines,
            ("GANGLINE_SOURCE", f"<{build.source}>"),
            ("GANGLINE_KERNEL", build.name),
        )
    ]
    includes = [f"-I{_HERE}", f"-I{source_folder()}"]
    _compile(["-shared", *includes, *macros, str(_HERE / "run.cpp"), *_machine(), "-o", str(path)])
    loaded = ctypes.CDLL(str(path))
    loaded.emulated_run.restype = ctypes.c_char_p
    return loaded


@dataclass
class EmulatedLauncher:
    """Starts kernels on the CPU.

    Attributes:
        seed: of the order in which threads run.
        late: whether asynchronous copies arrive as late as the waits allow, or at once.
        readable: tensors that copies may read, besides the arguments.
        arch: decides the sizes of stages, as on a GPU.
        multiprocessors: decide into how many parts columns are split.
    """

    seed: int = 0
    late: bool = True
    readable: list[Tensor] = field(default_factory=list)
    arch: str = "sm_90a"
    multiprocessors: int = 1
    started: list[Launch] = field(default_factory=list)

    def tensor_map(self, address: int, *, columns: int, rows: int, box: tuple[int, int]) -> Tensor:
        """As ``emulated/fibers.hpp`` reads it."""
        kind = int.from_bytes(b"tilemap", "little")
        words = struct.pack("<7Q", address, columns, rows, 2 * columns, *box, kind)
        return torch.frombuffer(bytearray(words.ljust(128, b"\0")), dtype=torch.uint8)

    def __call__(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        self.started.append(launch)
        values = [_as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        tensors = [*self.readable, *(a for a in arguments if isinstance(a, Tensor))]
        starts = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        sizes = (ctypes.c_size_t * len(tensors))(*(t.numel() * t.element_size() for t in tensors))
        grid = (ctypes.c_int(launch.grid[0]), ctypes.c_int(launch.grid[1]), ctypes.c_int(launch.threads))
        shared, late, seed = (
            ctypes.c_size_t(launch.shared_bytes),
            ctypes.c_int(self.late),
            ctypes.c_uint(self.seed),
        )
        failure = library(launch.build).emulated_run(
            *grid, shared, late, seed, pointers, starts, sizes, len(tensors)
        )
        assert failure is None, failure.decode()


def _as_c(argument: Argument) -> ctypes._SimpleCData:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(0)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int32(argument)

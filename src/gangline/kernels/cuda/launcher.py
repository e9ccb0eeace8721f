"""Load compiled kernels and start them on torch's current stream."""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gangline.kernels.cuda.compiler import KernelBuild, compile_cubin
from gangline.kernels.cuda.errors import CudaKernelError

Argument = Tensor | int | float | None
"""A tensor is its address, None a null pointer, int is 32 bits wide, float is fp32."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is started.

    Attributes:
        build: what to start.
        grid: blocks.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    build: KernelBuild
    grid: tuple[int, int]
    threads: int
    shared_bytes: int = 0


class Launcher(Protocol):
    """Starts kernels; the tests have one that runs them on the CPU."""

    @property
    def arch(self) -> str:
        """Architecture that kernels are compiled for, for example ``sm_90a``."""
        ...

    @property
    def multiprocessors(self) -> int:
        """How many blocks run at once at least."""
        ...

    def tensor_map(self, address: int, *, columns: int, rows: int, box: tuple[int, int]) -> Tensor:
        """Return 128 bytes (uint8, on the CPU) that tell Hopper's copy engine of a matrix.

        Args:
            address: of its first element, on the device.
            columns: bf16 numbers of a row; rows follow each other without gaps.
            rows: of the matrix; what a tile has beyond them is zero.
            box: columns and rows of a tile; 64 columns, swizzled within 128 bytes.

        Raises:
            CudaKernelError: the driver refuses.
        """
        ...

    def __call__(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        """Start a kernel; the work is ordered after what the stream already holds."""
        ...


def cuda_missing() -> str | None:
    """Why kernels cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; install a CUDA build of torch on a machine with an NVIDIA GPU"
    from gangline.kernels.cuda.compiler import compiler_missing

    return compiler_missing()


@dataclass
class CudaLauncher:
    """Starts kernels on one GPU.

    Attributes:
        device: the GPU, for example ``torch.device("cuda", 0)``.
    """

    device: torch.device
    _kernels: dict[tuple[KernelBuild, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = cuda_missing()
        if missing is not None:
            raise CudaKernelError(f"CUDA kernels cannot run: {missing}")
        major, minor = torch.cuda.get_device_capability(self.device)
        if major < 8:
            name = torch.cuda.get_device_name(self.device)
            raise CudaKernelError(f"{name} has no sparse tensor cores; compute capability 8.0 is needed")
        # Instructions of sm_90a exist on exactly that GPU.
        self._multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._arch = "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"

    @property
    def arch(self) -> str:
        """See ``Launcher.arch``."""
        return self._arch

    @property
    def multiprocessors(self) -> int:
        """See ``Launcher.multiprocessors``."""
        return int(self._multiprocessors)

    def tensor_map(self, address: int, *, columns: int, rows: int, box: tuple[int, int]) -> Tensor:
        """See ``Launcher.tensor_map``."""
        from cuda.bindings import driver

        wide, narrow = driver.cuuint64_t, driver.cuuint32_t
        status, made = driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address,
            [wide(columns), wide(rows)],
            [wide(2 * columns)],
            [narrow(size) for size in box],
            [narrow(1), narrow(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        if int(status) != 0:
            raise CudaKernelError(
                f"the driver makes no tensor map of {rows} x {columns} numbers ({status}); use the dense path"
            )
        words = struct.pack("<16Q", *(int(word) for word in made.opaque))
        return torch.frombuffer(bytearray(words), dtype=torch.uint8)

    def __call__(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        """See ``Launcher``; CudaKernelError if the kernel does not compile or does not fit the GPU."""
        from cuda.core import LaunchConfig, Stream
        from cuda.core import launch as start

        # torch's default stream is the null stream, which is that of whatever device is current.
        with torch.cuda.device(self.device):
            kernel = self._kernel(launch)
            stream = Stream.from_handle(torch.cuda.current_stream(self.device).cuda_stream)
            config = LaunchConfig(grid=launch.grid, block=launch.threads, shmem_size=launch.shared_bytes)
            start(stream, config, kernel, *map(_as_cuda, arguments))

    def _kernel(self, launch: Launch) -> Any:
        key = (launch.build, launch.shared_bytes)
        kernel = self._kernels.get(key)
        if kernel is None:
            from cuda.core import Device, ObjectCode

            Device(self.device.index or 0).set_current()
            code = ObjectCode.from_cubin(compile_cubin(launch.build, self._arch))
            kernel = self._kernels[key] = code.get_kernel(launch.build.name)
            self._allow_shared(kernel, launch)
        return kernel

    def _allow_shared(self, kernel: Any, launch: Launch) -> None:
        """A block gets more than 48 KiB of shared memory only where that is asked for."""
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = driver.CUdevice(self.device.index or 0)
        (status,) = driver.cuKernelSetAttribute(attribute, launch.shared_bytes, kernel.handle, device)
        if int(status) != 0:
            raise CudaKernelError(
                f"{launch.build.name} wants {launch.shared_bytes} bytes of shared memory, which this GPU "
                f"refuses ({status}); use the dense path"
            )


def _as_cuda(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if argument is None:
        return 0
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int32(argument)

"""NVRTC compiles every kernel without a GPU; the cache; what is said where something is missing."""

import pytest
import torch

from gangline.core.home import cache_dir
from gangline.formats.registry import sparse_codec
from gangline.formats.samoyeds import SamoyedsCodec
from gangline.kernels.cpu.gates import GateForm
from gangline.kernels.cuda import compiler
from gangline.kernels.cuda.compiler import KernelBuild, compile_cubin, compiler_missing
from gangline.kernels.cuda.errors import CudaKernelError
from gangline.kernels.cuda.launcher import CudaLauncher
from gangline.kernels.cuda.samoyeds_matrices import PartShape
from gangline.kernels.cuda.samoyeds_wgmma import WideProduct
from gangline.kernels.cuda.tiles import DECODE_8, DECODE_16, MANY, SOME, Tile, defines, stage_of
from kernels.cuda.emulated_rig import EmulatedLauncher
from kernels.cuda.sparse_rig import field

COMBINE = KernelBuild("combine.cu", "gangline_combine")
ROUTE = KernelBuild("route.cu", "gangline_route")
GATE = KernelBuild("gate.cu", "gangline_gate", (("GANGLINE_ACTIVATION", "0"),))
ELF = b"\x7fELF"

needs_nvrtc = pytest.mark.skipif(compiler_missing() is not None, reason=str(compiler_missing()))


def ssmm(codec_name: str, tile: Tile, arch: str, *, gated: bool, split: bool = False) -> KernelBuild:
    codec = sparse_codec(codec_name)
    assert isinstance(codec, SamoyedsCodec)
    macros = defines(codec, tile, stage_of(codec, tile, arch), gated=gated, activation=0, split=split)
    return KernelBuild("ssmm.cu", "gangline_ssmm", macros)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("codec", "tile", "gated"),
    [
        ("samoyeds:1:2:128/bf16", MANY, True),
        ("samoyeds:1:2:32/bf16", SOME, False),
        ("samoyeds:1:1:32/bf16", DECODE_16, True),
        ("samoyeds:1:2:64/int8g32", DECODE_8, False),
        ("samoyeds:1:2:128/int4g64", DECODE_8, True),
    ],
    ids=str,
)
def test_products_compile(codec: str, tile: Tile, gated: bool, arch: str) -> None:
    assert compile_cubin(ssmm(codec, tile, arch, gated=gated), arch).startswith(ELF)


@needs_nvrtc
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("pattern", ["1:2:64", "1:1:32"])
def test_hopper_products_compile(pattern: str, gated: bool) -> None:
    shape = PartShape.of(field("down", (256, 256), f"samoyeds:{pattern}/bf16"))
    product = WideProduct(shape, EmulatedLauncher(), GateForm("silu") if gated else None)
    assert compile_cubin(product.build(), "sm_90a").startswith(ELF)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_split_products_compile(arch: str) -> None:
    build = ssmm("samoyeds:1:2:128/bf16", DECODE_8, arch, gated=True, split=True)
    assert compile_cubin(build, arch).startswith(ELF)
    assert compile_cubin(GATE, arch).startswith(ELF)
    assert compile_cubin(ROUTE, arch).startswith(ELF)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_sums_compile_once(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile_cubin(COMBINE, arch)
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_cubin(COMBINE, arch) == code
    assert [p for p in cache_dir("cubin").iterdir() if p.suffix == ".partial"] == []


@needs_nvrtc
def test_changed_sources_are_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "source_hash", lambda: "another")
    monkeypatch.setattr(compiler, "_compile", lambda *_: b"new")
    assert compile_cubin(COMBINE, "sm_80") == b"new"


@needs_nvrtc
def test_errors_of_the_compiler_are_shown() -> None:
    with pytest.raises(CudaKernelError, match="does not compile for sm_80 with NVRTC"):
        compile_cubin(KernelBuild("ssmm.cu", "gangline_ssmm"), "sm_80")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    with pytest.raises(CudaKernelError, match=r"cuda-core is not installed; .* 'gangline\[cuda\]'"):
        compile_cubin(COMBINE, "sm_80")


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(CudaKernelError, match="'hopper' is no GPU architecture"):
        compile_cubin(COMBINE, "hopper")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(CudaKernelError, match="torch sees no CUDA device"):
        CudaLauncher(torch.device("cuda", 0))

"""Write a transformers MoE checkpoint as one GGUF file that llama.cpp and gangline read.

    from gangline.checkpoint.gguf_writer import write_gguf
    write_gguf("OLMoE-1B-7B-0924", "olmoe-bf16.gguf", type="bf16")

The folder holds ``config.json`` and safetensors (one file or shards; experts one by one or fused). Tensors
are copied piece by piece, so a model of any size takes a few hundred megabytes of memory. Needs
``pip install "gangline[gguf]"``.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from gangline.checkpoint.gguf_header import require_gguf
from gangline.checkpoint.gguf_metadata import add_metadata, check_computable
from gangline.checkpoint.gguf_names import FAMILIES, permute_heads
from gangline.checkpoint.gguf_plan import ARCHITECTURES, OutTensor, Plan, Rows, SafetensorsRows, plan_tensors
from gangline.checkpoint.gguf_q6_k import encode_q6_k
from gangline.checkpoint.gguf_vocab import add_vocabulary
from gangline.core.errors import CheckpointError, UnsupportedModelError
from gangline.core.sizes import format_size

Progress = Callable[[int, int], None]
GGUFType = Literal["bf16", "f16", "f32", "q8_0", "q4_0"]

_FILE_TYPES = {
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
    "f32": "ALL_F32",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
_DENSE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CHUNK_WEIGHTS = 1 << 22  # 16 MiB in fp32: enough for full disk speed, small beside any budget
_ALIGNMENT = 32


def write_gguf(
    model_folder: str | Path,
    out_path: str | Path,
    *,
    type: GGUFType = "bf16",
    head: GGUFType | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert a local transformers folder to a GGUF file, which appears under its name only when complete.

    Types are those of llama.cpp's own quantize tool: routers and norms stay F32; a ``q4_0`` file has its head
    in Q6_K (Q8_0 where rows are no multiple of 256), and keys and values in Q8_0 if there are eight experts.
    Rows whose length is not a multiple of 32 stay F16 in the two quantized types. A folder with a tokenizer
    gets its vocabulary; without one, llama.cpp loads the file with placeholder tokens and takes token ids.

    Args:
        model_folder: folder of an ``olmoe``, ``qwen2_moe``, ``qwen3_moe`` or ``mixtral`` checkpoint.
        out_path: the file to write; an existing one is replaced.
        type: how the matrices are stored; ``bf16`` is exact for a bf16 checkpoint, ``f32`` for every one.
        head: type of the head (the tied embedding too), None for the usual one.
        progress: called with bytes written and bytes in all, after every piece.

    Returns:
        ``out_path``.

    Raises:
        UnsupportedModelError: llama.cpp has no architecture that computes this model.
        CheckpointError: a tensor is missing or has the wrong shape, or the disk is full.
    """
    gguf = require_gguf()
    folder, out = Path(model_folder), Path(out_path)
    for chosen in (type, head or type):
        if chosen not in _FILE_TYPES:
            raise UnsupportedModelError(
                f"cannot write GGUF type {chosen!r}; choose one of {', '.join(_FILE_TYPES)}"
            )
    config = _read_config(folder)
    plan = plan_tensors(folder, config, type, head)
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent} is no folder; make it first, or write {out.name} elsewhere")
    free = shutil.disk_usage(out.parent).free
    if free < plan.nbytes:
        raise CheckpointError(
            f"{out} needs {format_size(plan.nbytes)}, its disk has {format_size(free)}; choose another place"
        )
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        writer = gguf.GGUFWriter(part, plan.family.arch)
        file_type = gguf.LlamaFileType[_FILE_TYPES[type]]
        add_metadata(writer, config, plan.family, folder.resolve().name, file_type)
        add_vocabulary(writer, folder, config)
        for tensor in plan.tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with part.open("ab") as file:
            _write_data(file, plan, progress)
        part.replace(out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out} ({error.strerror}); free some space or choose another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return out


def gguf_size(model_folder: str | Path, type: GGUFType = "bf16", head: GGUFType | None = None) -> int:
    """Return the bytes of tensor data that :func:`write_gguf` would write, from headers alone.

    Raises:
        UnsupportedModelError, CheckpointError: as for :func:`write_gguf`.
    """
    folder = Path(model_folder)
    return plan_tensors(folder, _read_config(folder), type, head).nbytes


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give a folder saved by transformers")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"cannot write {config.model_type} as GGUF; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    check_computable(config, FAMILIES[ARCHITECTURES[config.model_type]])
    return config


def _write_data(file: IO[bytes], plan: Plan, progress: Progress | None) -> None:
    done = 0
    for tensor in plan.tensors:
        _pad(file)
        start = file.tell()
        for piece in _pieces(plan.source, tensor):
            file.write(_encode(piece, tensor.type))
            if progress is not None:
                progress(done + file.tell() - start, plan.nbytes)
        if file.tell() - start != tensor.nbytes:
            raise CheckpointError(f"{tensor.name} has rows of different sizes; the checkpoint is corrupt")
        done += tensor.nbytes
    _pad(file)
    file.flush()
    os.fsync(file.fileno())


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _pieces(source: SafetensorsRows, tensor: OutTensor) -> Iterator[Tensor]:
    """Yield the rows of ``tensor`` in order, a few million weights at a time; permuted ones in one piece."""
    for rows in tensor.rows:
        step = rows.count if tensor.heads else max(1, _CHUNK_WEIGHTS // tensor.shape[-1])
        for start in range(0, rows.count, step):
            piece = source.read(Rows(rows.tensor, rows.start + start, min(step, rows.count - start)))
            yield permute_heads(piece, tensor.heads) if tensor.heads else piece


def _encode(rows: Tensor, kind: str) -> bytes:
    """Return the bytes of ``(rows, columns)`` weights in one ggml type."""
    if kind in _DENSE:
        return rows.to(_DENSE[kind]).contiguous().view(torch.uint8).numpy().tobytes()
    if kind == "Q6_K":
        return encode_q6_k(rows).numpy().tobytes()
    gguf = require_gguf()
    packed: bytes = gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType[kind]).tobytes()
    return packed

"""What the other engines of a comparison run on: the same weights, in a form that each of them reads."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from gangline.checkpoint.gguf import GGUFCheckpoint
from gangline.checkpoint.gguf_header import require_gguf
from gangline.checkpoint.gguf_writer import GGUFType, gguf_size, write_gguf
from gangline.checkpoint.locate import LocalCheckpoint, resolve_checkpoint
from gangline.core.errors import CheckpointError, UsageError
from gangline.core.home import cache_dir
from gangline.core.sizes import format_size
from gangline.evaluation.bound import Weights
from gangline.evaluation.compare_speed_llamacpp import require_llama_cpp
from gangline.evaluation.speed import Progress, SpeedSettings
from gangline.runtime.opened import OpenedModel, open_model
from gangline.runtime.progress import byte_bar

PeerName = Literal["llama.cpp", "transformers"]
PEERS: tuple[PeerName, ...] = ("llama.cpp", "transformers")

_QUANTIZED: dict[str, GGUFType] = {"int8": "q8_0", "int4": "q4_0"}
_PLAIN: dict[torch.dtype, GGUFType] = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_PROCESS = 600 * 2**20  # Python, libraries and buffers
_COPIES = 1.5  # plain transformers while it loads, times the weights


@dataclass(frozen=True)
class Peer:
    """An engine, ready to be started.

    Attributes:
        name: of the engine.
        version: of its package.
        weights: what it computes with, in words.
        job: for :func:`gangline.evaluation.compare_speed_worker.open_side`.
        needed: bytes of memory while it loads or runs, roughly.
        reads: what a decoding step reads; None where that is not counted.
    """

    name: PeerName
    version: str
    weights: str
    job: dict[str, Any] = field(repr=False)
    needed: int
    reads: Weights | None = field(repr=False)


def find_peer(
    name: PeerName,
    model: str | Path,
    settings: SpeedSettings,
    *,
    threads: int,
    precision: str = "stored",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    progress: Progress,
    gguf: Path | None = None,
    experts: str | None = None,
    repack: bool = True,
) -> Peer:
    """Prepare an engine for the weights of ``model``.

    Args:
        name: of the engine.
        model: folder, GGUF file or Hub id.
        settings: what will be measured.
        threads: that it may use.
        precision: of our side; llama.cpp gets the file type of as many bits.
        dtype: of our side, None for the checkpoint's.
        revision: branch, tag or commit on the Hub.
        progress: told the size before a file is written.
        gguf: the file for llama.cpp instead of one in the cache folder.
        experts: transformers' ``experts_implementation``.
        repack: see :class:`~gangline.evaluation.compare_speed_llamacpp.LlamaCppSide`.

    Raises:
        UsageError: the engine is not installed, or has no weights like these.
        UnsupportedModelError: llama.cpp cannot compute the model.
    """
    if name == "llama.cpp":
        require_llama_cpp()
    checkpoint = resolve_checkpoint(model, revision)
    if not isinstance(checkpoint, LocalCheckpoint):
        raise CheckpointError(f"{model} is not on this machine; check the network")
    if name == "transformers":
        opened = open_model(checkpoint, dtype)
        return _transformers(opened, model, threads=threads, dtype=dtype, revision=revision, experts=experts)
    file, kind = gguf, "" if gguf is None else _file_type(gguf)
    if file is None and checkpoint.gguf is not None:
        if precision != "stored":
            raise UsageError(
                "llama.cpp runs a GGUF file as it is; leave --precision out, or start from the safetensors "
                "model"
            )
        file, kind = checkpoint.gguf, "the same " + _file_type(checkpoint.gguf)
    if file is None:
        kind = gguf_type(precision, dtype or open_model(checkpoint, None).dtype)
        file = cached_gguf(checkpoint, kind, progress)
    size = sum(path.stat().st_size for path in GGUFCheckpoint.open(file).files)
    job = {
        "side": "llama.cpp",
        "gguf": str(file),
        "threads": threads,
        "batch": settings.batch,
        "context": settings.prompt_tokens + settings.new_tokens,
        "repack": repack,
    }
    # Mapped and copied into its own layout: the pages of the file can be dropped, but not while it loads.
    needed = 2 * size + _PROCESS
    return Peer(name, metadata.version("llama-cpp-python"), f"{kind} GGUF", job, needed, gguf_reads(file))


def _file_type(path: Path) -> str:
    """Return what a file says of its matrices, for example ``q4_0``."""
    number = GGUFCheckpoint.open(path).metadata.get("general.file_type")
    try:
        return (
            str(require_gguf().LlamaFileType(number).name)
            .removeprefix("MOSTLY_")
            .removeprefix("ALL_")
            .lower()
        )
    except ValueError:
        return "unknown type of"


def gguf_type(precision: str, dtype: torch.dtype) -> GGUFType:
    """Return the file type with the bits of a precision: Q4_0 for int4, Q8_0 for int8, else the dtype's.

    Raises:
        UsageError: there is none.
    """
    if precision == "stored":
        return _PLAIN[dtype]
    for start, kind in _QUANTIZED.items():
        if precision == start or precision.startswith(f"{start}g"):
            return kind
    raise UsageError(f"llama.cpp has no file type like {precision}; compare at stored, int8 or int4")


def cached_gguf(checkpoint: LocalCheckpoint, type: GGUFType, progress: Progress) -> Path:
    """Return the GGUF file of a checkpoint in the cache folder; the first call writes it.

    Raises:
        UnsupportedModelError: llama.cpp cannot compute the model.
        CheckpointError: the checkpoint is broken, or the disk is full.
    """
    identity = open_model(checkpoint, None).identity
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(checkpoint.name).name)
    file = cache_dir("gguf") / f"{name}-{identity[:8]}-{type}.gguf"
    if not file.exists():
        progress(f"writing {file} for llama.cpp: {format_size(gguf_size(checkpoint.folder, type))}")
        with byte_bar(file.name) as update:
            write_gguf(checkpoint.folder, file, type=type, progress=update)
    return file


def gguf_reads(path: Path) -> Weights:
    """Return what a decoding step reads of a GGUF file, from its header."""
    checkpoint = GGUFCheckpoint.open(path)
    arch = checkpoint.family.arch
    experts, used = (checkpoint.metadata[f"{arch}.expert{part}_count"] for part in ("", "_used"))
    assert isinstance(experts, int)
    assert isinstance(used, int)
    dense, layers = 0, defaultdict[str, int](int)
    for name, tensor in checkpoint.tensors.items():
        if "_exps." in name:
            layers[name.split(".")[1]] += tensor.nbytes
        elif name != "token_embd.weight" or "output.weight" not in checkpoint.tensors:
            dense += tensor.nbytes
    return _reads(dense, [whole // experts for whole in layers.values()], experts, used)


def _reads(dense: int, layers: list[int], experts: int, used: int) -> Weights:
    """``layers``: bytes of one expert of each layer."""
    return Weights(
        dense=dense,
        routed=used * sum(layers),
        expert=sum(layers) / len(layers),
        spread=tuple((used * one, experts * one) for one in layers),
        files=(),
        record=max(layers),
    )


def _transformers(
    opened: OpenedModel,
    model: str | Path,
    *,
    threads: int,
    dtype: torch.dtype | None,
    revision: str | None,
    experts: str | None,
) -> Peer:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    size = opened.dtype.itemsize
    with torch.device("meta"):
        whole = opened.cls._from_config(opened.config, dtype=opened.dtype).num_parameters() * size
    job = {
        "side": "transformers",
        "model": str(model),
        "dtype": names[dtype] if dtype is not None else None,
        "threads": threads,
        "revision": revision,
        "experts": experts,
    }
    words = names[opened.dtype] + (f", experts {experts}" if experts else "")
    version = metadata.version("transformers")
    return Peer("transformers", version, words, job, int(whole * _COPIES) + _PROCESS, _plain_reads(opened))


def _plain_reads(opened: OpenedModel) -> Weights | None:
    """What plain transformers reads at least: each weight once."""
    geometry = opened.view.geometry.layers
    if len({(layer.experts, layer.top_k) for layer in geometry}) != 1:
        return None
    embedding, head = opened.skeleton.get_input_embeddings(), opened.skeleton.get_output_embeddings()
    held = {id(item): item for item in opened.skeleton.parameters()}
    if head is None or head.weight is not embedding.weight:
        held.pop(id(embedding.weight), None)
    numbers = [sum(field.shape[0] * field.shape[1] for field in item.fields) for item in opened.layouts(None)]
    size = opened.dtype.itemsize
    dense = sum(item.numel() for item in held.values()) * size
    return _reads(dense, [count * size for count in numbers], geometry[0].experts, geometry[0].top_k)

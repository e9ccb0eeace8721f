"""Write a stock transformers checkpoint of random weights whose routing stays balanced.

With every weight drawn from N(0, 0.02) the residual streams of all tokens turn into one direction after a few
layers, a fifth of the experts gets all tokens, and every cache looks excellent. Two choices prevent it:
embeddings are 128 times larger than usual, so that the stream stays the token's own, and every matrix, also
the router, is drawn with a variance of one over its inputs, so that router logits have a spread of about one.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from gangline.core.errors import UsageError
from gangline.core.sizes import format_size

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MARKER = "gangline_shape.json"
INDEX = "model.safetensors.index.json"
EMBEDDING_STD = 0.02 * 128
SHARD_BYTES = 2**30
_SPARE_BYTES = 64 * 2**20
_WRITERS = 2

_FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<matrix>gate_up_proj|down_proj)")
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|shared)\.weight")
# How the checkpoint of a family names things on the hub, where it differs from the module's own names.
_HUB_MATRICES = {"mixtral": ("w1", "w3", "w2")}
_HUB_RENAMES = {"mixtral": (".mlp.", ".block_sparse_moe.")}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the checkpoint: its name on the hub, its shape, and the spread of its values.

    ``std`` None stands for a norm's weight, which is all ones.
    """

    name: str
    shape: tuple[int, ...]
    std: float | None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * dtype.itemsize

    def draw(self, dtype: torch.dtype, seed: int) -> Tensor:
        """Return the tensor; its values depend only on the seed and the name."""
        tensor = torch.empty(self.shape, dtype=dtype)
        if self.std is None:
            return tensor.fill_(1.0)
        digest = hashlib.blake2b(f"{seed}:{self.name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return tensor.normal_(0.0, self.std, generator=generator)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of ``config`` with a language model head, without weights."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config)  # type: ignore[no-untyped-call]
    return model


def plan_tensors(model: PreTrainedModel) -> list[TensorPlan]:
    """Return every tensor of the checkpoint, experts one by one as on the hub, layer after layer."""
    tied = set(model.all_tied_weights_keys)
    family = model.config.model_type
    plans: list[TensorPlan] = []
    for name, tensor in model.state_dict().items():
        if name not in tied:
            plans.extend(_hub_tensors(family, name, tuple(tensor.shape)))
    return plans


def _hub_tensors(family: str, name: str, shape: tuple[int, ...]) -> Iterator[TensorPlan]:
    module_part, hub_part = _HUB_RENAMES.get(family, ("", ""))
    name = name.replace(module_part, hub_part)
    fused = _FUSED.fullmatch(name)
    if fused is None:
        yield TensorPlan(name, shape, weight_std(name, shape))
        return
    gate, up, down = _HUB_MATRICES.get(family, ("gate_proj", "up_proj", "down_proj"))
    experts, rows, columns = shape
    matrices: tuple[str, ...] = (down,)
    if fused["matrix"] == "gate_up_proj":
        matrices, rows = (gate, up), rows // 2
    for expert in range(experts):
        for matrix in matrices:
            yield TensorPlan(f"{fused['experts']}.{expert}.{matrix}.weight", (rows, columns), columns**-0.5)


def weight_std(name: str, shape: tuple[int, ...]) -> float | None:
    """Return the spread of a weight's values by its name in the model; None stands for a norm: all ones."""
    if len(shape) == 1:
        return None
    if _EMBEDDING.fullmatch(name):
        return EMBEDDING_STD
    return float(shape[-1] ** -0.5)


def write_random_checkpoint(
    config: PretrainedConfig,
    folder: Path,
    *,
    label: str,
    dtype: torch.dtype,
    seed: int,
    progress: Progress | None = None,
) -> Path:
    """Write config and shards of about 1 GiB into ``folder``, one shard in memory at a time.

    The index is written last: a folder with an index is complete. Arguments as in ``shapes.make_shape``.
    """
    model = meta_model(config)
    shards = _cut_into_shards(plan_tensors(model), dtype)
    sizes = [sum(plan.nbytes(dtype) for plan in shard) for shard in shards]
    total = sum(sizes)
    _claim(folder, {"shape": label, "dtype": str(dtype).removeprefix("torch."), "seed": seed})
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    missing = [i for i, name in enumerate(names) if not (folder / name).exists()]
    left = sum(sizes[i] for i in missing)
    logger.info("%s: %s in %s, %s to write", label, format_size(total), folder, format_size(left))
    report = progress or (lambda done, total: None)
    report(total - left, total)
    if missing:
        _check_room(folder, left, label)
    for i in missing:
        _write_shard(folder / names[i], shards[i], dtype, seed)
        left -= sizes[i]
        report(total - left, total)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    weight_map = {plan.name: name for name, shard in zip(names, shards, strict=True) for plan in shard}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def _cut_into_shards(plans: list[TensorPlan], dtype: torch.dtype) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in plans:
        if shards[-1] and filled + plan.nbytes(dtype) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(plan)
        filled += plan.nbytes(dtype)
    return shards


def _claim(folder: Path, marker: dict[str, object]) -> None:
    """Note what the folder is for, so that a resumed run cannot mix two checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MARKER
    if path.exists():
        found = json.loads(path.read_text())
        if found != marker:
            raise UsageError(f"{folder} holds {found}, not {marker}; delete it or give another folder")
    elif any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no random checkpoint; give another folder")
    else:
        _write_json(path, marker)


def _check_room(folder: Path, needed: int, label: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise UsageError(
            f"{label} needs {format_size(needed)} more in {folder}, which has {format_size(free)} free; "
            "free some space, set GANGLINE_HOME to a larger disk, or cut the shape, for example NAME:4"
        )


def _write_shard(path: Path, plans: list[TensorPlan], dtype: torch.dtype, seed: int) -> None:
    with ThreadPoolExecutor(_WRITERS) as pool:
        drawn = pool.map(lambda plan: plan.draw(dtype, seed), plans)
        tensors = {plan.name: tensor for plan, tensor in zip(plans, drawn, strict=True)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(path: Path, content: object) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    partial.replace(path)

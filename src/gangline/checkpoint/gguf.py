"""A GGUF file as a checkpoint: config, dense weights under transformers' names, experts as packed bytes.

    checkpoint = GGUFCheckpoint.open("olmoe-q4_k_m.gguf")
    model = AutoModelForCausalLM.from_config(checkpoint.config)      # on meta
    for name, tensor in checkpoint.dense_tensors(torch.bfloat16): ...
    source = checkpoint.expert_source(modules)

Legend: D hidden, E experts, F intermediate.
"""

import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gangline.checkpoint.gguf_config import Metadata, family_of, make_config
from gangline.checkpoint.gguf_decode import known_type, read_bytes, read_tensor
from gangline.checkpoint.gguf_experts import EXPERT_WEIGHT, GGUFExpertSource, make_source
from gangline.checkpoint.gguf_header import GGUFHeader, GGUFTensor, Value, read_header
from gangline.checkpoint.gguf_names import Family, merge_kv_b, unpermute_heads
from gangline.checkpoint.gguf_tokenizer import read_tokenizer
from gangline.checkpoint.source import ExpertsModule
from gangline.core.errors import CheckpointError, UnsupportedModelError
from gangline.formats import DenseCodec, get_codec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_EXPERT_BIAS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.bias")
_ABSORBED = re.compile(r"blk\.(\d+)\.attn_(k|v)_b\.weight")


@dataclass(frozen=True)
class GGUFCheckpoint:
    """A GGUF model, in one file or split; make it with :meth:`open`.

    Attributes:
        path: the file, or the first of the split.
        files: all files of the model.
        metadata: all key-value pairs (of the first file).
        tensors: all tensors by GGUF name.
        family: the llama.cpp architecture.
    """

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]
    family: Family

    @classmethod
    def open(cls, path: str | Path) -> "GGUFCheckpoint":
        """Read and check the headers, no tensor data. Any file of a split model stands for all of them.

        Raises:
            CheckpointError: a file is missing, truncated or corrupt, or the gguf package is not installed.
            UnsupportedModelError: an architecture that gangline does not read.
        """
        headers = [read_header(file) for file in _split_files(Path(path))]
        tensors = _join(headers)
        first = headers[0]
        family = family_of(first.path, first.metadata)
        return cls(first.path, tuple(header.path for header in headers), first.metadata, tensors, family)

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The transformers config.

        Raises:
            CheckpointError: the metadata lack a size or contradict each other or the tensors.
            UnsupportedModelError: the metadata ask for something that transformers does not compute.
        """
        return make_config(Metadata(self.path, self.family.arch, self.metadata), self.family, self.tensors)

    def tokenizer(self) -> Any | None:
        """Return the transformers tokenizer inside or beside the file, or ``None`` if there is none.

        Raises:
            CheckpointError: transformers cannot build it.
        """
        return read_tokenizer(self.path, self.metadata)

    def dense_tensors(
        self, dtype: torch.dtype = torch.bfloat16, empty: Container[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight that is no expert matrix, under its transformers parameter name.

        Tensors come in ``dtype``, except the correction bias of DeepSeek's router, which transformers keeps
        in float32. One tensor is in memory at a time. Tied embeddings yield no ``lm_head.weight``.

        Args:
            dtype: of the tensors.
            empty: names of weights that are not read: zeros that take no memory come in their place.

        Raises:
            CheckpointError: a tensor has an impossible shape or is truncated.
            UnsupportedModelError: the file holds a tensor that the transformers model has no place for.
        """
        layers = self.config.num_hidden_layers
        for name, tensor in self.tensors.items():
            block = re.match(r"blk\.(\d+)\.", name)
            if EXPERT_WEIGHT.fullmatch(name) or (block and int(block[1]) >= layers):
                continue
            if bias := _EXPERT_BIAS.fullmatch(name):
                yield from self._expert_bias(int(bias[1]), bias[2], dtype)
            elif absorbed := _ABSORBED.fullmatch(name):
                yield from self._kv_b(int(absorbed[1]), absorbed[2], dtype)
            elif (theirs := self.family.dense_name(name)) is not None and theirs in empty:
                yield theirs, torch.zeros((), dtype=dtype).expand(tensor.shape)
            else:
                yield self._dense(name, tensor, dtype)

    def expert_source(
        self, modules: Sequence[ExpertsModule], dtype: torch.dtype = torch.bfloat16
    ) -> GGUFExpertSource:
        """Return the experts of ``modules`` as fields ``gate``, ``up``, ``down``, each ``(out, in)``.

        Bytes stay packed as in the file (codec ``ggml:TYPE``) where our formats know the type; other types
        are converted to ``dtype`` while they are read, which ``notes`` says.

        Raises:
            CheckpointError: an expert is missing or its shape is not the module's.
        """
        return make_source(self.path, self.tensors, modules, dtype)

    def linear_codec(self, name: str) -> str | None:
        """Codec of the blocks that hold a weight ``(out, in)``; ``name`` is the transformers parameter.

        None if the weight is no single matrix of the file, or not in blocks that our formats know. Of tied
        embeddings, ``lm_head.weight`` is the embedding.
        """
        tensor = self._linear(name)
        if tensor is None or len(tensor.shape) != 2 or not known_type(tensor.type):
            return None
        codec = get_codec(f"ggml:{tensor.type}")
        return None if isinstance(codec, DenseCodec) else codec.name

    def linear_bytes(self, name: str) -> Tensor:
        """Return the blocks of a weight (uint8, 1-D) whose codec :meth:`linear_codec` gives.

        Rows come in the order that transformers' weight has.

        Raises:
            CheckpointError: the file ends inside the tensor, or the rows are not those of whole heads.
        """
        tensor = self._linear(name)
        assert tensor is not None
        rows = read_bytes(tensor, 0, tensor.nbytes).view(tensor.shape[0], -1)
        return self._unpermuted(tensor.name, rows).contiguous().view(-1)

    def _linear(self, name: str) -> GGUFTensor | None:
        if name == "lm_head.weight" and "output.weight" not in self.tensors:
            return self.tensors.get("token_embd.weight")
        return self.tensors.get(self.family.gguf_name(name) or "")

    def _unpermuted(self, name: str, weight: Tensor) -> Tensor:
        """Rows of Q and K in transformers' order, of other weights as they are."""
        if not self.family.permuted or not name.endswith(("attn_q.weight", "attn_k.weight")):
            return weight
        q = name.endswith("attn_q.weight")
        heads = self.config.num_attention_heads if q else self.config.num_key_value_heads
        if weight.dim() != 2 or weight.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self.path}: {name} has shape {tuple(weight.shape)}, not divisible by {heads} heads; "
                "convert the model again"
            )
        return unpermute_heads(weight, heads)

    def _dense(self, name: str, tensor: GGUFTensor, dtype: torch.dtype) -> tuple[str, Tensor]:
        theirs = self.family.dense_name(name)
        if theirs is None:
            raise UnsupportedModelError(
                f"{self.path}: transformers has no place for tensor {name} of this {self.family.arch} model"
            )
        if theirs.endswith("e_score_correction_bias"):
            return theirs, read_tensor(tensor, torch.float32)
        weight = self._unpermuted(name, read_tensor(tensor, dtype))
        if name.endswith("ffn_gate_inp_shexp.weight"):
            weight = weight.reshape(1, -1)
        return theirs, weight

    def _expert_bias(self, layer: int, part: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield gpt-oss' biases: down as it is, gate and up alternating, when gate comes."""
        experts = f"model.layers.{layer}.mlp.experts"
        if part == "down":
            yield f"{experts}.down_proj_bias", self._bias(layer, "down", dtype)
        elif part == "gate":
            gate_EF, up_EF = self._bias(layer, "gate", dtype), self._bias(layer, "up", dtype)
            if gate_EF.shape != up_EF.shape:
                raise CheckpointError(f"{self.path}: gate and up biases of block {layer} differ in shape")
            yield f"{experts}.gate_up_proj_bias", torch.stack([gate_EF, up_EF], dim=-1).flatten(1)

    def _bias(self, layer: int, part: str, dtype: torch.dtype) -> Tensor:
        bias = read_tensor(self._tensor(f"blk.{layer}.ffn_{part}_exps.bias"), dtype)
        if bias.dim() != 2:
            raise CheckpointError(
                f"{self.path}: the {part} bias of block {layer} is no matrix; convert the model again"
            )
        return bias

    def _kv_b(self, layer: int, part: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield DeepSeek's ``kv_b_proj`` from its two halves, when the first one comes."""
        if part != "k" or f"blk.{layer}.attn_kv_b.weight" in self.tensors:
            return
        k_b = read_tensor(self._tensor(f"blk.{layer}.attn_k_b.weight"), dtype)
        v_b = read_tensor(self._tensor(f"blk.{layer}.attn_v_b.weight"), dtype)
        heads, rank = self.config.num_attention_heads, self.config.kv_lora_rank
        expected = (heads, rank, self.config.qk_nope_head_dim), (heads, self.config.v_head_dim, rank)
        if (tuple(k_b.shape), tuple(v_b.shape)) != expected:
            raise CheckpointError(
                f"{self.path}: attn_k_b and attn_v_b of block {layer} have shapes {tuple(k_b.shape)} and "
                f"{tuple(v_b.shape)}, expected {expected[0]} and {expected[1]}; convert the model again"
            )
        yield f"model.layers.{layer}.self_attn.kv_b_proj.weight", merge_kv_b(k_b, v_b)

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; convert the model again")
        return self.tensors[name]


def _split_files(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    total = int(match[3])
    files = [path.with_name(f"{match[1]}-{part:05d}-of-{match[3]}.gguf") for part in range(1, total + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{path}: {len(missing)} of {total} files of this split model are missing, first "
            f"{missing[0] if missing else path.name}; download it again"
        )
    return files


def _join(headers: Sequence[GGUFHeader]) -> dict[str, GGUFTensor]:
    """Put the tensors of a split model together and check that nothing is missing or double."""
    tensors: dict[str, GGUFTensor] = {}
    for number, header in enumerate(headers):
        count = header.metadata.get("split.count", 1)
        if count != len(headers) or header.metadata.get("split.no", 0) != number:
            raise CheckpointError(
                f"{header.path}: the file is not part {number + 1} of {len(headers)}, as its name says; "
                "keep the files under the names with which they were written"
            )
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{header.path}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    promised = headers[0].metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise CheckpointError(
            f"{headers[0].path}: the split model promises {promised} tensors and holds {len(tensors)}; "
            "download it again"
        )
    return tensors

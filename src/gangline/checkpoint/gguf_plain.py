"""All weights of a GGUF file for a plain transformers model, which holds its experts itself.

Legend: D hidden, E experts, F intermediate.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gangline.checkpoint.gguf import GGUFCheckpoint
from gangline.checkpoint.source import ExpertsModule
from gangline.formats import get_codec


def plain_tensors(
    checkpoint: GGUFCheckpoint, modules: Sequence[ExpertsModule], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of the transformers model, the experts stacked as their modules hold them.

    This is the reference that ``gangline check`` needs: transformers' own GGUF loader knows few MoE families.

    Args:
        checkpoint: the file.
        modules: the model's experts modules; each holds ``gate_up_proj`` and ``down_proj``.
        dtype: of all weights.

    Raises:
        CheckpointError, UnsupportedModelError: as in :class:`GGUFCheckpoint`.
    """
    yield from checkpoint.dense_tensors(dtype)
    source = checkpoint.expert_source(modules, dtype)
    for layer, module in enumerate(modules):
        stacks = {name: torch.empty(shape, dtype=dtype) for name, shape in module.params.items()}
        gate_up, down = stacks.values()
        specs = source.layouts[layer].fields
        for expert, fields in source.read_layer(layer):
            *first, last = (
                get_codec(spec.codec).decode(raw, spec.shape, dtype)
                for spec, raw in zip(specs, fields, strict=True)
            )
            both = torch.stack(first, dim=1).flatten(0, 1) if module.interleaved else torch.cat(first)
            gate_up[expert] = both.T if module.transposed else both
            down[expert] = last.T if module.transposed else last
        for name, stack in stacks.items():
            yield f"{module.prefix}.{name}", stack

"""Parameters whose bytes change on the way: transformers' own operations, run on one layer at a time."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gangline.checkpoint.inplace import CODECS, FieldPlan
from gangline.checkpoint.mapping import Assembly
from gangline.checkpoint.safetensors_header import TensorEntry
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.checkpoint.source import ExpertsModule
from gangline.core.errors import CheckpointError
from gangline.core.layout import FieldSpec, ModuleField

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class ShapeBook:
    """What converters ask a model for, answered also when the experts' parameters have left it."""

    def __init__(self, model: "PreTrainedModel", modules: Sequence[ExpertsModule]) -> None:
        self._model = model
        self._shapes = {
            f"{module.prefix}.{name}": shape for module in modules for name, shape in module.params.items()
        }

    def get_parameter(self, name: str) -> Tensor:
        """A tensor with the shape of the parameter."""
        if name in self._shapes:
            return torch.empty(self._shapes[name], device="meta")
        return self._model.get_parameter(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass(frozen=True)
class Conversion:
    """One parameter of one layer that a converter makes.

    Attributes:
        assembly: its tensors and converter.
        shapes: stands for the model.
        shape: the shape that the parameter must come out with.
        cast: number format to cast each tensor to first, or ``None``.
    """

    assembly: Assembly
    shapes: ShapeBook
    shape: tuple[int, ...]
    cast: torch.dtype | None

    @property
    def note(self) -> str:
        """What happens, in words."""
        converter = self.assembly.converter
        operations = (
            ", ".join(type(operation).__name__ for operation in converter.operations) if converter else ""
        )
        casts = f"float64 to {str(self.cast).removeprefix('torch.')}" if self.cast is not None else ""
        return " and ".join(part for part in (operations, casts) if part)

    def run(self, index: SafetensorsIndex) -> Tensor:
        """Read the layer's tensors and return the parameter."""
        return self._make(index.read)

    def check(self, index: SafetensorsIndex) -> None:
        """Run the operations without data; :class:`CheckpointError` if the parameter gets another shape."""
        self._make(lambda name: torch.empty(index.entry(name).shape, device="meta"))

    def _make(self, read: Callable[[str], Tensor]) -> Tensor:
        def tensor(name: str) -> Tensor:
            return read(name) if self.cast is None else read(name).to(self.cast)

        assembly = self.assembly
        if assembly.converter is None:
            result = tensor(assembly.names[0])
        else:
            converter: Any = deepcopy(assembly.converter)
            for pattern, names in assembly.sources.items():
                for name in names:
                    converter.add_tensor(assembly.first, name, pattern, partial(tensor, name))
            result = self._convert(converter)
        if tuple(result.shape) != self.shape:
            raise CheckpointError(
                f"tensor {assembly.names[0]} leads to shape {tuple(result.shape)}, but {assembly.target} "
                f"has {self.shape}; the checkpoint belongs to another model or its config.json was changed"
            )
        return result

    def _convert(self, converter: Any) -> Tensor:
        target = self.assembly.target
        try:
            made = converter.convert(self.assembly.first, model=self.shapes, config=self.shapes.config)
        except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"tensor {self.assembly.names[0]} cannot be converted to {target} ({str(error)[:100]!r}); "
                "the checkpoint belongs to another model or another version of transformers"
            ) from error
        if target not in made:
            raise CheckpointError(
                f"the conversion of {self.assembly.names[0]} did not make {target}; report this model"
            )
        value = made[target]
        result: Tensor = value[0] if isinstance(value, list) else value
        return result


def plan_conversion(
    index: SafetensorsIndex,
    assemblies: list[Assembly],
    shapes: ShapeBook,
    field: ModuleField,
    dtype: torch.dtype | None,
) -> tuple[FieldPlan, Conversion]:
    """Plan a parameter that cannot be used as stored.

    Raises:
        CheckpointError: its number format has no codec, its tensors' formats differ, or shapes are wrong.
    """
    assembly = assemblies[0]
    entries = [index.entry(name) for assembly in assemblies for name in assembly.names]
    stored = _one_dtype(entries)
    cast = dtype if stored == "F64" else None
    final = _NAMES.get(cast) if cast is not None else stored
    if final not in CODECS:
        raise CheckpointError(
            f"tensor {entries[0].name} is stored as {stored}, which cannot be used for experts; "
            "convert the checkpoint to bfloat16"
        )
    if len(assemblies) > 1:
        wrong = next((entry for entry in entries if entry.shape != field.shape), entries[0])
        raise CheckpointError(
            f"tensor {wrong.name} ({wrong.dtype}, shape {wrong.shape}) does not fit {assembly.target} "
            f"with shape {field.shape}; the checkpoint belongs to another model or config.json was changed"
        )
    conversion = Conversion(assembly, shapes, tuple(shapes.get_parameter(assembly.target).shape), cast)
    conversion.check(index)
    nbytes = field.shape[0] * field.shape[1] * _DTYPES[final].itemsize
    return FieldPlan(
        FieldSpec(field.name, field.shape, CODECS[final], nbytes, field.transposed), None
    ), conversion


def _one_dtype(entries: list[TensorEntry]) -> str:
    first = entries[0]
    other = next((entry for entry in entries if entry.dtype != first.dtype), None)
    if other is not None:
        raise CheckpointError(
            f"tensor {other.name} is stored as {other.dtype} and {first.name} as {first.dtype}; one matrix "
            "of all experts of a layer must have one number format: convert the checkpoint"
        )
    return first.dtype

"""From a safetensors folder to a model's experts: in place where the bytes can stay, converted where not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gangline.checkpoint.convert import Conversion, ShapeBook, plan_conversion
from gangline.checkpoint.inplace import FieldPlan, plan_each, plan_in_place, plan_packed
from gangline.checkpoint.mapping import Assembly, assemble, missing_sources
from gangline.checkpoint.packed import plan_packed_layer
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.checkpoint.safetensors_source import LayerPlan, SafetensorsSource
from gangline.checkpoint.source import ExpertsModule, ExpertSource
from gangline.core.errors import CheckpointError
from gangline.core.layout import ModuleField

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def resolve_safetensors(
    folder: str | Path,
    model: "PreTrainedModel",
    modules: Sequence[ExpertsModule],
    dtype: "torch.dtype | None" = None,
) -> ExpertSource:
    """Find the bytes of every expert of every MoE layer in a folder of safetensors files.

    Which tensor is what is taken from transformers' own conversion tables for this model, so the names of a
    family are written nowhere here. The checkpoint's own number format is kept.

    Args:
        folder: folder with the safetensors files.
        model: the model, on ``meta``; its experts may already have been dropped.
        modules: its experts modules in layer order.
        dtype: the model's number format, used only for tensors whose own format no codec has (float64).

    Raises:
        CheckpointError: a tensor is missing, has another shape than the model wants, or is stored in a way
            that cannot be read; the message names it.
    """
    return resolve_index(SafetensorsIndex.from_folder(folder), Path(folder), model, modules, dtype)


def resolve_index(
    index: SafetensorsIndex,
    where: Path,
    model: "PreTrainedModel",
    modules: Sequence[ExpertsModule],
    dtype: "torch.dtype | None" = None,
) -> SafetensorsSource:
    """The same as :func:`resolve_safetensors` from an index that is at hand; ``where`` is named in errors.

    With the index of a Hub model the layouts are right, and nothing can be read.
    """
    targets = {name for module in modules for field in module.fields for name in _targets(module, field)}
    twins = _tied(model, targets)
    assemblies = assemble(index.tensors, model, targets | set(twins.values()), where)
    for target, twin in twins.items():
        if target not in assemblies and twin in assemblies:
            assemblies[target] = assemblies[twin]
    resolver = _Resolver(index, where, model, modules, assemblies, dtype)
    layers = [resolver.layer(number, module) for number, module in enumerate(modules)]
    return SafetensorsSource(index, layers, where)


def _tied(model: "PreTrainedModel", targets: set[str]) -> dict[str, str]:
    """Parameters that share their weights with another one, of which a checkpoint keeps only one copy."""
    pairs = getattr(model, "all_tied_weights_keys", {}).items()
    return {one: other for pair in pairs for one, other in (pair, pair[::-1]) if one in targets}


def _targets(module: ExpertsModule, field: ModuleField) -> list[str]:
    if "{expert}" not in field.parameter:
        return [f"{module.prefix}.{field.parameter}"]
    return [f"{module.prefix}.{field.parameter.format(expert=i)}" for i in range(module.experts)]


@dataclass(frozen=True)
class _Resolver:
    index: SafetensorsIndex
    where: Path
    model: "PreTrainedModel"
    modules: Sequence[ExpertsModule]
    assemblies: dict[str, Assembly]
    dtype: "torch.dtype | None"

    def layer(self, number: int, module: ExpertsModule) -> LayerPlan:
        packed = plan_packed_layer(self.index.tensors, module)
        if packed is not None:
            return LayerPlan(module.prefix, module.experts, packed, {})
        fields: list[FieldPlan] = []
        conversions: dict[int, Conversion] = {}
        for field in module.fields:
            assemblies = [self._assembly(target, module) for target in _targets(module, field)]
            plans = self._in_place(assemblies, module, field)
            if plans is None:
                plan, conversion = self._convert(assemblies, module, field)
                conversions[len(fields)] = conversion
                plans = [plan]
            fields += plans
        return LayerPlan(module.prefix, module.experts, tuple(fields), conversions)

    def _assembly(self, target: str, module: ExpertsModule) -> Assembly:
        assembly = self.assemblies.get(target)
        if assembly is None:
            raise CheckpointError(
                f"{self.where}: no tensor becomes {target}{self._quantized()}; the checkpoint is incomplete "
                "or belongs to another model: download it again"
            )
        lost = missing_sources(assembly, module.experts)
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise CheckpointError(
                f"{self.where}: tensor {lost[0]}{more} is missing; download the checkpoint again"
            )
        return assembly

    def _in_place(
        self, assemblies: list[Assembly], module: ExpertsModule, field: ModuleField
    ) -> list[FieldPlan] | None:
        if "{expert}" in field.parameter:
            plan = plan_each(self.index, assemblies, field)
        elif assemblies[0].packed:
            plan = plan_packed(self.index, assemblies[0], field, module.experts)
        else:
            return plan_in_place(self.index, assemblies[0], field, module)
        return None if plan is None else [plan]

    def _convert(
        self, assemblies: list[Assembly], module: ExpertsModule, field: ModuleField
    ) -> tuple[FieldPlan, Conversion]:
        try:
            return plan_conversion(
                self.index, assemblies, ShapeBook(self.model, self.modules), field, self.dtype
            )
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}{self._quantized()}") from error

    def _quantized(self) -> str:
        settings = getattr(self.model.config, "quantization_config", None)
        if settings is None:
            return ""
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        return f" (the checkpoint is quantized with {method}; use the unquantized one or a GGUF file)"

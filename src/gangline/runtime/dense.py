"""Build a model without its experts: transformers loads the dense weights and never meets an expert byte."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from gangline.checkpoint import packed
from gangline.core.errors import CheckpointError, UnsupportedModelError
from gangline.models import MoEView, drop_expert_params, find_moe
from gangline.runtime.on_meta import WithoutCompiler

# What transformers 5.23 itself cannot compute: deepseek_v4 keeps some products in fp32 beside fp16 inputs.
_CANNOT_COMPUTE = {"deepseek_v4": {torch.float16}}
# Formats in which a checkpoint may bring its experts and whose dense weights transformers loads as they are.
_PACKED_EXPERTS_ONLY = {"mxfp4", packed.METHOD}


def read_config(folder: Path, name: str) -> PreTrainedConfig:
    """Return the configuration of a checkpoint folder; ``name`` is what the user called the model.

    Raises:
        CheckpointError: ``config.json`` is missing or broken.
        UnsupportedModelError: transformers does not know the architecture, or the checkpoint is quantized in
            a way that is not for us.
    """
    try:
        # False and not the default: that asks on a terminal whether to run code from the checkpoint.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"{name}: transformers {transformers.__version__} cannot read this configuration "
            f"({str(error).splitlines()[0]}); use a newer transformers or another model"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{name}: {folder / 'config.json'} is missing or broken ({str(error).splitlines()[0]}); "
            "download it again"
        ) from error
    return strip_quantization(config, name)


def strip_quantization(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Remove a quantization entry whose packed experts we read ourselves; refuse the others by name."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return config
    entry = found if isinstance(found, dict) else vars(found)
    method, version = entry.get("quant_method"), entry.get("version")
    if method == packed.METHOD and version != packed.VERSION:
        raise UnsupportedModelError(
            f"{name}: the checkpoint has version {version!r} of gangline's format, and this gangline reads "
            f"version {packed.VERSION}; use the gangline that wrote it or a newer one"
        )
    if method not in _PACKED_EXPERTS_ONLY:
        raise UnsupportedModelError(
            f"{name}: the checkpoint is quantized with {method}, which gangline does not read; "
            "use the unquantized checkpoint (with --precision int4 or int8) or a GGUF file"
        )
    del config.quantization_config
    return config


def refuse_dtype(config: PreTrainedConfig, dtype: torch.dtype, name: str) -> None:
    """Raise where transformers fails in a number format inside the model.

    Raises:
        UnsupportedModelError: it does.
    """
    if dtype in _CANNOT_COMPUTE.get(config.model_type, ()):
        kind = str(dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{name}: transformers {transformers.__version__} cannot compute {config.model_type} in {kind}; "
            "use --dtype bf16 or fp32 (from Python dtype=torch.bfloat16)"
        )


def model_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """Return the transformers class of a checkpoint: the one its configuration names, else the generic one.

    Raises:
        UnsupportedModelError: there is none.
    """
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type):
            return found
    from transformers.models.auto import modeling_auto as auto

    for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        if type(config) in table:
            found = table[type(config)]
            assert isinstance(found, type)
            return found
    raise UnsupportedModelError(
        f"{name}: no transformers class generates text from {type(config).__name__}; use another model"
    )


def without_experts(cls: type[PreTrainedModel]) -> tuple[type[PreTrainedModel], Callable[[], MoEView]]:
    """Return a subclass that drops its expert matrices as it is built, and a function giving their view.

    ``from_pretrained`` reads only keys that the skeleton has, so the bytes of experts are never touched.
    """
    views: list[MoEView] = []

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        view = find_moe(self)
        _untie_experts(self, view)
        for block in view.blocks:
            drop_expert_params(block)
            for module in (block.parent, *block.experts.modules()):
                module.__dict__["_is_hf_initialized"] = True  # there is nothing left to draw at random
        ignored = {rf"(^|\.){_escaped(block.name)}\." for block in view.blocks}
        self._keys_to_ignore_on_load_unexpected = set(self._keys_to_ignore_on_load_unexpected or ()) | ignored
        views.append(view)

    # Same name and module: transformers finds conversion tables and source text by them.
    bare = type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
    return bare, lambda: views[-1]


def _untie_experts(model: Any, view: MoEView) -> None:
    """Note under which name a checkpoint holds experts that two modules share, and forget that they are tied.

    Each of the modules then has experts of its own in the store, read from the same bytes.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for block in view.blocks:
        own = [key for key in tied if key.startswith(f"{block.name}.")]
        for key in own:
            block.stored_name = tied.pop(key).removesuffix(key.removeprefix(block.name))


def build_skeleton(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, MoEView]:
    """Return the model on ``meta`` without expert matrices, and the view made before they were dropped."""
    bare, view = without_experts(cls)
    with WithoutCompiler(), torch.device("meta"):
        model = bare._from_config(config, dtype=dtype)
    return model, view()


def load_dense(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    folder: Path | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> tuple[PreTrainedModel, MoEView]:
    """Load everything but the experts, from a safetensors folder or from tensors at hand.

    Raises:
        CheckpointError: a dense weight is missing or has another shape.
    """
    bare, view = without_experts(cls)
    arguments: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    try:
        with _quiet(), WithoutCompiler():
            loaded: Any = bare.from_pretrained(folder, state_dict=tensors, **arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder or config.name_or_path}: the dense weights cannot be loaded "
            f"({str(error).strip().splitlines()[0]}); download the checkpoint again"
        ) from error
    model, info = loaded
    lost = sorted(key for key in info["missing_keys"] if not key.endswith("inv_freq"))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CheckpointError(
            f"{folder or config.name_or_path}: tensor {lost[0]}{more} is missing; "
            "download the checkpoint again"
        )
    model.__class__ = cls
    return model, view()


class _quiet:
    """No progress bar of transformers for the small dense part; ours shows the bytes."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._was_on = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        if self._was_on:
            logging.enable_progress_bar()


def _escaped(name: str) -> str:
    """Pattern for a module path whose numbers may be any layer: keys are compared before they are renamed."""
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))

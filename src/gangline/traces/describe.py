"""Make the header of a trace from the model that is recorded."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from gangline.models import stored_fields
from gangline.traces.header import Extra, Mode, Source, TraceHeader, TraceLayer
from gangline.traces.hooks import Stack, moe_view, observed_part

_VERSIONS = ("gangline", "torch", "transformers")


def describe_recording(
    model: nn.Module,
    name: str,
    *,
    mode: Mode = "full",
    extras: Sequence[Extra] = (),
    source: Source = "text",
    stack: Stack | None = None,
    tokenizer: Any = None,
    expert_bytes: Sequence[int] | None = None,
    revision: str | None = None,
    sampling: dict[str, Any] | None = None,
    seed: int | None = None,
) -> TraceHeader:
    """Return the header of a recording that is about to begin.

    Args:
        model: plain, loaded or attached.
        name: what the user calls it.
        mode, extras, source, revision, sampling, seed: as in :class:`TraceHeader`.
        stack: which part of an encoder-decoder model.
        tokenizer: its tokenizer, for the hashes.
        expert_bytes: bytes of one expert of each MoE layer of the whole model as it is stored; by default in
            the model's number format.

    Raises:
        UnsupportedModelError, TraceError: as for :func:`gangline.traces.hooks.observe`.
    """
    _, blocks = observed_part(model, stack)
    runtime = getattr(model, "gangline", None)
    dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
    layers = []
    for block in blocks:
        size = stored_fields(block, dtype).nbytes if expert_bytes is None else expert_bytes[block.layer]
        spec = block.router_spec
        layers.append(
            TraceLayer(
                block.name,
                block.geometry.experts,
                block.geometry.top_k,
                block.geometry.hidden,
                block.geometry.intermediate,
                int(size),
                None if spec is None else spec.score,
                tuple(path for path, _ in block.shared),
            )
        )
    template = getattr(tokenizer, "chat_template", None)
    return TraceHeader(
        model=name,
        family=moe_view(model).family,
        layers=tuple(layers),
        mode=mode,
        extras=tuple(extras),
        source=source,
        revision=revision,
        dtype=str(dtype).removeprefix("torch."),
        backend="transformers" if runtime is None else "gangline",
        tokenizer_sha256=None if tokenizer is None else vocabulary_digest(tokenizer),
        chat_template_sha256=_digest(template) if isinstance(template, str) else None,
        sampling=sampling or {},
        seed=seed,
        versions=_versions(),
    )


def vocabulary_digest(tokenizer: Any) -> str:
    """Hash what maps text to ids, as far as it can be seen: the vocabulary."""
    return _digest(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

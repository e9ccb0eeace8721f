"""Trained predictor networks as safetensors files.

The metadata of a file says which predictor it is (``kind``), how to build the network (``config``, JSON) and
where it comes from (``about``, JSON): enough to load it without the model that it was trained for.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gangline.core.errors import UsageError

FORMAT = "gangline-predictor-1"


@dataclass(frozen=True)
class SavedPredictor:
    """A trained network.

    Attributes:
        kind: a key of ``PREDICTORS`` and of ``NETWORKS``.
        network: the torch module, in evaluation mode, fp32.
        config: the arguments that built it.
        about: where it comes from: model, trace, settings, losses; whatever the trainer wrote.
    """

    kind: str
    network: Any
    config: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)


def _sida(**config: Any) -> Any:
    from gangline.policies.predictors.sida import HashFunction

    return HashFunction(**config)


def _expertflow(**config: Any) -> Any:
    from gangline.policies.predictors.expertflow import RoutingPathPredictor

    return RoutingPathPredictor(**config)


def _pre_gate(shapes: list[list[int]]) -> Any:
    import torch

    from gangline.policies.predictors.pregate import PreGates

    return PreGates([torch.zeros(0), *(torch.zeros(rows, columns) for rows, columns in shapes)])


def _read_me(**config: Any) -> Any:
    from gangline.policies.predictors.read_me import DecoupledRouter

    return DecoupledRouter(**config)


def _token_id(**config: Any) -> Any:
    from gangline.policies.predictors.token_table import TokenTable

    return TokenTable(**config)


NETWORKS: dict[str, Callable[..., Any]] = {
    "sida": _sida,
    "expertflow": _expertflow,
    "pre-gate": _pre_gate,
    "read-me": _read_me,
    "token-id": _token_id,
}
"""How each kind is built from its ``config`` (``pre-gate``: the shapes ``[E, D]`` of blocks 1 and on)."""


def save_predictor(
    path: Path | str,
    kind: str,
    network: Any,
    config: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network; the file appears under its name only when it is complete.

    Args:
        path: of the file.
        kind: a key of ``NETWORKS``.
        network: a module whose state dict ``NETWORKS[kind](**config)`` accepts.
        config: JSON values.
        about: JSON values that a reader should see.

    Raises:
        UsageError: the file cannot be written.
    """
    from safetensors.torch import save

    path = Path(path).expanduser()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "kind": kind,
        "config": json.dumps(dict(config)),
        "about": json.dumps(dict(about or {})),
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(save(state, metadata))
        part.replace(path)
    except OSError as error:
        raise UsageError(
            f"cannot write the predictor {path} ({error.strerror}); name another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def load_predictor(path: Path | str) -> SavedPredictor:
    """Read what :func:`save_predictor` wrote.

    Raises:
        UsageError: the file is missing or damaged, or is no predictor.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    way_out = "train one with 'gangline predict train'"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as a predictor ({error}); {way_out}") from error
    kind = metadata.get("kind", "")
    if metadata.get("format") != FORMAT or kind not in NETWORKS:
        raise UsageError(f"{path} is not a predictor that this gangline knows; {way_out}")
    try:
        config, about = json.loads(metadata["config"]), json.loads(metadata.get("about", "{}"))
        network = NETWORKS[kind](**config)
        network.load_state_dict(state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {error}); {way_out}") from error
    return SavedPredictor(kind, network.float().eval(), config, about)

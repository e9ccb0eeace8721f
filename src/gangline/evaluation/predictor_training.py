"""Train any learned predictor on recorded routing.

Legend: B documents, T tokens, L MoE layers, E experts, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gangline.core.errors import UsageError
from gangline.evaluation.predictor_data import RoutedText, embed
from gangline.policies.predictors.expertflow import RoutingPathPredictor, train_paths
from gangline.policies.predictors.fitting import Progress
from gangline.policies.predictors.pregate import PreGates, train_pregates
from gangline.policies.predictors.read_me import DecoupledRouter, train_router
from gangline.policies.predictors.sida import HashFunction, SidaTraining, train_hash_function
from gangline.policies.predictors.token_statistics import TokenStatistics
from gangline.policies.predictors.token_table import TokenTable
from gangline.traces.header import Extra


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; None takes the predictor's own default of ``DEFAULTS``.

    Attributes:
        epochs: passes over the data.
        lr: learning rate of Adam.
        hidden: width of the network.
        batch: documents of one step.
        seed: of the first weights and of the order of the data.
        ce: SiDA's weight of the cross-entropy. top: SiDA's truncation of the distillation.
    """

    epochs: int | None = None
    lr: float | None = None
    hidden: int | None = None
    batch: int = 2
    seed: int = 0
    ce: float = 0.005
    top: int = 30


@dataclass(frozen=True)
class Trained:
    """A trained network, as ``save_predictor`` takes it.

    Attributes:
        kind: a key of ``saved.NETWORKS``.
        network: in evaluation mode.
        config: the arguments that build it.
        settings: what it was trained with, for the file's ``about``.
        loss: mean over the last epoch; None where nothing is minimised.
    """

    kind: str
    network: Any
    config: dict[str, Any]
    settings: dict[str, Any]
    loss: float | None


# The papers' own learning rates (SiDA 5e-5, Read-ME 5e-4) need hours; these reach the same within minutes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sida": {"epochs": 8, "lr": 2e-3, "hidden": 256},
    "expertflow": {"epochs": 10, "lr": 1e-3, "hidden": 32},
    "read-me": {"epochs": 6, "lr": 5e-4, "hidden": 512},
    "pre-gate": {"epochs": 4, "lr": 1e-3},
    "token-id": {},
}
"""What is trained unless the user says otherwise."""

EXTRAS: dict[str, tuple[Extra, ...]] = {
    "sida": ("logits",),
    "expertflow": (),
    "read-me": ("logits",),
    "pre-gate": ("logits", "inputs"),
    "token-id": (),
}
"""What a trace must hold beside experts for each predictor."""


def train_predictor(
    kind: str,
    model: Any,
    documents: Sequence[RoutedText],
    settings: TrainingSettings,
    progress: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Train a predictor; the same seed and documents give the same network on one machine.

    Args:
        kind: a key of ``DEFAULTS``.
        model: the model that was recorded; its embeddings and routers are read.
        documents: what to learn from.
        settings: how.
        progress: told step, steps in all, and loss.

    Raises:
        UsageError: the predictor is not known, or the documents lack what it learns from.
    """
    if kind not in DEFAULTS:
        raise UsageError(f"{kind!r} is not trained; choose one of {', '.join(DEFAULTS)}")
    for extra in EXTRAS[kind]:
        if getattr(documents[0], extra) is None:
            raise UsageError(
                f"{kind} learns from the {extra} of the routers, which this trace does not hold; "
                f"record it with 'gangline trace --{extra}', or give --data"
            )
    chosen: dict[str, Any] = {
        name: getattr(settings, name) if getattr(settings, name) is not None else value
        for name, value in DEFAULTS[kind].items()
    }
    torch.manual_seed(settings.seed)
    network, config, loss = _TRAINERS[kind](model, documents, settings, chosen, progress)
    recipe = {**chosen, "batch": settings.batch, "seed": settings.seed}
    if kind == "sida":
        recipe |= {"ce": settings.ce, "top": settings.top}
    return Trained(kind, network, config, recipe if DEFAULTS[kind] else {}, loss)


_Made = tuple[Any, dict[str, Any], float | None]


def _batches(documents: Sequence[RoutedText], size: int) -> list[list[RoutedText]]:
    """Group documents of one length, so that nothing must be padded."""
    by_length: dict[int, list[RoutedText]] = {}
    for document in documents:
        by_length.setdefault(len(document.ids_T), []).append(document)
    return [mine[i : i + size] for mine in by_length.values() for i in range(0, len(mine), size)]


def _there(values: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    assert values is not None  # train_predictor looked
    return values


def _steps(
    progress: Callable[[int, int, float], None] | None, samples: Sequence[Any], epochs: int
) -> Progress | None:
    if progress is None:
        return None
    return lambda step, loss: progress(step, len(samples) * epochs, loss)


def _experts(documents: Sequence[RoutedText], model: Any) -> list[int]:
    logits = documents[0].logits
    if logits is not None:
        return [z_TE.shape[1] for z_TE in logits]
    return [layer.experts for layer in model.gangline.geometry.layers[: len(documents[0].chosen)]]


def _even_experts(documents: Sequence[RoutedText], model: Any, kind: str) -> int:
    experts = set(_experts(documents, model))
    if len(experts) > 1:
        raise UsageError(f"{kind} needs layers of equally many experts, not {sorted(experts)}; choose sida")
    return experts.pop()


def _sida(model: Any, documents: Any, settings: TrainingSettings, chosen: Any, progress: Any) -> _Made:
    config = {
        "embedding": embed(model, documents[0].ids_T[:1].unsqueeze(0)).shape[-1],
        "experts": _experts(documents, model),
        "hidden": chosen["hidden"],
        "causal": not model.config.is_encoder_decoder,
    }
    network = HashFunction(**config)
    samples = [
        (
            embed(model, torch.stack([d.ids_T for d in batch])),
            [torch.stack(z) for z in zip(*(_there(d.logits) for d in batch), strict=True)],
        )
        for batch in _batches(documents, settings.batch)
    ]
    setting = SidaTraining(settings.ce, settings.top, chosen["lr"], chosen["epochs"], settings.seed)
    loss = train_hash_function(network, samples, setting, _steps(progress, samples, setting.epochs))
    return network, config, loss


def _expertflow(model: Any, documents: Any, settings: TrainingSettings, chosen: Any, progress: Any) -> _Made:
    experts = _even_experts(documents, model, "expertflow")
    config = {
        "vocabulary": model.get_input_embeddings().num_embeddings,
        "layers": len(documents[0].chosen),
        "experts": experts,
        "hidden": chosen["hidden"],
    }
    network = RoutingPathPredictor(**config)
    samples = [
        (torch.stack([d.ids_T for d in batch]), torch.stack([_used(d, experts) for d in batch]))
        for batch in _batches(documents, settings.batch)
    ]
    loss = train_paths(
        network,
        samples,
        epochs=chosen["epochs"],
        lr=chosen["lr"],
        seed=settings.seed,
        progress=_steps(progress, samples, chosen["epochs"]),
    )
    return network, config, loss


def _used(document: RoutedText, experts: int) -> Tensor:
    """Return the 0/1 routing matrix ``[T, L, E]``, in bytes."""
    rows = [
        one_hot(ids_TK.clamp(min=0), experts).mul(ids_TK.ge(0).unsqueeze(-1)).amax(1)
        for ids_TK in document.chosen
    ]
    return torch.stack(rows, dim=1).to(torch.uint8)


def _read_me(model: Any, documents: Any, settings: TrainingSettings, chosen: Any, progress: Any) -> _Made:
    config = {
        "vocabulary": model.get_input_embeddings().num_embeddings,
        "layers": len(documents[0].chosen),
        "experts": _even_experts(documents, model, "read-me"),
        "hidden": chosen["hidden"],
        "shared": False,
    }
    network = DecoupledRouter(**config)
    samples = [
        (
            torch.stack([d.ids_T for d in batch]),
            torch.stack([torch.stack(_there(d.logits), dim=1) for d in batch]),
        )
        for batch in _batches(documents, settings.batch)
    ]
    loss = train_router(
        network,
        samples,
        epochs=chosen["epochs"],
        lr=chosen["lr"],
        seed=settings.seed,
        progress=_steps(progress, samples, chosen["epochs"]),
    )
    return network, config, loss


def _pre_gate(model: Any, documents: Any, settings: TrainingSettings, chosen: Any, progress: Any) -> _Made:
    width = documents[0].inputs[0].shape[1]
    gates = [_gate(block, width) for block in model.gangline.view.blocks[: len(documents[0].chosen)]]
    network = PreGates(gates)
    samples = [
        (
            block,
            torch.cat([_there(d.inputs)[block] for d in batch]),
            torch.cat([_there(d.logits)[block + 1] for d in batch]),
        )
        for batch in _batches(documents, settings.batch)
        for block in range(len(gates) - 1)
    ]
    loss = train_pregates(
        network,
        samples,
        epochs=chosen["epochs"],
        lr=chosen["lr"],
        seed=settings.seed,
        progress=_steps(progress, samples, chosen["epochs"]),
    )
    return network, {"shapes": [list(gate.shape) for gate in gates[1:]]}, loss


def _gate(block: Any, width: int) -> Tensor:
    """Return the matrix ``[E, D]`` of a block's router, or zeros where it is not a single one."""
    shape = (block.geometry.experts, width)
    parameters = [] if block.router is None else list(block.router.parameters())
    found = next((p for p in parameters if tuple(p.shape) == shape), None)
    return torch.zeros(shape) if found is None else found.detach().float()


def _token_id(model: Any, documents: Any, settings: TrainingSettings, chosen: Any, progress: Any) -> _Made:
    table = TokenTable.of(count_tokens(documents, _experts(documents, model)))
    return table, table.config, None


def count_tokens(documents: Sequence[RoutedText], experts: Sequence[int]) -> TokenStatistics:
    """Return the token-id statistics of some documents."""
    statistics = TokenStatistics(experts, learn=False)
    for document in documents:
        for layer, ids_TK in enumerate(document.chosen):
            there_T = (ids_TK >= 0).all(dim=1)
            statistics.count(layer, document.ids_T[there_T].numpy(), ids_TK[there_T].numpy())
    return statistics


_TRAINERS: dict[str, Callable[..., _Made]] = {
    "sida": _sida,
    "expertflow": _expertflow,
    "read-me": _read_me,
    "pre-gate": _pre_gate,
    "token-id": _token_id,
}

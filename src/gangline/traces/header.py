"""What a trace says about itself: ``meta.json``."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from gangline.core.errors import GanglineError
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.traces.files import write_whole

META = "meta.json"
FORMAT = "gangline-trace"
VERSION = 1

Mode = Literal["full", "ids", "counts"]
Extra = Literal["logits", "inputs"]
Source = Literal["text", "generation", "imported"]


class TraceError(GanglineError):
    """A trace cannot be read, written or used for what was asked; names the trace."""


@dataclass(frozen=True)
class TraceLayer:
    """One MoE layer.

    Attributes:
        name: path of its experts in the model.
        experts: routed experts N.
        top_k: slots per token K.
        hidden: model width D.
        intermediate: expert width F.
        expert_bytes: bytes of one expert as it was stored when the trace was recorded.
        score: how the router turns logits into scores (``softmax``, ``sigmoid``, ...); None if unknown.
        shared: paths of the shared experts beside it, which no trace shows.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    expert_bytes: int
    score: str | None = None
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class TraceHeader:
    """Everything about a trace that is not a row.

    Attributes:
        model: what the user called the model, with its ``revision``.
        family: ``model_type`` of its configuration.
        layers: the MoE layers in the order in which a token meets them.
        mode: ``full`` (ids and weights), ``ids``, or ``counts`` (sums only).
        extras: ``logits`` of the routers and ``inputs`` of the routers, where they were asked for.
        source: whether the tokens are a given ``text``, the model's own ``generation``, or ``imported``.
        routing: ``effective`` routing is what ran; ``raw`` is what the router said.
        dtype: number format of the computation.
        backend: what computed the experts.
        tokenizer_sha256, chat_template_sha256: of the tokenizer's files, None if there was none.
        policy_sha256: of the routing policy; None is the model's own routing.
        sampling: settings of the generation.
        prefix_caching: whether passes skipped tokens that were cached; then positions have gaps.
        seed: of the sampling.
        labels: for each kind of label the names that its numbers stand for.
        versions: of the software.
        created: when recording began (UTC, ISO 8601).
        complete: whether recording came to its end.
    """

    model: str
    family: str
    layers: tuple[TraceLayer, ...]
    mode: Mode = "full"
    extras: tuple[Extra, ...] = ()
    source: Source = "text"
    routing: Literal["effective", "raw"] = "effective"
    revision: str | None = None
    dtype: str | None = None
    backend: str | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    policy_sha256: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    prefix_caching: bool = False
    seed: int | None = None
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str | None = None
    complete: bool = False

    @property
    def geometry(self) -> MoEGeometry:
        """The sizes of all layers (experts with a gate are assumed: bytes come from ``expert_bytes``)."""
        return MoEGeometry(
            tuple(LayerGeometry(x.experts, x.top_k, x.hidden, x.intermediate) for x in self.layers)
        )

    @property
    def top_k(self) -> tuple[int, ...]:
        """Slots per token, for each layer."""
        return tuple(layer.top_k for layer in self.layers)

    @property
    def experts(self) -> tuple[int, ...]:
        """Routed experts, for each layer."""
        return tuple(layer.experts for layer in self.layers)

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        """Bytes of one expert, for each layer."""
        return tuple(layer.expert_bytes for layer in self.layers)

    def same_recording(self, other: "TraceHeader") -> list[str]:
        """Return the fields in which another header differs, apart from progress, time and software."""
        moving = {"created", "complete", "versions", "labels"}
        names = [item.name for item in fields(self) if item.name not in moving]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def with_label(self, kind: str, name: str) -> tuple["TraceHeader", int]:
        """Return the header that knows a label, and the label's number."""
        names = self.labels.get(kind, ())
        if name in names:
            return self, names.index(name)
        return replace(self, labels=self.labels | {kind: (*names, name)}), len(names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"format": FORMAT, "version": VERSION} | asdict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> "TraceHeader":
        """Read what :meth:`to_dict` returned.

        Raises:
            TraceError: it is not a trace, is of a later version, or lacks a field.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise TraceError(f"{where} is not the header of a gangline trace; record it with gangline trace")
        if data.get("version") != VERSION:
            raise TraceError(
                f"{where} has version {data.get('version')}, this gangline reads {VERSION}; "
                "update gangline or record the trace again"
            )
        known = {item.name for item in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        try:
            layers = tuple(
                TraceLayer(**{**layer, "shared": tuple(layer.get("shared", ()))}) for layer in data["layers"]
            )
            labels = {kind: tuple(names) for kind, names in values.get("labels", {}).items()}
            values |= {"layers": layers, "labels": labels, "extras": tuple(values.get("extras", ()))}
            header = cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TraceError(f"{where} is damaged ({error}); record the trace again") from error
        if header.mode not in get_args(Mode) or not header.layers:
            raise TraceError(f"{where}: mode {header.mode!r} with {len(header.layers)} layers; record again")
        return header


def read_header(folder: Path) -> TraceHeader:
    """Read the header of the trace in ``folder``.

    Raises:
        TraceError: there is none, or it is damaged.
    """
    path = folder / META
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(f"{folder} is not a trace ({error}); record one with gangline trace") from error
    return TraceHeader.from_dict(data, str(path))


def write_header(folder: Path, header: TraceHeader) -> None:
    """Write the header in one step."""
    text = json.dumps(header.to_dict(), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / META, lambda path: path.write_text(text, encoding="utf-8"))

"""What hangs on a model as ``model.gangline``: its plan, its store, its counters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import psutil
from torch import Tensor, nn

from gangline.core.errors import BudgetError, ContextError, UsageError
from gangline.core.geometry import MoEGeometry
from gangline.core.layout import ExpertCatalog
from gangline.core.sizes import format_size
from gangline.core.tiers import Priority
from gangline.models import MoEView
from gangline.policies.parts import Parts
from gangline.runtime.embedding import leave_in_file
from gangline.runtime.engine import Engine, Observer, Reroute, Steps
from gangline.runtime.gpu_experts import GpuExperts
from gangline.runtime.planner import MemoryPlan
from gangline.runtime.policy_choice import DEFAULT, PolicyChoice, asked_policy
from gangline.runtime.policy_setup import live_parts, start_policy
from gangline.runtime.store import ExpertStore


@dataclass(frozen=True)
class RuntimeStats:
    """Counters since the model was loaded.

    Attributes:
        host_hits: experts of routing events found in memory; ``host_misses`` had to be read. Where all are in
            memory and nobody watches, an int8 or int4 model computes the last layer of a prompt for the last
            token of each sequence only, and counts the experts of that.
        bytes_read: expert bytes read from disk; ``prefetch_bytes`` of them before they were asked for.
        prefill_tokens: rows of forward passes with more than one token per sequence.
        decode_tokens: rows of the others.
        stall_seconds: time that computing waited for reads.
        compute_seconds: time that computing leased experts took.
        evictions: experts that gave up their slot.
        hit_rate: share of hits, None before the first event.
        approximate: what changes the model's output besides its precision, in words; None if nothing does.
        low_hits, low_misses: hits and misses that were computed in low precision.
        skipped: experts of routing events that were left out; neither hits nor misses.
    """

    host_hits: int
    host_misses: int
    bytes_read: int
    prefetch_bytes: int
    prefill_tokens: int
    decode_tokens: int
    stall_seconds: float
    compute_seconds: float
    evictions: int
    hit_rate: float | None
    approximate: str | None = None
    low_hits: int = 0
    low_misses: int = 0
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


class Runtime:
    """The running side of one model; made by :func:`gangline.load` and :func:`gangline.attach`.

    A context manager: leaving it closes the runtime.

    Attributes:
        plan: where every byte of the budget goes.
        catalog: where the experts are read.
        view: the model's MoE layers, and geometry: their sizes.
        policy: the composition that it runs under.
        identity: a hash of the model's files; empty for a model that was attached.
        gpu: the experts, where they all lie on a GPU.
        attached: whether the model was built by somebody else and gets its experts back on ``close``.
        decodes_natively: whether tokens after the prompt run through the native step. Its routers read what
            the experts read.
    """

    def __init__(
        self,
        model: nn.Module,
        view: MoEView,
        plan: MemoryPlan,
        catalog: ExpertCatalog,
        store: ExpertStore,
        engine: Engine,
        policy: PolicyChoice = DEFAULT,
    ) -> None:
        self.plan = plan
        self.policy = policy
        self.catalog = catalog
        self.view = view
        self.geometry: MoEGeometry = view.geometry
        self._model = model
        self._store: ExpertStore | None = store
        self._engine = engine
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._undo: list[Callable[[], None]] = []
        self.gpu: GpuExperts | None = None
        self._approximate: str | None = None
        self._mixed: str | None = None
        self._stop_policy: Callable[[], None] = lambda: None
        if plan.in_file:
            self._undo.append(leave_in_file(model.get_input_embeddings()))  # type: ignore[operator]
        self.identity = ""
        self.attached = False
        self.decodes_natively = False

    @property
    def store(self) -> ExpertStore:
        """The expert store."""
        if self._store is None:
            raise BudgetError("this model was closed; load it again")
        return self._store

    @property
    def idle(self) -> bool:
        """Whether all experts stay where they are, so that no policy has anything to do."""
        return self.gpu is not None or self.plan.everything_resident

    def _where(self) -> str:
        if self.gpu is not None:
            return f"all experts on {self.gpu.gpu.name}"
        return f"{self.plan.resident_share:.0%} of experts in RAM"

    @property
    def smallest_slots(self) -> int:
        """The smallest number of expert slots with which the model runs."""
        return len(self.plan.slots)

    def on_close(self, undo: Callable[[], None]) -> None:
        """Add something to undo when the runtime is closed."""
        self._undo.append(undo)

    def start_policy(self, parts: Parts) -> None:
        """Let the parts of the policy run beside the engine; where all experts are in memory nothing does."""
        rule = parts.precision
        self._mixed = None
        if rule is not None and not rule.exact:
            codecs = "+".join(self.plan.low_codecs)
            self._mixed = f"experts not in memory may be computed in {codecs} or left out"
        if not self.idle:
            slots = self.plan.experts_resident + sum(count for _, count, _ in self.plan.low_slots)
            self._stop_policy = start_policy(self._model, self.view, self._engine, self.store, parts, slots)

    def use_policy(
        self, policy: str, predictor: str | None = None, mode: Literal["hint", "mixed"] = "hint"
    ) -> None:
        """Go on under another composition, with an empty cache. In mode ``hint`` the answers stay the same.

        Args:
            policy: a name, or a ``.yaml`` file.
            predictor: what it learned: a file of ``gangline predict train``, or a trace.
            mode: ``mixed`` lets the composition compute experts in low precision; the model must have been
                loaded in that mode, since copies need slots.

        Raises:
            UsageError: the composition is not known, its parts cannot be made, or there are no copies.
            StoreError: the model is computing.
        """
        choice = asked_policy(policy, predictor, mode)
        assert choice is not None
        if mode == "mixed" and not self.plan.low_slots and not self.idle:
            raise UsageError(f"there are no slots for a second precision; load the model with {policy}")
        parts = live_parts(choice, self.view, self.plan)
        if not self.idle:
            self.store.use_policies(parts.caches)
            self._stop_policy()
        self.policy = choice
        self.start_policy(parts)

    def stats(self) -> RuntimeStats:
        """Return the counters."""
        stats = self.store.stats
        return RuntimeStats(
            host_hits=stats.hits,
            host_misses=stats.misses,
            bytes_read=stats.total_bytes_read,
            prefetch_bytes=stats.bytes_read[Priority.PREFETCH.name.lower()],
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            stall_seconds=stats.stall_seconds,
            compute_seconds=stats.compute_seconds,
            evictions=stats.evictions,
            hit_rate=stats.hit_rate,
            approximate=self._changed,
            low_hits=stats.low_hits,
            low_misses=stats.low_misses,
            skipped=stats.skipped,
        )

    @property
    def _changed(self) -> str | None:
        """What changes the output, in words."""
        return "; ".join(words for words in (self._approximate, self._mixed) if words) or None

    def banner(self) -> str:
        """Return one line: exactness, formats, share in memory, memory against budget, policy, hit rate."""
        plan = self.plan
        kind = "exact" if plan.precision == "stored" else "approximate"
        if self._changed is not None:
            kind = f"approximate ({self._changed})"
        parts = [
            f"{kind}, {'+'.join(plan.codecs)}, {self._where()}",
            f"peak {format_size(peak_resident())}"
            + (f" of {format_size(plan.budget)}" if plan.budget else ""),
            self.policy.words(idle=self.idle),
        ]
        stats = self.stats()
        if stats.hit_rate is not None:
            rows = max(1, stats.decode_tokens + stats.prefill_tokens)
            parts.append(f"hit rate {stats.hit_rate:.2f}")
            if plan.low_slots:
                low = stats.low_hits + stats.low_misses
                used = stats.host_hits + stats.host_misses + stats.skipped
                parts.append(f"{low / used:.0%} in low precision, {stats.skipped / used:.1%} left out")
            parts.append(f"{format_size(stats.bytes_read / rows)} read per token")
        return " | ".join(parts)

    @contextmanager
    def observed(self, observer: Observer, steps: Steps | None = None) -> Iterator[None]:
        """Call ``observer(layer, x_TD, ids_TK, weights_TK)`` for every routing event while the block runs.

        The numbers stay those of a run without an observer, and every layer routes every token, whether the
        logits need it or not. The tensors are reused: copy what you keep.

        Args:
            observer: see above.
            steps: told of all layers at once where the native core computes a whole step; without it such
                steps are computed layer by layer.
        """
        engine = self._engine
        before = engine.observer, engine.on_step
        engine.observer, engine.on_step = observer, steps
        try:
            yield
        finally:
            engine.observer, engine.on_step = before

    @property
    def rerouted(self) -> bool:
        """Whether somebody else than the routers decides what is computed (see :meth:`reroute`)."""
        return self._engine.reroute is not None

    @property
    def next_step(self) -> int:
        """Number of the forward pass that comes next, as forecasts count."""
        return self._engine.next_step

    def reroute(self, reroute: Reroute, approximate: str | None) -> Callable[[], None]:
        """Let ``reroute`` decide what every event computes; returns what ends it.

        Args:
            reroute: see :data:`gangline.runtime.engine.Reroute`.
            approximate: how it changes the output, in words for banner and statistics; None if it does not.

        Raises:
            UsageError: somebody else does so already.
        """
        if self._engine.reroute is not None:
            raise UsageError("the routing of this model is taken over already; end that first")
        self._engine.reroute, self._approximate = reroute, approximate

        def end() -> None:
            self._engine.reroute, self._approximate = None, None

        return end

    def close(self) -> None:
        """Free the experts. A model from ``load`` cannot compute afterwards; an attached one is as it was."""
        self._stop_policy()
        if self._store is not None:
            self._store.close()
            self._store = None
        while self._undo:
            self._undo.pop()()
        self._model.__dict__.pop("gangline", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward hook of the model: note the phase, and refuse what the plan has no room for.

        Raises:
            ContextError: more tokens, rows or logits than were planned for.
        """
        shape = _input_shape(args, kwargs)
        if shape is None:
            self._engine.phase = "prefill"
            return
        policy = self._engine.policy
        sequences, length = shape
        past = _past_tokens(kwargs)
        if length == 1:
            self.before_step(sequences, past)
        else:
            self._engine.phase = "prefill"
            self._prefill_tokens += sequences * length
            self._check_room(sequences, length, past, kwargs)
        if policy is not None:
            policy.begin_pass(self._engine.next_step, _token_ids(args, kwargs), new=past == 0)

    def before_step(self, sequences: int, past: int) -> None:
        """Note a pass over one token a sequence, with ``past`` positions in the cache.

        Raises:
            ContextError: as :meth:`before_forward`.
        """
        self._engine.phase = "decode"
        self._decode_tokens += sequences
        self._check_room(sequences, 1, past, {})

    def _check_room(self, sequences: int, length: int, past: int, kwargs: dict[str, Any]) -> None:
        plan = self.plan
        if plan.budget is None:
            return
        total = sequences * (past + length)
        if total > plan.context:
            raise ContextError(
                f"{plan.model}: {total} tokens ({sequences} x {past + length}) exceed the "
                f"{plan.context} planned for in {format_size(plan.budget or 0)}; "
                f"load with a larger ctx_size (--ctx-size {total})"
            )
        rows = sequences * length
        positions = rows if length > 1 and not kwargs.get("logits_to_keep") else sequences
        need = rows * plan.row_bytes + positions * plan.logit_bytes
        if need > plan.activations:
            raise ContextError(
                f"{plan.model}: a forward pass over {rows} tokens with the logits of {positions} needs "
                f"{format_size(need)}, more than the {format_size(plan.activations)} planned for "
                f"activations; pass logits_to_keep=1, feed at most {plan.rows} tokens at once, "
                f"or load with larger batch_tokens"
            )


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Return the largest resident memory of this process so far, in bytes (the current one where unknown).

    Not ``getrusage``: its figure starts at what the parent process had when it forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident()


def _past_tokens(kwargs: dict[str, Any]) -> int:
    """Return the tokens that the cache of a call holds already."""
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def _token_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the token ids of a call; None where it is given embeddings."""
    for value in (kwargs.get("decoder_input_ids"), kwargs.get("input_ids"), *args[:1]):
        if isinstance(value, Tensor) and not value.is_floating_point():
            return value
    return None


def _input_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if value is not None:
            return int(value.shape[0]), int(value.shape[1])
    if args and hasattr(args[0], "shape") and len(args[0].shape) >= 2:
        return int(args[0].shape[0]), int(args[0].shape[1])
    return None

"""The memory planner: reserve everything else first, give the rest to expert slots, refuse the impossible."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gangline.core.errors import BudgetError
from gangline.core.sizes import format_size
from gangline.policies.precision import divide_slots
from gangline.runtime.embedding import RESIDENT_BYTES
from gangline.runtime.footprint import Copies, Footprint

MIB = 1 << 20
# Measured on CPU: what torch's libraries allocate on first use, thread stacks, and allocator slack.
RUNTIME_RESERVE = 144 * MIB
# Of a loaded model that the native core computes: most of the above has been taken, or never will be.
NATIVE_RESERVE = 48 * MIB
PREFILL_ROWS = 2048
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class MemoryPlan:
    """Where every byte of the budget goes.

    Attributes:
        model: what the user called the model.
        budget: peak resident bytes promised, or None for no limit.
        precision: ``stored`` or the codec that the experts are converted to.
        context: tokens (over all sequences together) for which keys and values are reserved.
        rows: largest number of rows in one forward pass (a prompt is fed in chunks of this many tokens).
        process: resident bytes of Python and its libraries before the model.
        reserve: what the libraries will still allocate, from the moment at which ``process`` was measured.
        dense, load_extra: dense weights, and what loading them holds besides for a moment.
        in_file: the part of ``dense`` that stays in its file: an embedding of which only rows are read.
        kv, activations, kernel: key/value cache, one prefill chunk, scratch of the experts' kernels.
        row_bytes, logit_bytes: activations of one row, and the logits of one position.
        slots: for every slot size ``(slot bytes, count, layers)``.
        low_slots: the same of copies in low precision, whose layers are numbered behind the model's last;
            ``low_codecs`` are their codecs.
        experts_total, experts_resident: number of experts, and how many have a slot.
        expert_bytes: payload of all experts.
        smallest: the smallest budget that works at this context and precision.
        notes: sentences for the user.
    """

    model: str
    budget: int | None
    precision: str
    context: int
    rows: int
    process: int
    reserve: int
    dense: int
    load_extra: int
    in_file: int
    kv: int
    activations: int
    kernel: int
    row_bytes: int
    logit_bytes: int
    slots: tuple[tuple[int, int, tuple[int, ...]], ...]
    experts_total: int
    experts_resident: int
    expert_bytes: int
    smallest: int
    codecs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    speed: dict[str, Any] = field(default_factory=dict)
    low_slots: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    low_codecs: tuple[str, ...] = ()

    @property
    def pools(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """The slots of both precisions."""
        return self.slots + self.low_slots

    @property
    def fixed(self) -> int:
        """Everything that is not an expert slot."""
        weights = self.dense - self.in_file
        return self.process + self.reserve + weights + self.kv + self.activations + self.kernel

    @property
    def slot_bytes(self) -> int:
        """Bytes of all expert slots."""
        return sum(size * count for size, count, _ in self.pools)

    @property
    def peak(self) -> int:
        """Planned peak of the resident memory."""
        return max(self.fixed + self.slot_bytes, self._while_loading)

    @property
    def _while_loading(self) -> int:
        return self.process + self.reserve + self.dense - self.in_file + self.load_extra

    @property
    def smallest_advised(self) -> int:
        """The smallest budget with a few MiB more: a process does not begin equally large every time."""
        return -(-(self.smallest + 4 * MIB) // (8 * MIB)) * 8 * MIB

    @property
    def resident_share(self) -> float:
        """Share of the experts that have a slot."""
        return self.experts_resident / self.experts_total

    @property
    def everything_resident(self) -> bool:
        """Whether no expert is ever evicted."""
        return self.experts_resident >= self.experts_total

    def rows_table(self) -> list[tuple[str, int, str]]:
        """Return ``(what, bytes, why)`` in the order in which the planner reserves."""
        low = sum(size * count for size, count, _ in self.low_slots)
        rows = [
            ("Python and libraries", self.process, "measured in this process"),
            (
                "library buffers",
                self.reserve,
                "thread stacks, math libraries on first use, allocator slack",
            ),
            ("dense weights", self.dense - self.in_file, self._dense_words()),
            ("key/value cache", self.kv, f"{self.context} tokens over all sequences (--ctx-size)"),
            ("prefill activations", self.activations, f"chunks of {self.rows} tokens"),
            ("expert scratch", self.kernel, "rows of a chunk, or one expert in the compute format"),
            (
                "expert slots",
                self.slot_bytes - low,
                f"{self.experts_resident} of {self.experts_total} experts ({self.resident_share:.0%})",
            ),
        ]
        if self.low_slots:
            copies = sum(count for _, count, _ in self.low_slots)
            words = f"{copies} copies in {'+'.join(self.low_codecs)} for misses (approximate)"
            rows.append(("low-precision slots", low, words))
        return rows

    def _dense_words(self) -> str:
        words = "attention, norms, routers, shared experts, embeddings"
        return words if not self.in_file else f"{words}; {format_size(self.in_file)} more stay in the file"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        derived = {
            "fixed": self.fixed,
            "slot_bytes": self.slot_bytes,
            "peak": self.peak,
            "resident_share": self.resident_share,
        }
        return asdict(self) | derived


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for; sizes in bytes."""

    model: str
    budget: int | None
    precision: str
    context: int
    rows: int = PREFILL_ROWS
    process: int = 0
    available: int | None = None
    expert_slots: int | None = None
    reserve: int = RUNTIME_RESERVE


def plan_loaded(
    plan: MemoryPlan,
    request: PlanRequest,
    footprint: Footprint,
    resident: int,
    notes: tuple[str, ...] = (),
) -> MemoryPlan:
    """Plan again once a model is loaded that the native core alone computes: what is left becomes slots.

    Args:
        plan: that the model was loaded under.
        request: that it answers.
        footprint: of the model.
        resident: memory of this process now, no slot filled.
        notes: for the new plan, as for the first.
    """
    if plan.everything_resident or request.expert_slots is not None:
        return plan
    looked_up = RESIDENT_BYTES if plan.in_file else 0  # nothing has been yet
    process = max(request.process, resident - (plan.dense - plan.in_file - looked_up))
    taken = process - request.process
    if taken + NATIVE_RESERVE >= request.reserve:
        return plan
    left = None if request.available is None else request.available - taken
    loaded = replace(request, process=process, reserve=NATIVE_RESERVE, available=left)
    again = make_plan(loaded, footprint, notes)
    # With room for every expert there are no copies in low precision, for which the model was loaded.
    return again if len(again.pools) == len(plan.pools) else plan


def make_plan(request: PlanRequest, footprint: Footprint, notes: tuple[str, ...] = ()) -> MemoryPlan:
    """Split a budget. Without one, the memory that the machine has available is the budget if experts need
    it.

    Raises:
        BudgetError: less than the smallest budget that works, which the error names and carries.
    """
    plan = _fixed_part(request, footprint, notes)
    smallest = max(
        plan.fixed + _slot_bytes(footprint, _least_slots(footprint)),
        plan.peak,
    )
    plan = replace(plan, smallest=smallest)
    if request.expert_slots is not None:
        return _with_slots(plan, footprint, _deal(footprint, request.expert_slots))
    limit = request.budget
    if limit is None:
        limit = plan.process + request.available if request.available is not None else None
        if limit is None or plan.fixed + footprint.all_slots <= limit:
            return _with_table(_with_slots(plan, footprint, _every_slot(footprint)), limit)
        note = (
            f"the experts ({format_size(footprint.experts)}) do not all fit into the "
            f"{format_size(limit)} that this machine has free; the rest is read from disk as it is needed"
        )
        plan = replace(plan, notes=(*plan.notes, note))
    if limit < smallest:
        weights = plan.dense - plan.in_file
        raise BudgetError(
            f"{request.model}: {format_size(limit)} is too small: dense weights {format_size(weights)}, "
            f"key/value cache {format_size(plan.kv)}, process and buffers "
            f"{format_size(plan.fixed - weights - plan.kv)}; the smallest budget that works is "
            f"{plan.smallest_advised >> 20}MiB (a shorter --ctx-size or --precision int4 needs less)",
            plan.smallest_advised,
        )
    counts = _fill(footprint, limit - plan.fixed)
    return _warn_small(_with_table(_with_slots(plan, footprint, counts), limit), footprint)


def _fixed_part(request: PlanRequest, footprint: Footprint, notes: tuple[str, ...]) -> MemoryPlan:
    return MemoryPlan(
        model=request.model,
        budget=request.budget,
        precision=request.precision,
        context=request.context,
        rows=request.rows,
        process=request.process,
        reserve=request.reserve,
        dense=footprint.dense,
        load_extra=footprint.load_extra,
        in_file=max(0, footprint.table - RESIDENT_BYTES),
        # One layer's keys and values exist twice while the cache grows.
        kv=request.context * footprint.kv_per_token * 5 // 4,
        activations=request.rows * footprint.row + 4 * footprint.vocab_row,
        kernel=_scratch(footprint, request.rows),
        row_bytes=footprint.row,
        logit_bytes=footprint.vocab_row,
        slots=(),
        experts_total=footprint.geometry.total_experts,
        experts_resident=0,
        expert_bytes=footprint.experts,
        smallest=0,
        codecs=footprint.codecs,
        notes=notes,
    )


def _with_table(plan: MemoryPlan, limit: int | None) -> MemoryPlan:
    """Leave nothing in the file where there is room for everything: looking rows up there takes time."""
    whole = replace(plan, in_file=0)
    return whole if plan.everything_resident and (limit is None or whole.peak <= limit) else plan


def _scratch(footprint: Footprint, rows: int) -> int:
    """What the kernels keep; those of both precisions take turns."""
    parts: list[Footprint | Copies] = [footprint]
    if footprint.copies is not None:
        parts.append(footprint.copies)
    return max(part.kernel if part.scratch is None else part.scratch(rows) for part in parts)


def _least_slots(footprint: Footprint) -> list[int]:
    """Two tokens' experts of one layer: enough to compute an event while the next expert is on its way."""
    layers = footprint.geometry.layers
    return [max(layers[n].top_k for n in group) + 1 for _, group in footprint.slots]


def _every_slot(footprint: Footprint) -> list[int]:
    layers = footprint.geometry.layers
    return [sum(layers[n].experts for n in group) for _, group in footprint.slots]


def _slot_bytes(footprint: Footprint, counts: list[int]) -> int:
    return sum(size * count for (size, _), count in zip(footprint.slots, counts, strict=True))


def _fill(footprint: Footprint, room: int) -> list[int]:
    """Give every slot size the same share of its experts, at least the least."""
    every, least = _every_slot(footprint), _least_slots(footprint)
    share = min(1.0, room / footprint.all_slots)
    counts = [max(low, int(full * share)) for low, full in zip(least, every, strict=True)]
    while _slot_bytes(footprint, counts) > room:
        spare = [count - low for count, low in zip(counts, least, strict=True)]
        counts[spare.index(max(spare))] -= 1
    return counts


def _deal(footprint: Footprint, slots: int) -> list[int]:
    """Split a number of slots between slot sizes, at least one working slot each."""
    every = _every_slot(footprint)
    return [max(1, min(full, slots * full // sum(every))) for full in every]


def _with_slots(plan: MemoryPlan, footprint: Footprint, counts: list[int]) -> MemoryPlan:
    groups = [group for _, group in footprint.slots]
    sizes = [size for size, _ in footprint.slots]
    low: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    if footprint.copies is not None and sum(counts) < plan.experts_total:
        counts, low = _with_copies(footprint, footprint.copies, counts)
        words = f"misses may be computed in {'+'.join(footprint.copies.codecs)} or left out: approximate"
        plan = replace(plan, low_codecs=footprint.copies.codecs, notes=(*plan.notes, words))
    return replace(
        plan,
        slots=tuple(zip(sizes, counts, groups, strict=True)),
        low_slots=low,
        experts_resident=min(sum(counts), plan.experts_total),
    )


def _with_copies(
    footprint: Footprint, copies: Copies, counts: list[int]
) -> tuple[list[int], tuple[tuple[int, int, tuple[int, ...]], ...]]:
    """Divide slots between experts and their copies; returns both, in as many bytes."""
    layers, high, low = len(footprint.geometry.layers), [], []
    for (size, group), count in zip(footprint.slots, counts, strict=True):
        copy = max(copies.slots[layer] for layer in group)
        most = sum(footprint.geometry.layers[layer].experts for layer in group)
        of_both = divide_slots(count, size, copy, copies.share, most)
        high.append(of_both[0])
        low.append((copy, of_both[1], tuple(layers + layer for layer in group)))
    return high, tuple(low)


def _warn_small(plan: MemoryPlan, footprint: Footprint) -> MemoryPlan:
    if plan.slot_bytes >= footprint.working_set or plan.everything_resident:
        return plan
    better = plan.fixed + footprint.working_set
    note = (
        f"the slots hold less than the experts of one token ({format_size(footprint.working_set)}), so most "
        f"experts are read for every token; from {better / MIB:.0f}MiB on the cache starts to help"
    )
    return replace(plan, notes=(*plan.notes, note))

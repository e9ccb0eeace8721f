"""``sparsify``: from a checkpoint to sparse ones, with what it cost measured on text that nobody looked at.

Shapes: S texts, C tokens of a text.
"""

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gangline.checkpoint.locate import LocalCheckpoint
from gangline.compress.dense_to_moe.writer import complete_folder
from gangline.compress.sparsify import (
    DenseWriter,
    DistillReport,
    LayerReport,
    LayerWalk,
    PackedExpert,
    PackedWriter,
    PrunedMatrix,
    Sink,
    SparsifySettings,
    distill_student,
    make_student,
    make_teacher,
    product_dtype,
    sparsify_layers,
    walk_texts,
)
from gangline.compress.sparsify.halfway import Halfway, key_of
from gangline.compress.sparsify.writers import Origin
from gangline.core.errors import UnsupportedModelError, UsageError
from gangline.core.freed_memory import freed_memory_kept
from gangline.core.keys import ExpertKey
from gangline.evaluation.perplexity import perplexity
from gangline.evaluation.plain import find_checkpoint, load_tokenizer, place
from gangline.runtime.opened import OpenedModel, experts_modules, open_model

REPORT_FILE = "sparsify.json"
Progress = Callable[[str, int, int], None]
"""Called with what is going on, how many experts are done and how many there are."""


@dataclass(frozen=True)
class SparsifyTexts:
    """Text to calibrate on and text to judge by.

    Attributes:
        calibration: what to look at while pruning.
        held_out: what perplexity is measured on; None for the last tenth of ``calibration``, which is then
            not looked at.
        tokens: at most so many tokens of the calibration text, evenly spread.
        held_out_tokens: at most so many tokens of the other.
        window: tokens of one piece.
    """

    calibration: str
    held_out: str | None = None
    tokens: int = 32768
    held_out_tokens: int = 8192
    window: int = 512

    def parts(self) -> tuple[str, str]:
        """Text to calibrate on, and text to judge by."""
        if self.held_out is not None:
            return self.calibration, self.held_out
        cut = len(self.calibration) * 9 // 10
        return self.calibration[:cut], self.calibration[cut:]


@dataclass(frozen=True)
class SparsifyReport:
    """What was made and what it costs.

    Attributes:
        model: what the user called it.
        settings: pattern, method and the rest.
        calibration_tokens: tokens that were looked at.
        held_out_tokens: tokens that perplexity was measured on.
        bits_per_weight: true bits of an expert's weight in the packed format, everything counted.
        stored_bits_per_weight: the same in the checkpoint that it came from.
        expert_bytes: bytes of all experts, packed.
        perplexity_before: of the original, on the held-out text; None if it was not asked for.
        perplexity_after: of what was written.
        layers: kept energy and errors.
        distilled: what learning from the original did; None if it was not asked for.
        folders: what was written, by kind: ``packed``, ``dense``.
    """

    model: str
    settings: SparsifySettings
    calibration_tokens: int
    held_out_tokens: int
    bits_per_weight: float
    stored_bits_per_weight: float
    expert_bytes: int
    perplexity_before: float | None
    perplexity_after: float | None
    layers: tuple[LayerReport, ...]
    distilled: DistillReport | None = None
    folders: dict[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Mean share of the squared weights that lies where something is kept."""
        return sum(layer.kept for layer in self.layers) / len(self.layers)

    @property
    def poor(self) -> dict[str, tuple[int, ...]]:
        """Experts with too few tokens of their own, by layer."""
        return {layer.name: layer.poor for layer in self.layers if layer.poor}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        document = asdict(replace(self, layers=()))
        return {
            **document,
            "sparsity": self.settings.codec.pattern.sparsity,
            "kept": self.kept,
            "poor": {name: list(experts) for name, experts in self.poor.items()},
            "layers": [layer.to_dict() for layer in self.layers],
        }


def sparsify_checkpoint(
    model: str | Path,
    packed: Path | None,
    *,
    texts: SparsifyTexts,
    settings: SparsifySettings | None = None,
    dense: Path | None = None,
    measure: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
    resume: Path | None = None,
) -> SparsifyReport:
    """Prune the experts of a model under the pattern and write the result: complete folders, or nothing.

    The dense part of the model (attention, norms, routers, shared experts) stays as it is and is in memory;
    of the experts, one at a time is.

    Args:
        model: a folder or hub id with plain safetensors, or ``demo``.
        packed: folder to write in our own format, which this package runs; or None.
        texts: text to calibrate on and to judge by.
        settings: pattern, method and the rest. None is the default of each.
        dense: folder to write with zeros in their places, which stock transformers loads; or None.
        measure: whether to measure perplexity before and after.
        revision: branch, tag or commit on the Hub.
        progress: called as the work goes on.
        resume: folder for what learning (``settings.distill_tokens``) has done so far. If the same was begun
            there before, it goes on from there.

    Raises:
        UsageError: nothing to write, the text is too short, or ``resume`` holds something else.
        UnsupportedModelError, CheckpointError, FormatError: the model cannot be sparsified.
    """
    settings = settings or SparsifySettings()
    say = progress or (lambda what, done, total: None)
    if packed is None and dense is None:
        raise UsageError("nothing to write: name a folder for the packed checkpoint or for the dense one")
    if resume is not None and not settings.distill_tokens:
        raise UsageError("only learning can be resumed: give distill_tokens too, or leave resume out")
    checkpoint = find_checkpoint(model, revision)
    tokenizer = _tokenizer(checkpoint, model)
    opened = open_model(checkpoint, torch.float32)
    origin = _origin(opened)
    settings = _resolved(settings, opened)
    calibration, judged = texts.parts()
    pieces_SC = windows(tokenizer, calibration, texts.window)
    wanted = [max(1, tokens // pieces_SC.shape[1]) for tokens in (texts.tokens, settings.distill_tokens)]
    seen, learned_from = choose_pieces(len(pieces_SC), *wanted)
    held_out = _first_tokens(tokenizer, judged, texts.held_out_tokens) if measure else ""
    before = None
    if measure:
        say("perplexity before", 0, 0)
        before = _perplexity(place(model), tokenizer, held_out, texts.window, revision)
    targets = {kind: path for kind, path in (("packed", packed), ("dense", dense)) if path is not None}
    with ExitStack() as stack:
        folders = {kind: stack.enter_context(complete_folder(path)) for kind, path in targets.items()}
        layers, learned = _write(
            opened, origin, pieces_SC[seen], pieces_SC[learned_from], settings, folders, say, resume
        )
        report = SparsifyReport(
            model=str(model),
            settings=settings,
            calibration_tokens=pieces_SC[seen].numel(),
            held_out_tokens=len(tokenizer(held_out, add_special_tokens=False)["input_ids"]) if measure else 0,
            **_sizes(opened, settings),
            perplexity_before=before,
            perplexity_after=None,
            layers=layers,
            distilled=learned,
            folders={kind: str(path) for kind, path in targets.items()},
        )
        _store(report, folders.values())
    if measure:
        # In its final place: what the runtime derives from a checkpoint is kept by its path.
        say("perplexity after", 0, 0)
        after = _perplexity(next(iter(targets.values())), tokenizer, held_out, texts.window, None)
        report = replace(report, perplexity_after=after)
        _store(report, targets.values())
    return report


def _tokenizer(checkpoint: LocalCheckpoint, model: str | Path) -> Any:
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UnsupportedModelError(f"{model}: it has no tokenizer; put a tokenizer.json beside the weights")
    return tokenizer


def _store(report: SparsifyReport, folders: Iterable[Path]) -> None:
    text = json.dumps(report.to_dict(), indent=1) + "\n"
    for folder in folders:
        (folder / REPORT_FILE).write_text(text, "utf-8")


def windows(tokenizer: Any, text: str, window: int) -> Tensor:
    """The pieces ``[S, C]`` of a text, one after another; what is left at its end is in none.

    Raises:
        UsageError: the text has fewer than two tokens.
    """
    ids_T = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    if len(ids_T) < 2:
        raise UsageError("the calibration text has fewer than two tokens; give more text")
    window = min(window, len(ids_T))
    return ids_T[: len(ids_T) // window * window].view(-1, window)


def choose_pieces(there: int, calibrating: int, learning: int) -> tuple[list[int], list[int]]:
    """Numbers of the pieces that pruning looks at, and of those that are learned from, each evenly spread.

    What pruning has looked at it fits far better than any other text, so that little is to be learned from
    it: other pieces come first.

    Args:
        there: how many pieces there are.
        calibrating, learning: how many are wanted.
    """
    seen = _spread(range(there), calibrating)
    fresh = _spread(sorted(set(range(there)).difference(seen)), learning)
    return seen, fresh + _spread(seen, learning - len(fresh))


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    count = min(count, len(numbers))
    return [numbers[number * len(numbers) // count] for number in range(count)]


def _resolved(settings: SparsifySettings, opened: OpenedModel) -> SparsifySettings:
    """The settings with ``stored`` replaced by what that is."""
    if settings.precision != "stored":
        return settings
    halves = all(spec.codec == "fp16" for layout in opened.source.layouts for spec in layout.fields)
    return replace(settings, precision="fp16" if halves else "bf16")


def _origin(opened: OpenedModel) -> Origin:
    if opened.gguf is not None or opened.folder is None:
        raise UnsupportedModelError(
            f"{opened.name}: only safetensors checkpoints can be sparsified; start from the unquantized one"
        )
    names = [module.prefix for module in experts_modules(opened.view)]
    return Origin.of(opened.folder, opened.source, names, opened.name)


def _write(
    opened: OpenedModel,
    origin: Origin,
    ids_SC: Tensor,
    distill_SC: Tensor,
    settings: SparsifySettings,
    folders: dict[str, Path],
    say: Progress,
    resume: Path | None,
) -> tuple[tuple[LayerReport, ...], DistillReport | None]:
    if not settings.distill_tokens:
        writers = _writers(origin, settings, folders, {}, say)

        def write(key: ExpertKey, matrices: Sequence[PrunedMatrix]) -> None:
            for writer in writers:
                writer.add(key, matrices)

        layers, learned = _prune(opened, ids_SC, settings, write, say), None
    else:
        halfway = None if resume is None else Halfway(resume)
        key = key_of(opened.identity, replace(settings, distill_tokens=0, distill_text=0.0), ids_SC)
        students, layers = _pruned_students(opened, ids_SC, settings, say, halfway, key)
        learned, changed = _distil(opened, origin, students, distill_SC, settings, say, halfway, key)
        writers = _writers(origin, settings, folders, changed, say)
        for at, student in students.items():
            for writer in writers:
                writer.add(at, student.matrices())
    for writer in writers:
        writer.finish()
    return layers, learned


def _pruned_students(
    opened: OpenedModel,
    ids_SC: Tensor,
    settings: SparsifySettings,
    say: Progress,
    halfway: Halfway | None,
    key: str,
) -> tuple[dict[ExpertKey, PackedExpert], tuple[LayerReport, ...]]:
    """The pruned experts that are to learn, and how they were pruned."""
    found = None if halfway is None else halfway.pruned(key, settings.codec)
    if found is not None:
        return found
    students: dict[ExpertKey, PackedExpert] = {}

    def keep(at: ExpertKey, matrices: Sequence[PrunedMatrix]) -> None:
        students[at] = PackedExpert(matrices, settings.codec)

    layers = _prune(opened, ids_SC, settings, keep, say)
    if halfway is not None:
        halfway.keep_pruned(key, students, layers)
    return students, layers


def _writers(
    origin: Origin,
    settings: SparsifySettings,
    folders: dict[str, Path],
    changed: Mapping[str, Tensor],
    say: Progress,
) -> list[PackedWriter | DenseWriter]:
    writers: list[PackedWriter | DenseWriter] = []
    say("copying what stays", 0, 0)
    if "packed" in folders:
        writers.append(PackedWriter(origin, folders["packed"], settings.codec.name, changed))
    if "dense" in folders:
        writers.append(DenseWriter(origin, folders["dense"], changed))
    return writers


def _prune(
    opened: OpenedModel, ids_SC: Tensor, settings: SparsifySettings, sink: Sink, say: Progress
) -> tuple[LayerReport, ...]:
    say("reading the calibration text", 0, 0)
    model, view = opened.load_dense(None)
    walk = LayerWalk(model.eval(), view, walk_texts(ids_SC, settings))
    total, done = sum(opened.source.experts), 0

    def on_expert() -> None:
        nonlocal done
        done += 1
        say("pruning experts", done, total)

    return tuple(sparsify_layers(walk, opened.source, settings, sink, on_expert))


def _distil(
    opened: OpenedModel,
    origin: Origin,
    students: dict[ExpertKey, PackedExpert],
    ids_SC: Tensor,
    settings: SparsifySettings,
    say: Progress,
    halfway: Halfway | None,
    key: str,
) -> tuple[DistillReport, dict[str, Tensor]]:
    """Let the pruned model learn: its experts are changed in place, what else has changed is returned."""
    say("loading the teacher", 0, 0)
    dtype = product_dtype()
    teacher = make_teacher(*opened.load_dense(None), opened.source, dtype)
    model, view = opened.load_dense(None)
    numbers = opened.source.experts
    student = make_student(
        model,
        view,
        opened.source,
        lambda layer: [students[ExpertKey(layer, expert)] for expert in range(numbers[layer])],
        dtype,
        origin.takes,
    )
    with freed_memory_kept():
        report = distill_student(
            teacher,
            student,
            ids_SC,
            settings.distill_tokens,
            text=settings.distill_text,
            dtype=dtype,
            on_step=lambda step, steps, loss: say(f"distilling, {loss:.3f} nats", step, steps),
            halfway=halfway,
            key=key,
        )
    for layer, bank in enumerate(student.banks):
        for expert, weights in enumerate(bank.learned()):
            for number, weight_OI in enumerate(weights):
                students[ExpertKey(layer, expert)].replace(number, weight_OI)
    return report, {name: parameter.detach() for name, parameter in student.dense.items()}


def _sizes(opened: OpenedModel, settings: SparsifySettings) -> dict[str, Any]:
    codec, weights, packed, stored = settings.codec, 0, 0, 0
    for layout, experts in zip(opened.source.layouts, opened.source.experts, strict=True):
        for spec in layout.fields:
            shape = (spec.shape[1], spec.shape[0]) if spec.transposed else spec.shape
            weights += experts * shape[0] * shape[1]
            packed += experts * codec.nbytes(shape)
            stored += experts * spec.nbytes
    return {
        "bits_per_weight": 8 * packed / weights,
        "stored_bits_per_weight": 8 * stored / weights,
        "expert_bytes": packed,
    }


def _first_tokens(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of a text, cut at a token."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if len(found["input_ids"]) < 2:
        raise UsageError("the held-out text has fewer than two tokens; give more text")
    if len(found["input_ids"]) <= tokens:
        return text
    if tokenizer.is_fast:
        return text[: found["offset_mapping"][tokens - 1][1]]
    return str(tokenizer.decode(found["input_ids"][:tokens]))


def _perplexity(model: Any, tokenizer: Any, text: str, window: int, revision: str | None) -> float:
    with _loaded(model, revision) as ready:
        return perplexity(ready, tokenizer, text, window=window)


@contextmanager
def _loaded(model: Any, revision: str | None) -> Iterator[Any]:
    from gangline.runtime.load import load_model

    ready: Any = load_model(model, revision=revision, progress=False)
    try:
        yield ready
    finally:
        ready.gangline.close()
        del ready
        gc.collect()

r"""SiDA reproduced: memory and speed on the shapes of Switch Transformers, fidelity on the demo.

    python benchmarks/sida.py --out benchmarks/results/sida.json \
        --train TEXT... --held-out TEXT...

Shapes. Random weights in the sizes of switch-base-8, -64 and -128, cut to --layers encoder layers, of which
every second one is a MoE (the paper: all 12). Fast memory is RAM and the slow tier is the disk, read past the
page cache; the paper's are an A100 and host memory. A batch is one sentence, as in the paper, with the
lengths of its data sets and Zipf-distributed token ids instead of text. The hash function is trained here on
the routers of the random model; bf16 instead of fp32; the encoder runs alone, whose layers the released code
predicts. "Everything resident" skips experts without tokens, which the paper's baselines do not: most of the
paper's gain over them comes from that, and cannot appear here.

Fidelity. With --train and --held-out a hash function for the demo is trained on real text and judged on
files that it has not seen: hash hits, and the perplexity of executing the prediction. The paper's numbers
beside it are of fine-tuned Switch models on other text: they show the size of the effect, no race.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sida_fidelity import PAPER_HITS, PAPER_PERPLEXITY, fidelity_rows
from torch import Tensor

import gangline
from gangline.benchmarks.random_checkpoint import write_random_checkpoint
from gangline.benchmarks.result import Row, compare, running_command, write_result
from gangline.benchmarks.shapes import shape_config
from gangline.core.sizes import format_size
from gangline.evaluation.predictor_data import recorded, routed_texts
from gangline.evaluation.predictor_hits import measure_hits, network_scorer
from gangline.evaluation.predictor_training import Trained, TrainingSettings, train_predictor
from gangline.policies.predictors.saved import load_predictor, save_predictor
from gangline.runtime.hash_pipeline import HashPipeline
from gangline.runtime.hash_routing import PAPER_DAMPING, HashRouting
from gangline.traces.texts import Item

# Tokens of a sentence, about, and what the paper states for base-128: throughput over the mean of its
# baselines.
TASKS = {"SST2": (25, 2.60), "MRPC": (55, 2.52), "MultiRC": (330, 1.26)}
PAPER_FIDELITY = {8: 98.25, 128: 93.02}
PAPER_EXPERTS = {128: 40.0}  # "fewer than 40 %" of the experts, SST2

POLICIES = {
    "on-demand LRU": "cache: lru\nscope: global\npredictor: none\nprefetcher: null\n",
    "SiDA": "cache: sida\nscope: global\npredictor: none\nprefetcher: null\n",
}


@dataclass(frozen=True)
class Timed:
    """One system on one set of sentences: seconds of each, and bytes read in all."""

    seconds: list[float]
    nbytes: int
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens per second over all sentences."""
        return self.tokens / sum(self.seconds)


def sentences(length: int, count: int, vocabulary: int, seed: int) -> list[Tensor]:
    """Return sentences of about ``length`` tokens; ids follow Zipf's law, as those of text do."""
    rng = np.random.default_rng(seed)
    p = 1.0 / np.arange(1, vocabulary - 2)
    out = []
    for _ in range(count):
        tokens = max(4, int(rng.normal(length, length / 4)))
        out.append(torch.from_numpy(rng.choice(vocabulary - 3, size=(1, tokens), p=p / p.sum()) + 3))
    return out


def switch_folder(experts: int, layers: int, folder: Path) -> Path:
    """Write the shape: ``layers`` encoder layers, and a decoder of one layer, which never runs."""
    config = shape_config(f"switch-base-{experts}")
    small = type(config)(
        **{
            **config.to_diff_dict(),
            "num_layers": layers,
            "num_sparse_encoder_layers": layers // 2,
            "num_decoder_layers": 1,
            "num_sparse_decoder_layers": 2,  # the class takes 1 // 2 = 0 for "none"
        }
    )
    label = f"sida-switch-base-{experts}:{layers}"
    return write_random_checkpoint(small, folder / label, label=label, dtype=torch.bfloat16, seed=0)


@contextmanager
def loaded(folder: Path | str, **options: Any) -> Iterator[Any]:
    """A model without gradients, freed afterwards."""
    with torch.no_grad():
        model: Any = gangline.load(folder, progress=False, **options)
        try:
            yield model
        finally:
            model.gangline.close()


def encode(model: Any, ids_BS: Tensor) -> Tensor:
    """Run the encoder."""
    out: Tensor = model.get_encoder()(input_ids=ids_BS).last_hidden_state
    return out


def one_after_another(model: Any, batches: list[Tensor]) -> Timed:
    """Time batches on a model as it is."""
    before, seconds = model.gangline.stats().bytes_read, []
    for ids_BS in batches:
        started = time.perf_counter()
        encode(model, ids_BS)
        seconds.append(time.perf_counter() - started)
    return Timed(seconds, model.gangline.stats().bytes_read - before, sum(ids.numel() for ids in batches))


def pipelined(model: Any, network: Any, batches: list[Tensor], mode: Any) -> Timed:
    """Time batches in SiDA's two threads: a batch lasts from the end of the one before to its own."""
    before, seconds = model.gangline.stats().bytes_read, []
    with HashRouting(model, network, mode=mode) as routing:
        stream = HashPipeline(routing).run(batches, lambda ids: encode(model, ids))
        for _ in batches:
            started = time.perf_counter()
            next(stream)
            seconds.append(time.perf_counter() - started)
        stream.close()
    return Timed(seconds, model.gangline.stats().bytes_read - before, sum(ids.numel() for ids in batches))


def learnt_shape(
    model: Any, experts: int, arguments: argparse.Namespace, folder: Path
) -> tuple[Any, int, float]:
    """Return a hash function of the model's routers, how many layers it predicts, and its held-out hits.

    It is kept beside the checkpoints, so that another run only times.
    """
    name = f"switch-base-{experts}"
    file = folder / f"{name}-{arguments.layers}-{arguments.tokens}-{arguments.epochs}.safetensors"
    if not file.exists():
        vocabulary = model.config.vocab_size
        trained, hits = learn_shape(model, name, vocabulary, arguments.tokens, arguments.epochs)
        save_predictor(file, trained.kind, trained.network, trained.config, {"hits": hits})
    saved = load_predictor(file)
    return saved.network, len(saved.config["experts"]), saved.about["hits"]


def learn_shape(model: Any, name: str, vocabulary: int, tokens: int, epochs: int) -> tuple[Trained, float]:
    """Train a hash function on the model's routers; returns it and its held-out top-3 hits."""
    texts = sentences(128, tokens // 128, vocabulary, seed=1)
    items = [Item(f"random, tokens from {n}", tuple(ids[0].tolist())) for n, ids in enumerate(texts)]
    with recorded(model, name, items, extras=("logits",)) as trace:
        documents = routed_texts(trace)
    cut = max(1, len(documents) // 10)
    with torch.enable_grad():
        trained = train_predictor("sida", model, documents[cut:], TrainingSettings(epochs=epochs))
    scorers = {"sida": network_scorer("sida", trained.network, model)}
    return trained, 100 * measure_hits(scorers, documents[:cut])[0].mean("topk")


def shape_rows(experts: int, arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Compare the systems on one shape."""
    checkpoint = switch_folder(experts, arguments.layers, folder)
    with loaded(checkpoint) as model:
        vocabulary = model.config.vocab_size
        network, encoder, hits = learnt_shape(model, experts, arguments, folder)
        sets = {
            task: sentences(length, arguments.batches, vocabulary, seed=2)
            for task, (length, _) in TASKS.items()
        }
        rounds = range(arguments.rounds)
        resident = {task: [one_after_another(model, sets[task]) for _ in rounds] for task in sets}
        expert_bytes = model.gangline.catalog.layouts[0].nbytes
        needed = {task: needed_share(model, network, sets[task], experts) for task in sets}
        total = experts * encoder
    slots = max(8, int(arguments.share * experts * encoder))
    found: dict[str, dict[str, list[Timed]]] = {}
    for system, mode in (("on-demand LRU", None), ("SiDA", "hint"), ("SiDA", "execute")):
        policy = folder / "policy.yaml"
        policy.write_text(POLICIES[system])
        with loaded(checkpoint, expert_slots=slots, policy=str(policy), io="direct") as model:
            name = system if mode is None else f"{system}, {mode}"
            found[name] = {
                task: [
                    one_after_another(model, batches)
                    if mode is None
                    else pipelined(model, network, batches, mode)
                    for _ in rounds
                ]
                for task, batches in sets.items()
            }
    work = f"switch-base-{experts}, {arguments.layers} encoder layers, random weights"
    rows = [Row(work, "top-3 hash hits, %", hits)]
    if experts in PAPER_HITS:
        rows[0] = Row(
            work,
            "top-3 hash hits, %",
            hits,
            "paper, trained, SST2",
            PAPER_HITS[experts],
            kind="measured",
        )
    for task, runs in resident.items():
        rows += task_rows(
            f"{work}, {task} lengths", task, experts, runs, {k: v[task] for k, v in found.items()}
        )
        paper = PAPER_EXPERTS.get(experts) if task == "SST2" else None
        rows.append(
            Row(
                f"{work}, {task} lengths",
                "experts of a sentence, % of all",
                100 * needed[task],
                "paper: fewer than" if paper else None,
                paper,
            )
        )
    both = slots * expert_bytes, total * expert_bytes
    rows.append(
        Row(
            work,
            "expert bytes in RAM, MiB",
            both[0] / 2**20,
            "everything resident",
            both[1] / 2**20,
            both[1] / both[0],
        )
    )
    print(f"{work}: {slots} slots, {format_size(both[0])} of {format_size(both[1])}", flush=True)
    return rows


def needed_share(model: Any, network: Any, batches: list[Tensor], experts: int) -> float:
    """Return the share of the encoder's experts that a sentence's table names, on average."""
    with HashRouting(model, network, mode="execute") as routing:
        tables = [routing.prepare(ids).table for ids in batches]
    return statistics.fmean(
        sum(len([e for e in table.needed(n) if e < experts]) for n in range(len(table.ids)))
        / (experts * len(table.ids))
        for table in tables
    )


def task_rows(
    work: str, task: str, experts: int, resident: list[Timed], systems: dict[str, list[Timed]]
) -> list[Row]:
    """Rows of one set of sentences: throughput, latency and bytes read of SiDA beside the others."""
    rows = []
    lru = systems["on-demand LRU"]
    for name in ("SiDA, hint", "SiDA, execute"):
        mine = systems[name]
        for peer, other in (("on-demand LRU", lru), ("everything resident", resident)):
            rates = [one.rate for one in mine], [one.rate for one in other]
            rows.append(compare(f"{work}, {name}", "tokens/s", rates[0], peer, rates[1]))
            medians = [[1e3 * statistics.median(one.seconds) for one in runs] for runs in (mine, other)]
            rows.append(
                compare(
                    f"{work}, {name}",
                    "latency of a sentence, ms",
                    medians[0],
                    peer,
                    medians[1],
                    higher_is_better=False,
                )
            )
        read = [[one.nbytes / 2**20 / len(one.seconds) for one in runs] for runs in (mine, lru)]
        rows.append(
            compare(
                f"{work}, {name}",
                "MiB read per sentence",
                read[0],
                "on-demand LRU",
                read[1],
                higher_is_better=False,
            )
        )
    if experts == 128:
        gain = statistics.median(one.rate for one in systems["SiDA, execute"]) / statistics.median(
            one.rate for one in lru
        )
        rows.append(
            Row(
                f"{work}, SiDA, execute",
                "throughput, times the baselines",
                gain,
                "paper, over Standard, DeepSpeed and Tutel",
                TASKS[task][1],
            )
        )
    for row in rows:
        print(f"{row.work}: {row.metric} {row.ours:.4g}, {row.peer} {row.peer_value:.4g}", flush=True)
    return rows


def published_rows() -> list[Row]:
    """Numbers of the paper that nothing here stands beside."""
    rows = [
        Row(
            f"switch-base-{experts}, SST2, fine-tuned",
            "quality kept when executing, %",
            None,
            "paper",
            kept,
            kind="published",
        )
        for experts, kept in PAPER_FIDELITY.items()
    ]
    factors = ", ".join(map(str, PAPER_DAMPING))
    for experts, (exact, ours) in PAPER_PERPLEXITY.items():
        rows.append(
            Row(
                f"switch-base-{experts}, C4, exact {exact}, damping {factors}",
                "perplexity",
                None,
                "paper",
                ours,
                kind="published",
            )
        )
    return rows


def main() -> None:
    """Run the parts that were asked for and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 64, 128], choices=[8, 64, 128])
    parser.add_argument("--layers", type=int, default=4, help="encoder layers, an even number (paper: 12)")
    parser.add_argument("--batches", type=int, default=12, help="sentences of each length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.25, help="of the encoder's experts that fit in RAM")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="that the hash function of a shape learns from"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--train", type=Path, nargs="*", default=[], help="texts for the demo's hash function"
    )
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="texts to judge it by")
    parser.add_argument("--train-tokens", type=int, default=40_000)
    parser.add_argument("--held-out-tokens", type=int, default=6_000)
    parser.add_argument("--demo-epochs", type=int, default=10)
    parser.add_argument(
        "--work",
        type=Path,
        help="keep random checkpoints and hash functions here (default: a temporary folder)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(arguments.threads)
    if bool(arguments.train) != bool(arguments.held_out):
        parser.error("fidelity needs both --train and --held-out")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for experts in arguments.experts:
            rows += shape_rows(experts, arguments, folder)
    if arguments.train:
        tokens = arguments.train_tokens, arguments.held_out_tokens
        with loaded("demo") as model:
            rows += fidelity_rows(model, arguments.train, arguments.held_out, tokens, arguments.demo_epochs)
    rows += published_rows()
    if arguments.out is not None:
        command = running_command({"--work": "FOLDER"})
        for path in (*arguments.train, *arguments.held_out):
            command = command.replace(str(path), path.name)  # where texts lie is this machine's own business
        write_result(arguments.out.stem, rows, command, folder=arguments.out.parent)


if __name__ == "__main__":
    main()

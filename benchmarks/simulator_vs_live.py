"""Does replaying a trace predict what the engine's cache does? `demo` at three budgets.

    python benchmarks/simulator_vs_live.py --new-tokens 32 --out benchmarks/results/simulator_vs_live.json

The routing of greedy answers is recorded once, with all experts in memory. Then the engine answers the same
prompts with a quarter, half and three quarters of the expert slots, cold at first, and the simulator replays
the trace with the very cache policy that the engine uses. "ours" is the simulated value, the peer is the live
engine's. A hit is an expert of a routing event that has a slot when the event comes, as the engine counts.
Only prompts depend on time at all (what was read ahead when); the simulated link is fast, as the page cache
that holds the demo's experts.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import gangline
from gangline.benchmarks.result import Row, write_result
from gangline.evaluation.plain import find_checkpoint, load_tokenizer
from gangline.policies.caches import LayerLRU
from gangline.runtime.event_rules import DENSE_PAIRS_PER_EXPERT, RUN_EXPERTS
from gangline.traces import Trace, TraceWriter, open_trace
from gangline.traces.describe import describe_recording
from gangline.traces.record import record_generation
from gangline.traces.recorder import Recorder
from gangline.traces.simulator import Bounds, LevelSpec, Setup, SimLink, SimReport, make_report, simulate
from gangline.traces.texts import Item

SHARES = (0.25, 0.5, 0.75)
PROMPTS = (
    "What is a sled dog?",
    "Explain gravity to a child.",
    "Write a short story about a lighthouse keeper.",
    "How do I write a for loop in Python?",
    "Give me three facts about whales.",
    "Schreibe einen kurzen Brief an einen Freund.",
)


def settings(model: Any, new_tokens: int) -> dict[str, Any]:
    """Greedy, always of the same length."""
    pad = model.generation_config.pad_token_id or 0
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return {"do_sample": False, "pad_token_id": pad, **lengths}


def record(items: list[Item], new_tokens: int, folder: Path) -> Trace:
    """The routing of all answers, with every expert in memory."""
    model = gangline.load("demo", progress=False)
    sizes = [layout.nbytes for layout in model.gangline.catalog.layouts]
    header = describe_recording(model, "demo", source="generation", expert_bytes=sizes)
    with TraceWriter(folder, header) as writer:
        record_generation(model, Recorder(writer), items, settings=settings(model, new_tokens))
    model.gangline.close()
    return open_trace(folder)


def live(items: list[Item], new_tokens: int, slots: int) -> tuple[dict[str, float], list[list[int]]]:
    """Hit rate and bytes of the engine, and the tokens that went through the model."""
    model = gangline.load("demo", expert_slots=slots, progress=False, policy="default")
    tokens = []
    for item in items:
        ids = torch.tensor([item.ids])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings(model, new_tokens))
        tokens.append(out[0, :-1].tolist())
    stats = model.gangline.stats()
    found = {
        "hits": stats.host_hits,
        "misses": stats.host_misses,
        "hit rate": stats.hit_rate,
        "bytes read": stats.bytes_read,
    }
    model.gangline.close()
    return found, tokens


def simulated(trace: Trace, slots: int) -> SimReport:
    """The same by replay, with the engine's default cache."""
    header = trace.header
    events = list(trace.events({"requests"}))
    policy = LayerLRU(slots, header.top_k, header.experts)
    level = LevelSpec("host", slots, policy, SimLink(), bypass=False)
    setup = Setup(
        header.geometry,
        header.expert_bytes,
        (level,),
        dense_prefetch=DENSE_PAIRS_PER_EXPERT,
        run_experts=RUN_EXPERTS,
    )
    return make_report("layer-lru", setup, simulate(setup, events), Bounds(events))


def compare(trace: Trace, items: list[Item], new_tokens: int, slots: int) -> list[Row]:
    """Rows of one budget."""
    found, tokens = live(items, new_tokens, slots)
    recorded = [trace.tokens.input_id[trace.tokens.doc == n].tolist() for n in range(len(items))]
    same = sum(
        a == b
        for ours, theirs in zip(recorded, tokens, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    ours = simulated(trace, slots)
    work = f"demo, {slots} of {trace.header.geometry.total_experts} expert slots, {len(trace)} tokens"
    moved = sum(ours.levels[0].bytes_moved.values())
    peer = "live engine"
    shared: dict[str, Any] = {"kind": "simulated"}
    print(
        work,
        f"live {found}, simulated {ours.hit_rate:.4f}, {same} of {len(trace)} tokens the same",
        flush=True,
    )
    return [
        Row(
            work,
            "hit rate, % of the experts of events",
            100 * ours.hit_rate,
            peer,
            100 * found["hit rate"],
            **shared,
        ),
        Row(work, "off by, points", abs(ours.hit_rate - found["hit rate"]) * 100, **shared),
        Row(work, "bytes read, MiB", moved / 2**20, peer, found["bytes read"] / 2**20, **shared),
        Row(work, "tokens the same as recorded, %", 100 * same / len(trace)),
        Row(work, "hit rate of Belady's cache (bypass), %", 100 * (ours.belady or 0.0), **shared),
    ]


def main() -> None:
    """Record, run, replay, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(find_checkpoint("demo"))
    assert tokenizer is not None
    items = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        items.append(Item(prompt, tuple(ids)))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        trace = record(items, arguments.new_tokens, Path(folder) / "trace")
        everyone = trace.header.geometry.total_experts
        for share in SHARES:
            rows += compare(trace, items, arguments.new_tokens, int(share * everyone))
    if arguments.out is not None:
        write_result(arguments.out.stem, rows, folder=arguments.out.parent)


if __name__ == "__main__":
    main()

"""What recording in mode `ids` costs a decoding token of `demo`, everything in memory.

    python benchmarks/recording_cost.py --new-tokens 48 --repetitions 7 \
        --out benchmarks/results/recording_cost.json

"in the recorder": processor time spent inside the recorder's own calls per token, writing included, and its
share of the processor time of a token that is decoded without it, in turns. Processor time, one thread, so
that other programs count less. "tokens/s recorded": the same generation with and without recording, decoded
natively in both.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gangline
from gangline.benchmarks.result import compare, write_result
from gangline.evaluation.generation import fixed_length
from gangline.traces import TraceWriter
from gangline.traces.describe import describe_recording
from gangline.traces.hooks import observe
from gangline.traces.recorder import Recorder

PROMPT = 32


class Timed(Recorder):
    """A recorder that adds up the time spent in it."""

    seconds = 0.0

    def _timed(self, call: Callable[..., None], *values: Any) -> None:
        start = time.thread_time()
        call(*values)
        self.seconds += time.thread_time() - start

    def on_pass(self, *values: Any) -> None:
        """See Recorder."""
        self._timed(super().on_pass, *values)

    def on_routing(self, *values: Any) -> None:
        """See Recorder."""
        self._timed(super().on_routing, *values)

    def on_step(self, *values: Any) -> None:
        """See Recorder."""
        self._timed(super().on_step, *values)

    def on_predicted(self, *values: Any) -> None:
        """See Recorder."""
        self._timed(super().on_predicted, *values)

    def _commit(self, *values: Any) -> None:
        self._timed(super()._commit, *values)


def generate(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds and processor seconds of one generation."""
    start, busy = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids))
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    """Measure in turns and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = gangline.load("demo", progress=False)
    own: list[float] = []
    shares: list[float] = []
    recorded: list[float] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as folder, fixed_length(model, arguments.new_tokens):
        generate(model, torch.randint(0, 1000, (1, PROMPT)))
        header = describe_recording(model, "demo", mode="ids", source="generation")
        with TraceWriter(Path(folder) / "trace", header, shard_rows=64) as writer:
            recorder = Timed(writer)
            for _ in range(arguments.repetitions):
                ids = torch.randint(0, 1000, (1, PROMPT))
                before = recorder.seconds
                with observe(model, recorder), recorder.documents(["random"]):
                    seconds, _ = generate(model, ids)
                own.append(1000 * (recorder.seconds - before) / arguments.new_tokens)
                recorded.append(arguments.new_tokens / seconds)
                seconds, busy = generate(model, ids)
                plain.append(arguments.new_tokens / seconds)
                shares.append(100 * own[-1] / (1000 * busy / arguments.new_tokens))
    work = f"demo, all in memory, mode ids, {PROMPT} + {arguments.new_tokens} tokens"
    rows = [
        compare(work, "in the recorder, ms per token", own),
        compare(work, "in the recorder, % of a token's processor time", shares),
        compare(work, "tokens/s recorded", recorded, "not recorded", plain),
    ]
    print(*rows, sep="\n")
    if arguments.out is not None:
        write_result(arguments.out.stem, rows, folder=arguments.out.parent)


if __name__ == "__main__":
    main()

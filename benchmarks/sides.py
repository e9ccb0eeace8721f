"""What runs inside the limited process of a comparison: one side loads a model, reads prompts and decodes.

Called by the benchmark scripts as ``python benchmarks/sides.py JOB``; by hand it prints its report.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from gangline.benchmarks.confine import leave_report, storage_bytes_read


class Engine(Protocol):
    """One side: feeds token ids to a model and keeps its KV cache."""

    def reset(self) -> None:
        """Forget the text so far."""

    def feed(self, ids: list[int]) -> None:
        """Compute the logits after the last of ``ids``."""

    def stats(self) -> dict[str, Any]:
        """Return whatever the side counts itself."""


class TransformersEngine:
    """A transformers model, plain or ours."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Start an empty KV cache."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def feed(self, ids: list[int]) -> None:
        """One forward pass."""
        import torch

        with torch.inference_mode():
            self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def stats(self) -> dict[str, Any]:
        """Our counters; nothing for plain transformers."""
        runtime = getattr(self.model, "gangline", None)
        return runtime.stats().to_dict() if runtime is not None else {}


class LlamaCppEngine:
    """llama.cpp, weights mapped and not copied, so that they can be paged."""

    def __init__(self, job: dict[str, Any]) -> None:
        from gangline.evaluation.compare_speed_llamacpp import LlamaCppSide

        self.side = LlamaCppSide(
            job["gguf"], threads=job["threads"], batch=1, context=job["context"], repack=False
        )
        self.reset()

    def reset(self) -> None:
        """Forget the text so far."""
        self.side.reset()
        self.past = 0

    def feed(self, ids: list[int]) -> None:
        """One or more batches; logits of the last token alone."""
        import torch

        self.side.feed(torch.tensor([ids]), self.past)
        self.past += len(ids)

    def stats(self) -> dict[str, Any]:
        """Return nothing: it keeps no such counters."""
        return {}


def open_engine(job: dict[str, Any]) -> Engine:
    """Load the model of one side."""
    if job["side"] == "llamacpp":
        return LlamaCppEngine(job)
    import torch

    torch.set_num_threads(job["threads"])
    if job["side"] == "ours":
        import gangline

        model = gangline.load(
            job["model"],
            memory=job["memory"],
            ctx_size=job["context"],
            precision=job.get("precision", "stored"),
            policy=job.get("policy"),
            mode=job.get("mode", "hint"),
            native_only=True,
        )
        return TransformersEngine(model)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": job["offload_cpu"]},
        offload_folder=job["offload_folder"],
    )
    return TransformersEngine(model)


def timed_feed(engine: Engine, ids: list[int]) -> dict[str, float]:
    """Feed ids and return the seconds and the bytes that the disk delivered."""
    before, start = storage_bytes_read(), time.perf_counter()
    engine.feed(ids)
    return {"seconds": time.perf_counter() - start, "bytes": storage_bytes_read() - before}


def work(job: dict[str, Any]) -> None:
    """Load, then for each prompt length: prefill and decode. Leaves a report after every prompt."""
    rng = np.random.default_rng(job["seed"])
    start = time.perf_counter()
    engine = open_engine(job)
    report: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "prefill": {}, "decode": []}
    with routed_as_asked(engine, job):
        run_prompts(engine, job, rng, report)


def run_prompts(
    engine: Engine, job: dict[str, Any], rng: np.random.Generator, report: dict[str, Any]
) -> None:
    """Feed every prompt and what follows it; the report counts both."""
    for length in job["prompts"]:
        prompt = rng.integers(job["vocab"], size=length).tolist()
        following = rng.integers(job["vocab"], size=job["decode"]).tolist()
        engine.reset()
        report["prefill"][length] = timed_feed(engine, prompt)
        report["stats_before_decode"] = engine.stats()
        for token in following:
            report["decode"].append(timed_feed(engine, [token]))
        report["stats"] = engine.stats()
        leave_report(report)


@contextmanager
def routed_as_asked(engine: Engine, job: dict[str, Any]) -> Iterator[None]:
    """Replay the expert ids of the file ``replay`` in our engine, if the job names one."""
    if not job.get("replay"):
        yield
        return
    from gangline.benchmarks.replay import RoutingTrace, prescribe

    assert isinstance(engine, TransformersEngine)
    with prescribe(engine.model.gangline, RoutingTrace(np.load(job["replay"]), "a file")):
        yield


def plan(job: dict[str, Any]) -> None:
    """Leave our plan as a report: in a process of its own, whose memory is a fresh user's."""
    import gangline

    found = gangline.plan(
        job["model"],
        memory=job["memory"],
        ctx_size=job["context"],
        precision=job.get("precision", "stored"),
        expert_slots=job.get("expert_slots"),
    )
    leave_report(found.to_dict())


def tune(job: dict[str, Any]) -> None:
    """Leave what ``gangline tune`` finds as a report, and keep nothing of it."""
    from gangline.evaluation.tuning import TuneSettings, tune_model

    lengths = {"prompt_tokens": job["prompts"][0], "new_tokens": job["decode"]}
    found = tune_model(
        job["model"],
        TuneSettings(**lengths, pieces=2, rounds=job["rounds"], store=False),
        memory=job["memory"],
        ctx_size=job["context"],
        precision=job["precision"],
        threads=job["threads"],
    )
    leave_report(found.to_dict())


if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    {"plan": plan, "tune": tune}.get(described["side"], work)(described)

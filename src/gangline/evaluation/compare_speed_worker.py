"""One side of a comparison in a process of its own: ``python -m ...compare_speed_worker JOB``.

The job, the answers and the runs asked for are JSON, one line each. The first answer holds what the side says
about itself, each further one a run.
"""

import json
import os
import sys
from typing import Any, Protocol

import torch
from torch import Tensor

from gangline.core.errors import GanglineError
from gangline.evaluation.speed_run import Sample, timed_generation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Side(Protocol):
    """An engine with a model."""

    def run(self, ids_BP: Tensor, new_tokens: int, following_BN: Tensor) -> Sample:
        """Read prompts and feed the tokens that follow."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


class PlainSide:
    """Plain transformers, wholly in memory.

    Args:
        model: folder, GGUF file or Hub id.
        dtype: name of the dtype of all weights, None for the checkpoint's.
        threads: that compute.
        experts: transformers' ``experts_implementation``, None for its default.
    """

    def __init__(
        self, model: str, *, dtype: str | None, threads: int, revision: str | None, experts: str | None
    ) -> None:
        from gangline.checkpoint.locate import LocalCheckpoint, resolve_checkpoint
        from gangline.evaluation.plain import load_plain
        from gangline.runtime.opened import open_model

        torch.set_num_threads(threads)
        checkpoint = resolve_checkpoint(model, revision)
        assert isinstance(checkpoint, LocalCheckpoint)
        opened = open_model(checkpoint, DTYPES[dtype] if dtype else None)
        self.model = load_plain(checkpoint, opened.cls, opened.config, opened.dtype)
        if experts is not None:
            self.model.set_experts_implementation(experts)

    def run(self, ids_BP: Tensor, new_tokens: int, following_BN: Tensor) -> Sample:
        """See :func:`~gangline.evaluation.speed_run.timed_generation`."""
        return timed_generation(self.model, ids_BP, new_tokens, following_BN)

    def close(self) -> None:
        """Free it."""
        del self.model


def open_side(job: dict[str, Any]) -> Side:
    """Load the side that a job describes: ``{"side": "ours" | "transformers" | "llama.cpp", ...}``."""
    kind, settings = job["side"], {key: value for key, value in job.items() if key != "side"}
    if kind == "llama.cpp":
        from gangline.evaluation.compare_speed_llamacpp import LlamaCppSide

        return LlamaCppSide(**settings)
    if kind == "transformers":
        return PlainSide(**settings)
    from gangline.evaluation.speed_side import OurSide

    dtype = settings.pop("dtype", None)
    return OurSide(**settings, dtype=DTYPES[dtype] if dtype else None)


def serve(side: Side, requests: Any, answers: Any) -> None:
    """Answer each line of ``requests`` with the run it asks for, and what the side then says of itself."""
    for line in requests:
        asked = json.loads(line)
        sample = side.run(
            torch.tensor(asked["prompts"]), asked["new_tokens"], torch.tensor(asked["following"])
        )
        _answer(answers, {"sample": sample.to_dict(), "facts": _facts(side)})


def _facts(side: Side) -> dict[str, Any] | None:
    facts = getattr(side, "facts", None)
    return facts().to_dict() if facts is not None else None


def _answer(answers: Any, document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


def main() -> None:
    """Load, then serve until the input ends."""
    # Libraries print what they like; only answers may reach the other end.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        side = open_side(json.loads(sys.argv[1]))
        _answer(answers, {"facts": _facts(side)})
        serve(side, sys.stdin, answers)
        side.close()
    except GanglineError as error:
        _answer(answers, {"error": str(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The near end of a side that runs in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from torch import Tensor

from gangline.core.errors import GanglineError
from gangline.evaluation.speed_run import Sample
from gangline.evaluation.speed_side import Facts

# How long idle threads spin is each engine's own choice; ours is that of the command line, also for scripts.
_OURS_ONLY = {"GOMP_SPINCOUNT": "10000"}


class PeerError(GanglineError):
    """A side of a comparison ended; the message is its own."""


class SideProcess:
    """A loaded side; a context manager that ends the process.

    Args:
        job: see :func:`gangline.evaluation.compare_speed_worker.open_side`.
        threads: that the process may use.

    Raises:
        PeerError: it cannot be loaded.
    """

    def __init__(self, job: dict[str, Any], threads: int) -> None:
        self._name = job["side"]
        mine = self._name == "ours"
        env = {name: value for name, value in os.environ.items() if mine or name not in _OURS_ONLY}
        if mine and "OMP_WAIT_POLICY" not in env:
            env = _OURS_ONLY | env
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        env["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gangline.evaluation.compare_speed_worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.facts: Facts | None = None
        try:
            self._note(self._answer())
        except BaseException:
            self.close()
            raise

    def run(self, ids_BP: Tensor, new_tokens: int, following_BN: Tensor) -> Sample:
        """Have one run timed.

        Raises:
            PeerError: the side ended.
        """
        asked = {"prompts": ids_BP.tolist(), "new_tokens": new_tokens, "following": following_BN.tolist()}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and says why in its last answer
        answer = self._answer()
        self._note(answer)
        return Sample(**answer["sample"])

    def _note(self, answer: dict[str, Any]) -> None:
        if answer["facts"] is not None:
            self.facts = Facts.from_dict(answer["facts"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise PeerError(
                f"{self._name} ended with exit status {code} before it answered; see above, "
                "and check that its weights fit into memory"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self._name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process and wait for it."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "SideProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

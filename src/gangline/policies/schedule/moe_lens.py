"""MoE-Lens: the throughput bound and the schedule of batched serving with weights streamed from host memory.

"MoE-Lens: Towards the Hardware Limit of High-Throughput MoE LLM Serving Under Resource Constraints" (arXiv
2504.09345). Weights pass layer by layer once a step, KV cache and decode attention stay on the CPU, GEMMs
run on the GPU, prompt and generated tokens share a step. Tokens/s count both.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gangline.core.errors import UsageError


def pme(prompt: int, generated: int) -> float:
    """Parallelism-memory efficiency ``2(p+g) / ((2p+g) g)``: tokens worked on per token and step of KV."""
    return 2 * (prompt + generated) / ((2 * prompt + generated) * generated)


@dataclass(frozen=True)
class LensBound:
    """Stage 1: tokens/s that no schedule exceeds.

    Attributes:
        model_bytes: weights that pass in a step.
        io: bytes/s from host memory to the GPU, measured while the CPU does attention.
        kv_tokens: capacity M of the KV cache, in tokens.
        gpu: tokens/s that the GPU could compute.
    """

    model_bytes: float
    io: float
    kv_tokens: float
    gpu: float

    @property
    def delta(self) -> float:
        """Seconds of one pass over the weights."""
        return self.model_bytes / self.io

    def tokens_per_second(self, prompt: int, generated: int) -> float:
        """Return ``min(PME M / delta, T_GPU)``; without generation the GPU is the bound."""
        if generated == 0:
            return self.gpu
        return min(pme(prompt, generated) * self.kv_tokens / self.delta, self.gpu)


def effective_kv(prompt: int, generated: int, kv_tokens: float) -> float:
    """Return the KV capacity gained by mixing prefill and decode: occupancy is the mean, not the peak."""
    return kv_tokens * (prompt + generated) / (prompt + generated / 2)


def saturation_tokens(layer_bytes: float, io: float, gpu_flops: float, flops_per_token_layer: float) -> float:
    """Return the tokens of a step from which the GPU, not the weights' way, is the limit."""
    return layer_bytes / io * gpu_flops / flops_per_token_layer


@dataclass
class _Request:
    prompt: int
    left: int
    held: int = 0


@dataclass(frozen=True)
class LensMachine:
    """What stage 2 charges a step with.

    Attributes:
        delta: seconds of one pass over the weights.
        gpu: seconds of the GEMMs for n tokens.
        attention: seconds of the CPU's attention over n cached tokens.
        kv_blocks: paged blocks of the KV cache.
        block: tokens per block.
        most_tokens: ``n_real``, tokens of a step at most.
        most_running: requests at a time.
    """

    delta: float
    gpu: Callable[[int], float]
    attention: Callable[[int], float]
    kv_blocks: int
    block: int
    most_tokens: int
    most_running: int


@dataclass
class LensRun:
    """What stage 2 predicts: steps, seconds, tokens (prompt and generated) and preemptions."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    preempted: int = 0
    per_step: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Return the mean throughput."""
        return self.tokens / self.seconds


class LensSchedule:
    """Stage 2: steps through the real schedule: decode first, then prompts up to ``most_tokens``.

    A request that finds no block for its next token sends the youngest one back to the queue; that one comes
    again as a prompt of all its tokens. Prompts are not split over steps.
    """

    def __init__(self, machine: LensMachine) -> None:
        self.machine = machine
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._used = 0
        self.run = LensRun()

    def simulate(self, prompts: list[tuple[int, int]]) -> LensRun:
        """Serve requests of ``(prompt, generated)`` tokens to the end.

        Raises:
            UsageError: one request alone does not fit into the KV cache.
        """
        for prompt, generated in prompts:
            if self._blocks(prompt + generated) > self.machine.kv_blocks:
                raise UsageError(
                    f"a request of {prompt} + {generated} tokens does not fit into "
                    f"{self.machine.kv_blocks} KV blocks of {self.machine.block} tokens; "
                    "give the KV cache more memory"
                )
        self._waiting.extend(_Request(prompt, generated) for prompt, generated in prompts)
        while self._waiting or self._running:
            tokens = self._decode()
            tokens += self._prefill(self.machine.most_tokens - tokens)
            held = sum(request.held for request in self._running)
            machine = self.machine
            self.run.seconds += max(machine.delta, machine.gpu(tokens), machine.attention(held))
            self.run.steps += 1
            self.run.tokens += tokens
            self.run.per_step.append(tokens)
            self._used -= sum(self._blocks(request.held) for request in self._running if not request.left)
            self._running = [request for request in self._running if request.left]
        return self.run

    def _decode(self) -> int:
        """Give every running request a token; returns how many got one."""
        done = 0
        while done < len(self._running):
            request = self._running[done]
            needed = self._blocks(request.held + 1) - self._blocks(request.held)
            if needed > self.machine.kv_blocks - self._used:
                self._preempt()
                continue
            self._used += needed
            request.held += 1
            request.left -= 1
            done += 1
        return done

    def _preempt(self) -> None:
        """Send the youngest request back; it comes again as a prompt of all its tokens."""
        victim = self._running.pop()
        self._used -= self._blocks(victim.held)
        self._waiting.appendleft(_Request(victim.held, victim.left))
        self.run.preempted += 1

    def _prefill(self, room: int) -> int:
        done = 0
        while self._waiting and len(self._running) < self.machine.most_running:
            request = self._waiting[0]
            fits = self._used + self._blocks(request.prompt) <= self.machine.kv_blocks
            if not fits or (request.prompt > room - done and done + len(self._running) > 0):
                break
            self._waiting.popleft()
            request.held = request.prompt
            self._used += self._blocks(request.held)
            self._running.append(request)
            done += request.prompt
        return done

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.machine.block)

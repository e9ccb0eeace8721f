"""What work costs on one machine, as measured there."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gangline.core.errors import UsageError

Link = Literal["disk_to_host", "host_to_hbm", "hbm_to_host"]


@dataclass(frozen=True)
class Curve:
    """Seconds over tokens: straight lines between measured points, the last slope beyond them.

    Attributes:
        points: ``(tokens, seconds)``, ascending in tokens, at least one. Below the first point its value
            holds (reading the weights costs the same for fewer tokens); 0 tokens cost nothing.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, tokens: float) -> float:
        """Return seconds for ``tokens``."""
        if tokens <= 0:
            return 0.0
        first, last = self.points[0], self.points[-1]
        if tokens <= first[0] or len(self.points) == 1:
            return first[1] if tokens <= first[0] else last[1] * tokens / last[0]
        at = min(bisect_right([n for n, _ in self.points], tokens), len(self.points) - 1)
        (n0, t0), (n1, t1) = self.points[at - 1], self.points[at]
        return t0 + (t1 - t0) * (tokens - n0) / (n1 - n0)


def straight(intercept: float, slope: float) -> Curve:
    """Return the curve ``intercept + slope * tokens``, both in seconds."""
    return Curve(((1, intercept + slope), (2, intercept + 2 * slope)))


@dataclass(frozen=True)
class CostTable:
    """Measured costs of one machine and one expert format. All times in seconds, bandwidths in bytes/s.

    Attributes:
        machine: names the hardware and the format; a table of another machine is refused.
        expert_bytes: bytes of one expert.
        cpu: one expert on the CPU where it lies, over its tokens.
        gpu: one resident expert on the GPU, over its tokens; None without a GPU.
        cpu_first: extra time of the first expert of a layer on the CPU (cold caches).
        gpu_first: extra time of the first expert of a layer on the GPU.
        bandwidth: of each link for one expert at a time, with the link to itself.
        contended: the same while CPU experts run (both read the same DRAM).
        dram: bytes/s that the CPU reads from DRAM, alone.
    """

    machine: str
    expert_bytes: int
    cpu: Curve
    gpu: Curve | None = None
    cpu_first: float = 0.0
    gpu_first: float = 0.0
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    contended: Mapping[str, float] = field(default_factory=dict)
    dram: float | None = None

    def t_cpu(self, tokens: float) -> float:
        """Return seconds of one expert with ``tokens`` tokens on the CPU."""
        return self.cpu(tokens)

    def t_gpu(self, tokens: float) -> float:
        """Return seconds of one resident expert with ``tokens`` tokens on the GPU; infinite without one."""
        return self.gpu(tokens) if self.gpu is not None else float("inf")

    def t_transfer(self, nbytes: float, link: Link, *, concurrent: bool = False) -> float:
        """Return seconds to move ``nbytes``; ``concurrent`` while CPU experts run.

        Raises:
            UsageError: the link was not measured.
        """
        rate = (self.contended.get(link) if concurrent else None) or self.bandwidth.get(link)
        if not rate:
            raise UsageError(f"the cost table of {self.machine} has no bandwidth of {link}; calibrate again")
        return nbytes / rate

    def t_move(self, link: Link = "host_to_hbm", *, concurrent: bool = False) -> float:
        """Return seconds to move one expert."""
        return self.t_transfer(self.expert_bytes, link, concurrent=concurrent)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], machine: str) -> "CostTable":
        """Read a stored table.

        Raises:
            UsageError: it was measured on another machine.
        """
        if data["machine"] != machine:
            raise UsageError(
                f"these costs were measured on {data['machine']}, not on {machine}; calibrate this machine"
            )
        values = dict(data)
        for name in ("cpu", "gpu"):
            if values.get(name) is not None:
                values[name] = _curve(values[name]["points"])
        return cls(**values)


def _curve(points: Sequence[Sequence[float]]) -> Curve:
    return Curve(tuple((float(n), float(t)) for n, t in points))

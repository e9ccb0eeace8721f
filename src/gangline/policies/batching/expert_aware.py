"""Read-ME's expert-aware batching: batches of few distinct experts.

"Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design" (arXiv
2410.19123). With routing known ahead, ready tokens wait in one queue per expert. While the budget lasts the
longest queue is taken whole if it fits, else its first tokens fill the batch. (The published pseudocode
mixes its indices k and E; E is meant.) We add aging, without which a rare expert could wait for ever: a
token that waited longer than ``patience`` batches goes first.
"""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """A token that may run: whose it is, and the expert that it needs."""

    request: Hashable
    expert: int


class ExpertAwareBatching:
    """Queues of ready tokens, and the next batch from them.

    Args:
        patience: batches that a token waits at most before it goes first.
    """

    exact = True

    def __init__(self, patience: int = 16) -> None:
        self.patience = patience
        self._batches = 0
        self._queues: defaultdict[int, list[tuple[int, Ready]]] = defaultdict(list)

    def add(self, ready: Ready) -> None:
        """Queue a token."""
        self._queues[ready.expert].append((self._batches, ready))

    def __len__(self) -> int:
        """Return the tokens that wait."""
        return sum(len(queue) for queue in self._queues.values())

    def select(self, budget: int) -> list[Ready]:
        """Return the next batch of at most ``budget`` tokens, those that waited too long first."""
        self._batches += 1
        aged = [
            entry
            for queue in self._queues.values()
            for entry in queue
            if self._batches - entry[0] > self.patience
        ]
        aged.sort(key=lambda entry: entry[0])
        batch: list[Ready] = []
        for entry in aged[:budget]:
            self._queues[entry[1].expert].remove(entry)
            batch.append(entry[1])
        while len(batch) < budget and len(self):
            expert = min(self._queues, key=lambda e: (-len(self._queues[e]), e))
            taken = self._queues[expert][: budget - len(batch)]
            del self._queues[expert][: len(taken)]
            batch.extend(ready for _, ready in taken)
        return batch

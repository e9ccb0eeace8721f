"""SiDA's prefetch: everything that the hash table of a batch names, in the order of the layers.

"SiDA-MoE" (arXiv 2310.18859): the tables of a batch are ready before its first layer runs, so all of it is
moved, one batch ahead.
"""

from collections.abc import Sequence

from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.prefetch.protocol import Fetch, Holds, Prefetcher


class WholeSet(Prefetcher):
    """Fetches all forecast experts, earliest pass and layer first."""

    whole_pass = True

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return every missing expert once."""
        out: dict[ExpertKey, Fetch] = {}
        for f in sorted(forecasts, key=lambda f: (f.step, f.layer)):
            for expert, p in zip(f.experts, f.probabilities, strict=True):
                key = ExpertKey(f.layer, expert)
                if key not in out and not holds(key):
                    out[key] = Fetch(key, p)
        return list(out.values())[:budget]

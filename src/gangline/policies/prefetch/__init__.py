"""Which experts to read before somebody waits for them."""

from gangline.policies.prefetch.protocol import Fetch, Holds, Prefetcher

__all__ = ["Fetch", "Holds", "Prefetcher"]

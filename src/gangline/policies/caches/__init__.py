"""Which resident expert gives up its slot."""

from gangline.policies.caches.layer_lru import LayerLRU
from gangline.policies.caches.protocol import CachePolicy
from gangline.policies.caches.random_eviction import RandomEviction

__all__ = ["CachePolicy", "LayerLRU", "RandomEviction"]

"""Which resident expert gives up its slot."""

from gangline.policies.caches.layer_lru import LayerLRU
from gangline.policies.caches.protocol import CachePolicy, Evictable
from gangline.policies.caches.random_eviction import RandomEviction
from gangline.policies.caches.registry import CACHES, make_cache

__all__ = ["CACHES", "CachePolicy", "Evictable", "LayerLRU", "RandomEviction", "make_cache"]

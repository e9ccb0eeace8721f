"""One adapter per way of holding experts."""

from gangline.models.adapters.decorated import DecoratedAdapter
from gangline.models.adapters.stacked import StackedAdapter

ADAPTERS: tuple[StackedAdapter, ...] = (DecoratedAdapter(),)

__all__ = ["ADAPTERS", "StackedAdapter"]

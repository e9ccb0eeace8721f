"""Keys and values with room to grow: layers of a ``DynamicCache`` that the native step appends to.

transformers' own layers are a tensor that every token concatenates to. These hold a larger buffer and show
the part in use, so that tokens computed by transformers' modules and tokens computed natively share it.

Shape suffixes: B sequences, H key/value heads, S positions in use, C capacity, d head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from gangline.kernels.cpu import huge_pages

GROWTH = 256
"""Positions by which a buffer grows at least."""


class _Rows:
    """A buffer ``[B, H, C, d]`` of which the first ``length`` positions are in use."""

    __slots__ = ("address", "buffer", "capacity", "length")

    def __init__(self, buffer: Tensor, length: int) -> None:
        self.length = length
        self._take(buffer)

    def __reduce__(self) -> tuple[type["_Rows"], tuple[Tensor, int]]:
        return _Rows, (self.buffer, self.length)  # a copy lies elsewhere

    def _take(self, buffer: Tensor) -> None:
        self.buffer, self.address = buffer, buffer.data_ptr()
        # What is not contiguous has no room: the first token to come moves it.
        self.capacity = buffer.shape[2] if buffer.is_contiguous() else self.length

    @property
    def view(self) -> Tensor:
        return self.buffer[:, :, : self.length]

    def room_for(self, tokens: int, limit: int | None) -> None:
        """Make room for more positions; ``limit`` is what the memory plan allows for one sequence."""
        needed = self.length + tokens
        if needed <= self.capacity:
            return
        capacity = -(-needed // GROWTH) * GROWTH
        if limit is not None:
            capacity = max(needed, min(capacity, limit))
        batch, heads, _, width = self.buffer.shape
        shape = (batch, heads, capacity, width)
        grown = huge_pages.empty(shape, self.buffer.dtype, recycled=limit is None)
        grown[:, :, : self.length] = self.view
        self._take(grown)

    def append(self, new: Tensor) -> None:
        end = self.length + new.shape[2]
        self.buffer[:, :, self.length : end] = new
        self.length = end


class GrowingLayer(DynamicLayer):
    """One layer of keys and values; behaves as transformers' ``DynamicLayer``.

    ``keys`` and ``values`` are views of the part in use. Assigning a view of it that begins at its first
    position shortens the part in use (what ``crop`` does); assigning another tensor takes that one over.

    Args:
        context: tokens over all sequences that the memory plan has room for, or None.
    """

    def __init__(self, context: int | None = None) -> None:
        self._rows: dict[str, _Rows | None] = {"keys": None, "values": None}
        self._context = context
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """``[B, H, S, d]``, or None before the first update."""
        rows = self._rows["keys"]
        return None if rows is None else rows.view

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign("keys", value)

    @property
    def values(self) -> Tensor | None:
        """``[B, H, S, d]``, or None before the first update."""
        rows = self._rows["values"]
        return None if rows is None else rows.view

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign("values", value)

    def _assign(self, name: str, value: Tensor | None) -> None:
        old = self._rows[name]
        if value is None:
            self._rows[name] = None
        elif old is not None and _begins(value, old.buffer):
            old.length = value.shape[2]
        else:
            self._rows[name] = _Rows(value, value.shape[2])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device, and start with empty buffers."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._rows = {
            name: _Rows(states.new_empty(*states.shape[:2], 0, states.shape[3]), 0)
            for name, states in (("keys", key_states), ("values", value_states))
        }
        self.is_initialized = True

    def start(self, batch: int, heads: int, width: int, dtype: torch.dtype) -> None:
        """Begin with empty buffers ``[B, H, 0, d]``."""
        nothing = torch.empty(batch, heads, 0, width, dtype=dtype)
        self.lazy_initialization(nothing, nothing)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, T, d]`` and return what the new tokens may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.make_room(key_states.shape[-2])
        keys, values = self._both()
        keys.append(key_states)
        values.append(value_states)
        return self._visible(keys.view, key_states.shape[-2]), self._visible(
            values.view, key_states.shape[-2]
        )

    def get_seq_length(self) -> int:
        """Positions in use."""
        rows = self._rows["keys"]
        return 0 if rows is None or not self.is_initialized else rows.length

    def make_room(self, tokens: int) -> None:
        """Reallocate if fewer positions than ``tokens`` are free."""
        for rows in self._both():
            limit = None if self._context is None else self._context // max(1, rows.buffer.shape[0])
            rows.room_for(tokens, limit)

    def native_rows(self, tokens: int = 1) -> tuple[int, int, int]:
        """Make room for more tokens; return the addresses of keys and values, and the capacity."""
        keys, values = self._both()
        if keys.capacity != values.capacity:  # somebody has assigned one of them: both move
            keys.capacity, values.capacity = keys.length, values.length
        if max(keys.length, values.length) + tokens > keys.capacity:
            self.make_room(tokens)
        return keys.address, values.address, keys.capacity

    def appended(self, tokens: int = 1) -> None:
        """Count tokens that were written behind the part in use."""
        for rows in self._both():
            rows.length += tokens

    def holds(self, batch: int, length: int) -> bool:
        """Whether keys and values are of so many sequences and positions, and of one kind."""
        keys, values = self._rows["keys"], self._rows["values"]
        return (
            keys is not None
            and values is not None
            and keys.length == values.length == length
            and keys.buffer.shape[0] == values.buffer.shape[0] == batch
            and keys.buffer.dtype == values.buffer.dtype
        )

    @property
    def batch(self) -> int:
        """Sequences, 0 before the first update."""
        rows = self._rows["keys"]
        return 0 if rows is None else rows.buffer.shape[0]

    def _both(self) -> tuple[_Rows, _Rows]:
        keys, values = self._rows["keys"], self._rows["values"]
        assert keys is not None and values is not None
        return keys, values

    def _visible(self, view_BHSd: Tensor, _new: int) -> Tensor:
        return view_BHSd


class GrowingSlidingLayer(GrowingLayer):
    """As transformers' ``DynamicSlidingWindowLayer``, but positions that have left the window stay in the
    buffer: the memory plan counts them anyway, and a crop can go back to them.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, context: int | None = None) -> None:
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)
        super().__init__(context)

    def activate_past_recording(self) -> None:
        """Nothing to switch on: the past is always there."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what :meth:`update` will return."""
        past = self.get_seq_length()
        offset = max(past - self.sliding_window + 1, 0)
        return past - offset + query_length, offset

    def get_max_length(self) -> int:
        """Return the window."""
        return self.sliding_window

    def _visible(self, view_BHSd: Tensor, new: int) -> Tensor:
        return view_BHSd[:, :, max(view_BHSd.shape[2] - new - self.sliding_window + 1, 0) :]


def adopt_cache(cache: Any, layers: int, context: int | None) -> bool:
    """Replace the layers of an empty ``DynamicCache`` by growing ones; False if it is of another kind."""
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return False
    if (
        cache.get_seq_length()
        or cache.is_initialized
        or any(getattr(x, "record_past", False) for x in cache.layers)
    ):
        return False
    if cache.layers and len(cache.layers) != layers:
        return False
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers] or [None] * layers
    cache.layers = [
        GrowingLayer(context) if window is None else GrowingSlidingLayer(window, context)
        for window in windows
    ]
    return True


def unused_layers(cache: Any) -> list[GrowingLayer] | None:
    """Return a cache's layers if all of them are ours and none has been started."""
    if type(cache) is not DynamicCache or not cache.layers:
        return None
    layers: list[Any] = cache.layers
    unused = all(isinstance(layer, GrowingLayer) and not layer.is_initialized for layer in layers)
    return list(layers) if unused else None


def growing_layers(cache: Any) -> list[GrowingLayer] | None:
    """Return a cache's layers if all of them are ours and in step with each other."""
    if type(cache) is not DynamicCache or not cache.layers:
        return None
    layers: list[Any] = cache.layers
    if not all(isinstance(layer, GrowingLayer) for layer in layers):
        return None
    length, batch = layers[0].get_seq_length(), layers[0].batch
    in_step = all(layer.holds(batch, length) for layer in layers)
    return list(layers) if in_step else None


def _begins(view: Tensor, buffer: Tensor) -> bool:
    """Whether ``view`` is the first positions of ``buffer``."""
    return (
        view.data_ptr() == buffer.data_ptr()
        and view.stride() == buffer.stride()
        and view.shape[:2] == buffer.shape[:2]
        and view.shape[3] == buffer.shape[3]
        and view.shape[2] <= buffer.shape[2]
    )

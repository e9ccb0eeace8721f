"""Native steps one after another, with everything that stays the same between them kept.

A step through ``model.forward`` looks at its arguments, its cache and its mask anew for every token. The
weights that a token reads have meanwhile pushed all of that out of the processor's caches, so it takes many
times longer than it would by itself. A session looks once.

Shape suffixes: B sequences, V vocabulary.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gangline.kernels.cpu.decoder import NativeDecoder
from gangline.runtime.native_cache import GrowingLayer
from gangline.runtime.native_check import embed
from gangline.runtime.torch_threads import pause_torch_threads

if TYPE_CHECKING:
    from gangline.runtime.native_decode import NativeDecode


class NativeSession:
    """Steps of some sequences whose experts are all in memory. Close it: the cache learns of the steps then.

    Args:
        decode: whose steps these are.
        layers: of the cache, in step with each other.
        first_B: cache position at which each sequence begins.
        positions_B: rotary positions of the next tokens.
        before_step: called with the number of sequences and the positions in the cache before every step.
    """

    def __init__(
        self,
        decode: "NativeDecode",
        layers: Sequence[GrowingLayer],
        first_B: Tensor,
        positions_B: Tensor,
        before_step: Callable[[int, int], None],
    ) -> None:
        self._decode, self._decoder, self._layers = decode, decode.decoder, layers
        self._before_step = before_step
        self._rows = len(first_B)
        self._first = array("q", first_B.tolist())
        self._positions = array("q", positions_B.tolist())
        self._length = self._counted = layers[0].get_seq_length()
        self._embedding = _Embedding(decode.model, decode.decoder, self._rows)
        self._buffers = decode.decoder.buffers(self._rows)
        self._find_rows()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token a sequence; return logits ``[B, V]``, which the next step overwrites."""
        self._before_step(self._rows, self._length)
        if self._length == self._capacity:
            self._find_rows()
        pause_torch_threads()
        with self._decode.lock:
            self._decoder.start(
                self._buffers,
                self._embedding.address(tokens),
                self._positions.buffer_info()[0],
                self._first.buffer_info()[0],
                self._length,
                self._addresses,
            )
            logits_BV = self._decoder.step_all(self._buffers)
        self._decode.count_step(self._buffers.routing)
        self._length += 1
        for row in range(self._rows):
            self._positions[row] += 1
        return logits_BV

    def close(self) -> None:
        """Tell the cache of the positions that the steps have written."""
        for layer in self._layers:
            layer.appended(self._length - self._counted)
        self._counted = self._length

    def _find_rows(self) -> None:
        self.close()
        rows = [layer.native_rows() for layer in self._layers]
        self._addresses = [number for numbers in rows for number in numbers]
        self._capacity = min(capacity for _, _, capacity in rows)


class _Embedding:
    """Where the embeddings of some tokens lie: in the model's own table, if it is nothing but a table."""

    def __init__(self, model: nn.Module, decoder: NativeDecoder, rows: int) -> None:
        self._model, self._decoder, self._rows = model, decoder, rows
        table = model.get_input_embeddings()  # type: ignore[operator]
        hooks = (table._forward_hooks, table._forward_pre_hooks)
        plain = type(table) is nn.Embedding and table.max_norm is None and not any(hooks)
        weight = table.weight if plain and "forward" not in table.__dict__ else None
        if weight is None or weight.dtype != decoder.dtype or not weight.is_contiguous():
            self._weight = None
            return
        self._weight = weight.detach()
        self._base: int = weight.data_ptr()
        self._stride: int = weight.shape[1] * weight.element_size()
        self._found_BD: Tensor = self._weight.new_empty(rows, weight.shape[1])

    def address(self, tokens: Sequence[int]) -> int:
        """Of ``[B, D]`` in the model's number format, good until the next call."""
        if self._weight is None:
            ids_B1 = torch.tensor(tokens).view(-1, 1)
            self._found_BD = embed(self._model, self._decoder, ids_B1)  # type: ignore[arg-type]
        elif self._rows == 1:
            return self._base + tokens[0] * self._stride
        else:
            torch.index_select(self._weight, 0, torch.tensor(tokens), out=self._found_BD)
        return self._found_BD.data_ptr()

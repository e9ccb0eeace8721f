"""llama.cpp as the other side of a comparison, through the C functions of ``llama-cpp-python``.

The C functions and not its ``Llama`` class: they decode several sequences at once, and Python costs next to
nothing beside a token.

Legend: B sequences, P prompt tokens, N new tokens.
"""

import time
from collections import deque
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gangline.core.errors import CheckpointError, UsageError
from gangline.evaluation.speed_run import Sample

_BATCH = 2048  # tokens handed over at once; computed _UBATCH at a time, llama.cpp's own defaults
_UBATCH = 512
_ERROR = 4  # level of its log
_complaints: deque[str] = deque(maxlen=20)
_PAD = 256  # llama.cpp rounds the context of a sequence up to this


def require_llama_cpp() -> None:
    """Refuse where the peer is not installed.

    Raises:
        UsageError: names the package.
    """
    if find_spec("llama_cpp") is None:
        raise UsageError("comparing with llama.cpp needs its package: pip install llama-cpp-python")


def _library() -> Any:
    """Return the module of llama.cpp's C functions; typed as anything, since it may not be installed."""
    return import_module("llama_cpp")


@cache
def _keep_complaints() -> Any:
    """Return the callback that keeps llama.cpp's errors and drops all else; it lives to the end."""
    llama_cpp = _library()

    def note(level: int, text: bytes, data: Any) -> None:
        if level == _ERROR:
            _complaints.append(text.decode(errors="replace").strip())

    return llama_cpp.llama_log_callback(note)


def _complaint() -> str:
    return _complaints[0] if _complaints else "it does not say why"


class LlamaCppSide:
    """A GGUF file in llama.cpp.

    Args:
        gguf: the file.
        threads: that compute.
        batch: sequences.
        context: tokens of one sequence.
        repack: whether weights may be copied into the layout of its fastest kernels. Such copies cannot be
            dropped from memory and read again, so paging from disk needs False.

    Raises:
        CheckpointError: llama.cpp cannot load the file.
    """

    def __init__(self, gguf: str, *, threads: int, batch: int, context: int, repack: bool = True) -> None:
        llama_cpp = self._c = _library()
        self._c.llama_log_set(_keep_complaints(), None)
        _complaints.clear()
        self._c.llama_backend_init()
        loading = self._c.llama_model_default_params()
        loading.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        loading.use_extra_bufts = repack
        self._model = self._c.llama_model_load_from_file(gguf.encode(), loading)
        if not self._model:
            raise CheckpointError(
                f"llama-cpp-python {llama_cpp.__version__} cannot load {gguf} ({_complaint()}); "
                "use a newer one or another model"
            )
        running = self._c.llama_context_default_params()
        running.n_ctx = batch * -(-context // _PAD) * _PAD
        running.n_seq_max = batch
        running.n_batch, running.n_ubatch = _BATCH, _UBATCH
        running.n_threads = running.n_threads_batch = threads
        self._context = self._c.llama_init_from_model(self._model, running)
        if not self._context:
            raise CheckpointError(
                f"llama.cpp has no room for {batch} x {context} tokens of {gguf}; ask for fewer"
            )
        self._tokens = self._c.llama_batch_init(_BATCH, 0, 1)
        self._sampler = self._c.llama_sampler_init_greedy()

    def run(self, ids_BP: Tensor, new_tokens: int, following_BN: Tensor) -> Sample:
        """Read prompts and feed the tokens that follow, one step at a time.

        Behind every step its greedy sampler chooses a token, as ``generate()`` does on our side. As in
        :func:`~gangline.evaluation.speed_run.timed_generation` the last token is not fed: its logits are
        nobody's business any more.
        """
        self.reset()
        start = time.perf_counter()
        self.feed(ids_BP, 0, choose=True)
        first = time.perf_counter()
        for step in range(new_tokens - 1):
            self.feed(following_BN[:, step : step + 1], ids_BP.shape[1] + step, choose=True)
        return Sample(first - start, time.perf_counter() - first)

    def reset(self) -> None:
        """Forget all text."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def feed(self, ids_BT: Tensor, past: int, *, choose: bool = False) -> None:
        """Append tokens to every sequence and compute the logits after the last of each.

        ``choose``: let the greedy sampler find the most likely next token of each, too.
        """
        entries = [
            (token, past + place, sequence, place == ids_BT.shape[1] - 1)
            for sequence, row in enumerate(ids_BT.tolist())
            for place, token in enumerate(row)
        ]
        for start in range(0, len(entries), _BATCH):
            some = entries[start : start + _BATCH]
            self._decode(some)
            for place, (_, _, _, wanted) in enumerate(some):
                if choose and wanted:
                    self._c.llama_sampler_sample(self._sampler, self._context, place)

    def logits(self, index: int) -> Tensor:
        """Return the logits ``[V]`` of one token of the last call; negative indices count from its end."""
        import numpy as np

        size = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        pointer = self._c.llama_get_logits_ith(self._context, index)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (size,)).copy())

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        tokens = self._tokens
        tokens.n_tokens = len(entries)
        for place, (token, position, sequence, wanted) in enumerate(entries):
            tokens.token[place] = token
            tokens.pos[place] = position
            tokens.n_seq_id[place] = 1
            tokens.seq_id[place][0] = sequence
            tokens.logits[place] = wanted
        code = self._c.llama_decode(self._context, tokens)
        if code:
            raise CheckpointError(
                f"llama.cpp ended with code {code} on {len(entries)} tokens; lower the batch"
            )
        self._c.llama_synchronize(self._context)

    def close(self) -> None:
        """Free it."""
        self._c.llama_sampler_free(self._sampler)
        self._c.llama_batch_free(self._tokens)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)

"""SiDA on a loaded model: hash tables tell what to read, and in its own mode what to compute.

"SiDA-MoE: Sparsity-Inspired Data-Aware Serving for Efficient and Scalable Large Mixture-of-Experts Models"
(arXiv 2310.18859). ``hint`` (exact): the table of a pass names experts that are then read ahead, the routers
decide. ``execute`` (approximate, the paper's own mode): the table's experts and weights are what is computed,
the routers are skipped. Weights follow the family's own rule on the predicted logits, so that a perfect
prediction gives the plain model's result; the released code instead damps softmax values by fixed factors
(:data:`PAPER_DAMPING` for three experts), which ``damping`` does.

Shape suffixes: B sequences, S tokens of one pass, T rows, K experts per token, E experts, D hidden.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gangline.core.errors import UsageError
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.models import MoEBlock, RouterSpec, Undo, select
from gangline.policies.predictors.ranking import forecast
from gangline.policies.predictors.sida import HashFunction, HashState, HashTable, top_choices
from gangline.runtime.router_standin import skip_router
from gangline.runtime.set_fetcher import SetFetcher
from gangline.traces.hooks import observed_part

Mode = Literal["hint", "execute"]

PAPER_DAMPING = (0.5, 0.25, 0.25)
"""Factors of the three experts of a token in the paper's setting."""


@dataclass(frozen=True)
class Prepared:
    """A batch and its table.

    Attributes:
        ids_BS: its token ids.
        table: experts and weights for each predicted layer.
        state: where a text goes on; None for networks that read whole texts.
    """

    ids_BS: Tensor
    table: HashTable
    state: HashState | None


class HashRouting:
    """Runs the forward passes of a loaded model by hash tables until it is closed; a context manager.

    Passes given to :meth:`use` run by the table that was prepared for them; any other pass makes its own
    first. Generation works (a causal network goes on with the text); beam search does not, because it
    rearranges texts behind our back.

    Args:
        model: from ``gangline.load`` or ``attach``; of an encoder-decoder model its encoder is predicted.
        network: trained for it; one head for each predicted layer.
        mode: see above.
        choices: experts per token; by default as many as the model's.
        damping: ``execute``: factors of a token's experts, best first.
        agreement: ``execute``: what is known of how often the tables are right, for the banner.

    Attributes:
        exact: whether the routers decide.
        skipped: routers that do not compute.

    Raises:
        UsageError: the network does not fit the model, or the family's routing cannot be predicted.
    """

    def __init__(
        self,
        model: Any,
        network: HashFunction,
        *,
        mode: Mode = "hint",
        choices: int | None = None,
        damping: Sequence[float] | None = None,
        agreement: str = "",
    ) -> None:
        self._model, self._network, self.mode = model, network, mode
        both = bool(model.config.is_encoder_decoder)
        root, self._blocks = observed_part(model, "encoder" if both else None)
        experts = [head.out_features for head in network.heads]
        if experts != [block.geometry.experts for block in self._blocks]:
            raise UsageError(
                f"the hash function predicts layers of {experts} experts, this model has "
                f"{[b.geometry.experts for b in self._blocks]}; train one with 'gangline predict train'"
            )
        self.exact = mode == "hint"
        self._damping = None if damping is None else torch.tensor(damping)
        self._choices = choices
        if damping is not None and choices != len(damping):
            raise UsageError(f"{len(damping)} damping factors need choices={len(damping)}, not {choices}")
        self._specs = [] if self.exact else [_rule(block, choices) for block in self._blocks]
        self._number = {block.layer: n for n, block in enumerate(self._blocks)}
        self._layer = -1
        self._given: Prepared | None = None
        self._running: Prepared | None = None
        self._expected: deque[Prepared] = deque()
        self._step: int | None = None
        self._lock = threading.Lock()
        runtime = model.gangline
        self._runtime = runtime
        self._fetcher = SetFetcher(runtime.store, runtime.plan.experts_resident)
        self._undo: list[Undo] = [
            runtime.reroute(
                self._reroute, None if self.exact else f"SiDA's hash tables instead of the routers{agreement}"
            )
        ]
        self._undo.append(root.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self.skipped = 0
        if not self.exact:
            self._skip_routers()

    def close(self) -> None:
        """Give the routers back."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "HashRouting":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    def prepare(self, ids_BS: Tensor, state: HashState | None = None) -> Prepared:
        """Build the table of a batch. Touches nothing that a running pass uses, so any thread may call it.

        Args:
            ids_BS: token ids.
            state: of the text before them.
        """
        x_BSD = self._model.get_input_embeddings()(ids_BS).float()
        logits, after = self._network.resume(x_BSD, state)
        if self.exact:
            most = max(block.geometry.top_k for block in self._blocks)
            table = top_choices(logits, self._choices or most)
        else:
            table = self._executed(logits)
        return Prepared(ids_BS, table, after if self._network.causal else None)

    def expect(self, prepared: Prepared) -> None:
        """A later pass will be run by this table (see :meth:`use`); any thread may say so.

        The experts of the pass after the present one are read beside it, into slots that it has no use for.
        """
        with self._lock:
            self._expected.append(prepared)
            if len(self._expected) == 1:
                self._read_next()

    def use(self, prepared: Prepared) -> None:
        """Let the next pass, which must be over these tokens, run by this table."""
        with self._lock:
            if self._expected and self._expected[0] is prepared:
                self._expected.popleft()
        self._given = prepared

    def forget(self) -> None:
        """Expect nothing any more."""
        with self._lock:
            self._expected.clear()
            self._fetcher.follow([])

    def _read_next(self) -> None:
        """Tell the cache what the pass after the present one needs, and read it (the lock is held)."""
        if self._expected:
            step = self._runtime.next_step if self._step is None else self._step + 1
            self._fetcher.follow(self._announced(self._expected[0].table, step))

    def _announced(self, table: HashTable, step: int) -> list[ExpertKey]:
        """Tell the cache what pass ``step`` needs; returns that in the order of the layers."""
        forecasts = self.forecasts(table, step)
        self._runtime.store.forecast(forecasts)
        return [ExpertKey(f.layer, expert) for f in forecasts for expert in sorted(f.experts)]

    def _executed(self, logits: Sequence[Tensor]) -> HashTable:
        """Apply the family's rule to predicted logits, sequence by sequence (capacity counts in each)."""
        ids, weights = [], []
        for z_BSE, spec in zip(logits, self._specs, strict=True):
            chosen = [select(z_SE, spec) for z_SE in z_BSE]
            weights_BSK = torch.stack([one.weights_TK for one in chosen])
            ids.append(torch.stack([one.ids_TK for one in chosen]))
            weights.append(weights_BSK if self._damping is None else weights_BSK * self._damping)
        return HashTable(ids, weights)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins: take its table, tell the cache, and begin to read."""
        ids_BS = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids_BS, Tensor) or ids_BS.is_floating_point():
            raise UsageError("hash tables are made from token ids; call the model with input_ids=")
        given, self._given = self._given, None
        if given is not None and not torch.equal(given.ids_BS, ids_BS):
            raise UsageError("the pass is over other tokens than the table it was given; prepare it anew")
        self._running = given or self.prepare(ids_BS, self._state_at(_past(kwargs)))
        self._layer = -1
        with self._lock:
            self._step = self._runtime.next_step
            self._fetcher.begin(self._announced(self._running.table, self._step))
            self._read_next()

    def _state_at(self, past: int) -> HashState | None:
        if past == 0 or not self._network.causal:
            return None
        state = None if self._running is None else self._running.state
        if state is None or state.tokens != past:
            known = 0 if state is None else state.tokens
            raise UsageError(
                f"the pass goes on after {past} tokens of which the hash function has read {known}; "
                "begin the text anew, without beam search or a cache from elsewhere"
            )
        return state

    def forecasts(self, table: HashTable, step: int) -> list[Forecast]:
        """Return what a table says as forecasts of pass ``step``: its experts by their summed weights."""
        out = []
        for number, (block, ids, weights) in enumerate(
            zip(self._blocks, table.ids, table.values, strict=True)
        ):
            p_E = torch.zeros(block.geometry.experts + 1)  # the last one is the empty slot
            p_E.index_add_(0, ids.flatten(), weights.flatten().float())
            rows = ids.shape[0] * ids.shape[1]
            out.append(forecast(step, block.layer, (p_E[:-1] / rows).numpy(), number + 1, "sida"))
        return out

    def _reroute(self, layer: int, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The engine asks what to compute."""
        number = self._number.get(layer)
        if number is None or self._running is None:
            return ids_TK, weights_TK
        self._fetcher.advance(layer)
        if self.exact:
            return ids_TK, weights_TK
        mine = self._choice(number)
        assert mine is not None
        if len(mine[0]) != len(ids_TK):
            raise UsageError(
                f"layer {layer} computes {len(ids_TK)} rows where the hash table has {len(mine[0])}; "
                "run this model with --mode hint"
            )
        return mine

    def _choice(self, number: int) -> tuple[Tensor, Tensor] | None:
        if self._running is None:
            return None
        table = self._running.table
        return table.ids[number].flatten(0, 1), table.values[number].flatten(0, 1)

    def _skip_routers(self) -> None:
        for number, block in enumerate(self._blocks):
            undo = skip_router(block, lambda number=number: self._choice(number))  # type: ignore[misc]
            if undo is not None:
                self._undo.append(undo)
                self.skipped += 1


def _rule(block: MoEBlock, choices: int | None) -> RouterSpec:
    """Return the rule that turns predicted logits into experts and weights."""
    spec = block.router_spec
    why = block.router_reason
    if spec is not None:
        plain = spec.bias is None and spec.groups is None and spec.table_VK is None
        if plain and spec.skip_class is None and spec.score in ("softmax", "softmax_topk"):
            return replace(spec, k=choices or spec.k)
        why = f"it routes by {spec.kind}"
    raise UsageError(
        f"the routers of {block.parent_name} cannot be replaced by a hash table ({why}): the training fits "
        "softmax logits only; use the predictor as a hint"
    )


def _past(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0

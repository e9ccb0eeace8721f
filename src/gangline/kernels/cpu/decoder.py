"""One step of a whole model in the native core, and the parts it is built from.

Shape suffixes: B sequences, S new tokens of each, R = B * S rows (one sequence's tokens after another's), D
hidden, K chosen experts per token, V vocabulary.
"""

import ctypes
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gangline.kernels.cpu import native

_CODECS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

MoEForward = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``forward(moe_layer, x_RD, ids_RK, weights_RK) -> y_RD``, all fp32 but the ids."""


class NotNativeError(Exception):
    """The native step cannot stand for a model; the message is the reason."""


class CacheLayer(Protocol):
    """Keys and values of one layer: ``[B, kv heads, capacity, head dim]``."""

    def native_rows(self, tokens: int = 1) -> tuple[int, int, int]:
        """Make room for so many tokens; return the addresses of keys and values, and the capacity."""
        ...


@dataclass
class Parts:
    """Makes the native core's views of weights and keeps alive what they point to.

    Attributes:
        core: the native extension.
        packed: whether some matrix is packed, so that activations are rounded to int8.
        watched: parameters that are read in place, with the address that each had. One that moves (a model
            that is trained, quantized or sent elsewhere) makes the views stale.
    """

    core: Any
    packed: bool = False
    watched: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    _kept: list[Any] = field(default_factory=list)

    def moved(self) -> bool:
        """Whether a parameter no longer lies where it did."""
        return any(
            getattr(module, name, None) is None or getattr(module, name).data_ptr() != address
            for module, name, address in self.watched
        )

    def weight(self, module: nn.Module, name: str = "weight") -> Tensor:
        """Return a parameter that the native core can read in place.

        Raises:
            NotNativeError: it lies elsewhere, or in another form.
        """
        tensor = getattr(module, name, None)
        if not isinstance(tensor, Tensor):
            raise NotNativeError(f"{type(module).__name__} has no {name}")
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
            raise NotNativeError(
                f"{type(module).__name__}.{name} is a {type(tensor).__name__} on {tensor.device}"
            )
        if tensor.dtype not in _CODECS or not tensor.is_contiguous():
            raise NotNativeError(f"{type(module).__name__}.{name} is {tensor.dtype} or not contiguous")
        self.watched.append((module, name, tensor.data_ptr()))
        self._kept.append(tensor)
        return tensor

    def floats(self, tensor: Tensor) -> int:
        """Return the address of an fp32 copy of a small tensor."""
        copy = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        self._kept.append(copy)
        return copy.data_ptr()

    def matrix(self, module: nn.Module) -> Any:
        """Return the native matrix of a linear layer: plain numbers in place, or the bytes of a codec."""
        packed = getattr(module, "matrix", None)
        if packed is not None:
            self._kept.append(module)
            self.packed = True
            return packed
        w_OI = self.weight(module)
        if w_OI.dim() != 2:
            raise NotNativeError(f"{type(module).__name__}.weight has {w_OI.dim()} dimensions")
        return self.core.Matrix(w_OI.data_ptr(), w_OI.shape[0], w_OI.shape[1], _CODECS[w_OI.dtype])

    def linear(self, module: nn.Module) -> Any:
        """Return a linear layer: ``nn.Linear``, a packed one, or a router with ``weight`` and ``bias``."""
        bias = getattr(module, "bias", None)
        return self.core.Linear(self.matrix(module), 0 if bias is None else self.floats(bias))

    def norm(self, module: nn.Module) -> Any:
        """Return an RMS norm."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if eps is None:
            raise NotNativeError(f"{type(module).__name__} has no epsilon")
        weight = self.weight(module)
        return self.core.Norm(weight.data_ptr(), _CODECS[weight.dtype], weight.numel(), float(eps))


@dataclass(frozen=True)
class LayerPlan:
    """One layer for :class:`NativeDecoder`.

    Attributes:
        layer: the native description.
        kv_heads, head_dim: of its cache.
        moe_layer: its number among the MoE layers, None if it is dense.
        k: experts per token, 0 if it is dense.
        rule: its native routing rule.
    """

    layer: Any
    kv_heads: int
    head_dim: int
    moe_layer: int | None = None
    k: int = 0
    rule: Any = None


class NativeDecoder:
    """Some new tokens of each of B sequences, all layers: one while they decode, many of a prompt.

    A token gets the same bits whatever is computed with it, and in however many steps. The experts are
    computed by ``moe`` between the native halves of each layer (:meth:`step`), or, where every expert has
    been given to :meth:`set_experts`, by the native core in one call (:meth:`step_all`). Both give the same
    bits.

    Args:
        parts: what the layers were made with.
        plans: all layers.
        hidden: D. final_norm, head: native norm and linear after the layers.
        inverse_frequencies: of the rotary embedding. rope_scaling: factor of its cosines and sines.
        dtype: number format of the model, of its cache and of the logits.
    """

    def __init__(
        self,
        parts: Parts,
        plans: Sequence[LayerPlan],
        *,
        hidden: int,
        final_norm: Any,
        head: Any,
        inverse_frequencies: Sequence[float],
        rope_scaling: float,
        dtype: torch.dtype,
    ) -> None:
        self.parts = parts
        self.dtype = dtype
        self.hidden = hidden
        self.plans = tuple(plans)
        self._k = tuple(plan.k for plan in plans if plan.moe_layer is not None)
        self._resident = False
        self.classes = int(head.rows)
        self.native = parts.core.Decoder(
            hidden=self.hidden,
            numbers=_CODECS[dtype],
            final_norm=final_norm,
            head=head,
            inverse_frequencies=list(inverse_frequencies),
            rope_scaling=rope_scaling,
            layers=[plan.layer for plan in plans],
        )

    @property
    def rules(self) -> dict[int, Any]:
        """The routing rule of each MoE layer."""
        return {plan.moe_layer: plan.rule for plan in self.plans if plan.moe_layer is not None}

    @property
    def rounds_activations(self) -> bool:
        """Whether some product is with int8 activations."""
        return self.parts.packed

    @property
    def resident(self) -> bool:
        """Whether :meth:`step_all` can be used."""
        return self._resident

    def set_experts(self, table: Sequence[tuple[Any, Sequence[Any]]] | None) -> None:
        """Give (or with None take back) all experts: for each MoE layer its native ``MoELayer`` and its
        ``Expert`` objects in ascending id. They must stay valid until they are taken back.
        """
        self.native.set_experts([] if table is None else [(layer, list(experts)) for layer, experts in table])
        self._resident = table is not None
        self._table = table  # the native side holds no references

    def begin(
        self,
        embedded_RD: Tensor,
        positions_R: Tensor,
        first_B: Tensor,
        length: int,
        cache: Sequence[CacheLayer],
        *,
        last_only: bool = False,
    ) -> "StepBuffers":
        """Start a step; all tensors are contiguous.

        Args:
            embedded_RD: embeddings of the tokens in the model's number format.
            positions_R: rotary positions, int64. first_B: cache position each sequence begins at, int64.
            length: positions in the cache before this step.
            cache: one entry a layer.
            last_only: for :meth:`step_all`: of tokens other than each sequence's last, the last layer makes
                keys and values only. The logits have the same bits, and its routing has B rows.
        """
        sequences = len(first_B)
        buffers = self.buffers(sequences, len(embedded_RD) // sequences, last_only=last_only)
        addresses = [number for layer in cache for number in layer.native_rows(buffers.tokens)]
        embedded, positions, first = (tensor.data_ptr() for tensor in (embedded_RD, positions_R, first_B))
        self.start(buffers, embedded, positions, first, length, addresses)
        return buffers

    def buffers(self, sequences: int, tokens: int = 1, *, last_only: bool = False) -> "StepBuffers":
        """Return room for what a step reads and writes on the Python side."""
        rows, routed = sequences * tokens, [sequences * tokens] * len(self._k)
        if last_only and self.plans[-1].moe_layer is not None:
            routed[-1] = sequences
        x_RD = torch.empty(rows, self.hidden)
        logits_BV = torch.empty(sequences, self.classes, dtype=self.dtype)
        return StepBuffers(tokens, x_RD, Routing(rows, self._k, routed), logits_BV, last_only)

    def start(
        self,
        buffers: "StepBuffers",
        embedded: int,
        positions: int,
        first: int,
        length: int,
        cache: Sequence[int],
    ) -> None:
        """As :meth:`begin`, of addresses: ``cache`` holds keys, values and capacity of every layer."""
        self.native.begin(
            len(buffers.logits_BV),
            buffers.tokens,
            embedded,
            positions,
            first,
            length,
            cache,
            *buffers.addresses,
            buffers.last_only,
        )

    def step(self, buffers: "StepBuffers", moe: MoEForward) -> Tensor:
        """Return the logits ``[B, V]`` of the last tokens; ``moe`` computes the experts of each MoE layer."""
        for index, plan in enumerate(self.plans):
            self.native.front(index)
            if plan.moe_layer is not None:
                ids_RK, weights_RK = buffers.routing.of(plan.moe_layer)
                y_RD = moe(plan.moe_layer, buffers.x_RD, ids_RK, weights_RK).float().contiguous()
                self.native.back(y_RD.data_ptr())
        self.native.head()
        return buffers.logits_BV

    def step_all(self, buffers: "StepBuffers") -> Tensor:
        """Return the logits ``[B, V]`` of the last tokens by one native call; ``buffers.routing`` then tells
        what was chosen.
        """
        self.native.step_all()
        return buffers.logits_BV

    def release(self) -> None:
        """Give back the memory of the last step, which was a large one."""
        self.native.release()

    def hidden_rows(self, rows: int) -> Tensor:
        """Return the residual stream ``[R, D]`` of the step under way, in place (for checks)."""
        stride = self.native.hidden_stride
        count = (rows - 1) * stride + self.hidden
        raw = (ctypes.c_float * count).from_address(self.native.hidden)
        return torch.frombuffer(raw, dtype=torch.float32).as_strided((rows, self.hidden), (stride, 1))


class Routing:
    """What the routers of one step chose; new tensors in every step.

    Attributes:
        ids: of all MoE layers, one ``[R, K]`` after another, int64. weights: the same in fp32.
        rows: R.

    Args:
        rows: R of the step. k: K of each MoE layer. routed: rows that each of them routes, if not R.
    """

    def __init__(self, rows: int, k: Sequence[int], routed: Sequence[int] | None = None) -> None:
        self.rows, self._k, self._routed = rows, k, routed or [rows] * len(k)
        chosen = sum(map(operator.mul, self._routed, k))
        self.ids = torch.empty(chosen, dtype=torch.int64)
        self.weights = torch.empty(chosen)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids ``[R, K]`` and weights ``[R, K]`` of every MoE layer."""
        if len(set(self._k)) == 1 and set(self._routed) == {self.rows}:
            shape = (len(self._k), self.rows, self._k[0])
            return zip(self.ids.view(shape).unbind(), self.weights.view(shape).unbind(), strict=True)
        return (self.of(layer) for layer in range(len(self._k)))

    def of(self, moe_layer: int) -> tuple[Tensor, Tensor]:
        """Return ids ``[R, K]`` and weights ``[R, K]`` of one MoE layer."""
        begin, shape = self.rows * sum(self._k[:moe_layer]), (self._routed[moe_layer], self._k[moe_layer])
        end = begin + shape[0] * shape[1]
        return self.ids[begin:end].view(shape), self.weights[begin:end].view(shape)


@dataclass
class StepBuffers:
    """What one step reads and writes on the Python side.

    Attributes:
        tokens: S.
        x_RD: input of the experts of the layer under way, fp32; changes with every layer.
        routing: what the routers chose.
        logits_BV: of the last tokens, in the model's number format.
        last_only: whether the last layer is computed for each sequence's last token only.
        addresses: of these tensors, as the native step takes them.
    """

    tokens: int
    x_RD: Tensor
    routing: Routing
    logits_BV: Tensor
    last_only: bool

    def __post_init__(self) -> None:
        written = (self.x_RD, self.routing.ids, self.routing.weights, self.logits_BV)
        self.addresses = tuple(tensor.data_ptr() for tensor in written)


def parts() -> Parts:
    """Return a maker of native views.

    Raises:
        NotNativeError: the native core is not built here.
    """
    core = native()
    if core is None or not hasattr(core, "Decoder"):
        raise NotNativeError("the native core is not built")
    return Parts(core)

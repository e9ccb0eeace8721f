"""The experts of one layer on the native CPU core; the same interface as ``ReferenceKernel``.

Shape suffixes: T tokens, P (token, expert) pairs sorted by expert, N pairs of one expert, D hidden, F
intermediate, G columns of the gate/up product (2F or F), E experts.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import DenseCodec, dense_codec_name, get_codec
from gangline.kernels.cpu import native
from gangline.kernels.cpu.gates import GateForm, recognise_gate
from gangline.kernels.grouping import Adder, Grouping
from gangline.kernels.reference import ExpertMath, ExpertWeights, ReferenceKernel

# Activations of sparse codes are rounded in groups of so many columns, whatever the groups of the weights.
_SPARSE_GROUP = 64
# Those of ggml's super-blocks.
_SUPER_GROUP = 128
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# From so many rows of one expert on, torch's matrix product of plain numbers is faster, by the
# dtype of the rows: its bf16 product uses the processor's own bf16 instructions.
_TORCH_FROM_ROWS = {torch.bfloat16: 16, torch.float16: 96, torch.float32: 96}


@dataclass(eq=False, slots=True)
class NativeWeights:
    """One expert where it lies.

    Attributes:
        matrices: the native core's view of each field.
        dense: the torch reference's view of the same bytes; keeps them alive.
        experts: the native expert by id, with that expert's biases (id -1: none).
    """

    matrices: tuple[Any, ...]
    dense: ExpertWeights
    raws: tuple[Tensor, ...]
    experts: dict[int, Any] = field(default_factory=dict)


@functools.cache
def _formats(kernels: str) -> frozenset[str]:
    """Names of the codecs that the kernels in use compute with."""
    core = native()
    return frozenset() if core is None else frozenset(core.native_formats())


class NativeKernel:
    """Computes all experts of one layer in one native call.

    Integer formats: activations are rounded to int8 in the format's groups. Plain numbers: fp32 arithmetic;
    experts with many rows go through torch's matrix product. A gate that the native core does not know, and a
    norm after the experts, are computed by torch between native products.

    Attributes:
        gate: the native core's formula for the gate, or None if it knows none.
        layer: the native core's layer; None without such a formula.
    """

    def __init__(self, layout: ExpertLayout, expert_math: ExpertMath) -> None:
        """Raise FormatError, with the reason, where ``supports`` gives one."""
        reason = self.supports(layout, expert_math)
        if reason is not None:
            raise FormatError(f"the native core cannot compute these experts: {reason}; use ReferenceKernel")
        self._core: Any = native()
        self._math = expert_math
        self._reference = ReferenceKernel(layout, expert_math)
        self._shapes = tuple((*spec.shape, _native_codec(spec)) for spec in layout.fields)
        self._split = len(layout.fields) == 3
        self._hidden, self._intermediate = layout.fields[-1].shape
        self._columns = sum(spec.shape[0] for spec in layout.fields[:-1])
        self._plain_numbers = all(_is_dense(spec) for spec in layout.fields)
        gated = self._columns == 2 * self._intermediate
        self.gate = recognise_gate(expert_math, self._intermediate, gated=gated)
        self.layer = None if self.gate is None else self._native_layer(self.gate)
        self._gate_up_bias_EG = _fp32(expert_math.gate_up_bias_EG)
        self._down_bias_ED = _fp32(expert_math.down_bias_ED)
        self._biased = self._gate_up_bias_EG is not None or self._down_bias_ED is not None

    @staticmethod
    def supports(layout: ExpertLayout, expert_math: ExpertMath) -> str | None:
        """Return why the native core cannot compute such experts, or None if it can."""
        core = native()
        if core is None:
            return "the native core was not built"
        formats = _formats(str(core.kernels_name()))
        for spec in layout.fields:
            if spec.transposed:
                return f"{spec.name} is stored as (in, out)"
            if _native_codec(spec) not in formats:
                return f"there is no kernel for {spec.codec} ({spec.name})"
        firsts = layout.fields[:-1]
        if len({_activation_group(spec) for spec in firsts}) > 1:
            return f"gate ({firsts[0].codec}) and up ({firsts[1].codec}) round activations differently"
        return None

    @property
    def fused(self) -> bool:
        """Whether one native call computes an expert from end to end, without torch in between."""
        return self.layer is not None and self._math.post_norm is None

    def bind(self, raws: Sequence[Tensor]) -> NativeWeights:
        """Return one expert over its raw bytes (uint8, one tensor per field), which stay alive with it."""
        matrices = tuple(
            self._core.Matrix(raw.data_ptr(), rows, columns, codec)
            for raw, (rows, columns, codec) in zip(raws, self._shapes, strict=True)
        )
        return NativeWeights(matrices, self._reference.bind(raws), tuple(raws))

    def __call__(self, x_ND: Tensor, weights: NativeWeights, expert: int) -> Tensor:
        """Return ``[N, D]`` in fp32: the output of ``expert`` for its rows, not yet weighted."""
        token_P = torch.arange(len(x_ND))
        return self.pairs(x_ND, token_P, (0, len(x_ND)), [weights], [expert])

    def pairs(
        self,
        x_TD: Tensor,
        token_P: Tensor,
        starts: Sequence[int],
        weights: Sequence[NativeWeights],
        experts: Sequence[int],
        out_PD: Tensor | None = None,
    ) -> Tensor:
        """Return ``[P, D]`` in fp32: every pair's output, not yet weighted.

        With integer formats a pair's result depends on its own row and expert alone, not on what else is
        computed with it; with plain numbers also on whether its expert has rows enough for torch.

        Args:
            x_TD: rows of all tokens, fp32, bf16 or fp16.
            token_P: row of each pair, int64.
            starts: pairs of the i-th expert are ``starts[i]`` to ``starts[i + 1]``; the first is 0.
            weights: bound weights of the experts.
            experts: their ids, which choose the biases.
            out_PD: where to write, contiguous fp32; by default a new tensor.
        """
        x_TD = x_TD.contiguous() if x_TD.dtype in _DTYPES else x_TD.float().contiguous()
        token_P = token_P.contiguous()
        pairs = len(token_P)
        y_PD = torch.empty(pairs, self._hidden) if out_PD is None else out_PD
        for first, last, by_torch in self._runs(starts, _TORCH_FROM_ROWS[x_TD.dtype]):
            rows = slice(starts[first], starts[last])
            part = _Part(
                x_TD,
                token_P[rows],
                [start - starts[first] for start in starts[first : last + 1]],
                weights[first:last],
                experts[first:last],
                y_PD[rows],
            )
            if by_torch:
                self._by_torch(part)
            elif self.layer is not None:
                self._fused(part)
            else:
                self._in_steps(part)
        return y_PD

    def add(self, x_TD: Tensor, grouping: Grouping, weights: Sequence[NativeWeights], out_TD: Tensor) -> None:
        """Add all pairs' weighted outputs to their tokens' rows of ``out_TD`` (fp32), in their order.

        Only where the kernel is :attr:`packed`. The bits are those of :meth:`pairs` and ``sums.accumulate``.
        """
        x_TD = x_TD.contiguous() if x_TD.dtype in _DTYPES else x_TD.float().contiguous()
        token_P, weight_P1 = grouping.token_P.contiguous(), grouping.weight_P1.contiguous()
        assert out_TD.is_contiguous() and out_TD.dtype == weight_P1.dtype == torch.float32
        self._core.experts_sums(
            self.layer,
            x_TD.data_ptr(),
            _DTYPES[x_TD.dtype],
            len(x_TD),
            token_P.data_ptr(),
            grouping.starts,
            [self.expert(w, e) for w, e in zip(weights, grouping.experts, strict=True)],
            weight_P1.data_ptr(),
            out_TD.data_ptr(),
        )

    @property
    def adder(self) -> Adder | None:
        """:meth:`add`, where outputs need not be held."""
        return self.add if self.packed else None

    @property
    def packed(self) -> bool:
        """Whether the native core alone computes these experts, without a plain copy of any weight."""
        return self.fused and not self._plain_numbers

    @property
    def reusable(self) -> bool:
        """Whether bound weights serve any expert that comes to lie where the first one lay, of any layer."""
        return self.packed and not self._biased

    def scratch_bytes(self, tokens: int, pairs: int) -> int:
        """Return what the native core keeps in memory for calls of up to so many tokens and pairs."""
        layer = self.layer or self._native_layer(GateForm("identity"))
        nowhere = 64  # the sizes are asked for, no weight is read
        matrices = [self._core.Matrix(nowhere, rows, columns, codec) for rows, columns, codec in self._shapes]
        return int(self._core.experts_scratch_bytes(layer, self._core.Expert(matrices), tokens, pairs))

    def _native_layer(self, gate: GateForm) -> Any:
        return self._core.MoELayer(
            self._hidden, self._intermediate, gate.name, gate.alpha, gate.limit, self._math.interleaved
        )

    def _runs(self, starts: Sequence[int], torch_from: int) -> list[tuple[int, int, bool]]:
        """Neighbouring experts that are computed the same way: first, past the last, whether by torch."""
        runs: list[tuple[int, int, bool]] = []
        for index in range(len(starts) - 1):
            by_torch = self._plain_numbers and starts[index + 1] - starts[index] >= torch_from
            if runs and runs[-1][2] == by_torch:
                runs[-1] = (runs[-1][0], index + 1, by_torch)
            else:
                runs.append((index, index + 1, by_torch))
        return runs

    def expert(self, weights: NativeWeights, expert: int) -> Any:
        """Return the native core's expert; valid as long as ``weights``."""
        key = expert if self._biased else -1
        bound = weights.experts.get(key)
        if bound is None:
            biases = (_row_address(self._gate_up_bias_EG, key), _row_address(self._down_bias_ED, key))
            bound = weights.experts[key] = self._core.Expert(list(weights.matrices), *biases)
        return bound

    def _by_torch(self, part: "_Part") -> None:
        self._reference.pairs(
            part.x_TD, part.token_P, part.starts, [w.dense for w in part.weights], part.experts, part.y_PD
        )

    def _fused(self, part: "_Part") -> None:
        self._core.experts_forward(
            self.layer,
            part.x_TD.data_ptr(),
            _DTYPES[part.x_TD.dtype],
            len(part.x_TD),
            part.token_P.data_ptr(),
            part.starts,
            [self.expert(w, e) for w, e in zip(part.weights, part.experts, strict=True)],
            part.y_PD.data_ptr(),
        )
        if self._math.post_norm is not None and len(part.y_PD):
            part.y_PD.copy_(self._math.post_norm(part.y_PD))

    def _in_steps(self, part: "_Part") -> None:
        math_ = self._math
        h_PG = torch.empty(len(part.token_P), self._columns)
        for index in range(len(self._shapes) - 1):
            self._products(part, index, part.x_TD, part.token_P, h_PG[:, index * self._intermediate :])
        if self._split and math_.interleaved:
            h_PG = h_PG.unflatten(-1, (2, self._intermediate)).transpose(-1, -2).flatten(-2)
        if self._gate_up_bias_EG is not None:
            h_PG += part.bias(self._gate_up_bias_EG)
        h_PF = math_.apply_gate(h_PG).float().contiguous()
        self._products(part, -1, h_PF, None, part.y_PD)
        if self._down_bias_ED is not None:
            part.y_PD.add_(part.bias(self._down_bias_ED))
        if math_.post_norm is not None and len(part.y_PD):
            part.y_PD.copy_(math_.post_norm(part.y_PD))

    def _products(self, part: "_Part", index: int, x: Tensor, token_P: Tensor | None, y: Tensor) -> None:
        self._core.grouped_products(
            [w.matrices[index] for w in part.weights],
            x.data_ptr(),
            _DTYPES[x.dtype],
            len(x),
            0 if token_P is None else token_P.data_ptr(),
            part.starts,
            y.data_ptr(),
            y.stride(0),
        )


@dataclass(slots=True)
class _Part:
    """Arguments of ``NativeKernel.pairs`` for neighbouring experts, the first pair counted 0."""

    x_TD: Tensor
    token_P: Tensor
    starts: list[int]
    weights: Sequence[NativeWeights]
    experts: Sequence[int]
    y_PD: Tensor

    def bias(self, bias_EX: Tensor) -> Tensor:
        """The expert's bias for each pair, ``[P, X]``."""
        counts = torch.tensor([b - a for a, b in zip(self.starts, self.starts[1:], strict=False)])
        return bias_EX[torch.tensor(list(self.experts))].repeat_interleave(counts, dim=0)


def _is_dense(spec: FieldSpec) -> bool:
    return isinstance(get_codec(spec.codec), DenseCodec)


def _native_codec(spec: FieldSpec) -> str:
    """The native core's name of a codec: ``ggml:F16`` and the like are plain numbers."""
    codec = get_codec(spec.codec)
    return dense_codec_name(codec.stored) if isinstance(codec, DenseCodec) else spec.codec


def _activation_group(spec: FieldSpec) -> int:
    """Columns that share an activation scale; 0 for plain numbers, which use none."""
    if _is_dense(spec):
        return 0
    if spec.codec.startswith("samoyeds16:"):
        return _SPARSE_GROUP if "/int" in spec.codec else 0
    if spec.codec.startswith("ggml:") and spec.codec.endswith("_K"):
        return _SUPER_GROUP
    group = spec.codec.rpartition("g")[2].rstrip("zd")
    return int(group) if spec.codec.startswith("tile16:int") else 32


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to("cpu", torch.float32).contiguous()


def _row_address(bias_EX: Tensor | None, expert: int) -> int:
    return 0 if bias_EX is None or expert < 0 else bias_EX[expert].data_ptr()

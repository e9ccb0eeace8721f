"""The experts of a layer for learning: the teacher's as stored, the student's as what pruning has kept.

Shapes: T tokens, K experts of a token, P = T * K pairs, ordered by expert, N pairs of one expert, D hidden,
O and I outputs and inputs of a matrix, Z kept weights of a matrix.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gangline.compress.sparsify.expert import ExpertForm, PackedExpert


class KeptWeights(nn.Module):
    """A matrix of which only what pruning has kept learns; its zeros are not stored in fp32.

    Args:
        weight_OI: the pruned matrix.
        dtype: that it is multiplied in.
    """

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.place_Z = weight_OI.flatten().nonzero()[:, 0].to(torch.int32)
        self.values = nn.Parameter(weight_OI.flatten()[self.place_Z].to(torch.float32))
        self.matrix_OI = weight_OI.to(dtype)

    def forward(self) -> Tensor:
        """The matrix ``(out, in)`` as the values are now; valid until the next call."""
        found: Tensor = _Spread.apply(self.values, self)  # type: ignore[no-untyped-call]
        return found


class _Spread(torch.autograd.Function):
    """Write the kept values into the matrix; take their gradients out of the matrix's."""

    @staticmethod
    def forward(ctx: Any, values_Z: Tensor, kept: KeptWeights) -> Tensor:
        ctx.kept = kept
        matrix_OI = kept.matrix_OI
        matrix_OI.view(-1).scatter_(0, kept.place_Z.long(), values_Z.to(matrix_OI.dtype))
        return matrix_OI.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].reshape(-1).index_select(0, ctx.kept.place_Z).float(), None


class _Reorder(torch.autograd.Function):
    """Rows in another order. Its gradient is gathered too, where indexing would add row by row."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, order_P: Tensor, inverse_P: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_P)
        return x_PD.index_select(0, order_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_P,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_P), None, None


class Bank(nn.Module):
    """Computes the experts of a layer in the place of the model's own; to be installed there.

    Args:
        form: their arithmetic.
        experts: how many there are.
        dtype: of the products.
    """

    def __init__(self, form: ExpertForm, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._form, self._experts, self._dtype = form, experts, dtype

    def matrices(self, expert: int) -> list[Tensor]:
        """Matrices ``(out, in)`` of one expert, down last."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """What the chosen experts put out, weighted and summed."""
        tokens, slots = ids_TK.shape
        ids_P = ids_TK.flatten().clamp(max=self._experts)  # a higher number marks an empty slot
        order_P = ids_P.argsort(stable=True)
        inverse_P = order_P.argsort()
        counts = torch.bincount(ids_P, minlength=self._experts + 1).tolist()
        x_PD = x_TD.to(self._dtype)[:, None].expand(-1, slots, -1).reshape(tokens * slots, -1)
        parts = list(self._reorder(x_PD, order_P, inverse_P).split(counts))
        outs = [self._output(expert, x_ND) for expert, x_ND in enumerate(parts[:-1]) if len(x_ND)]
        y_PD = self._reorder(torch.cat([*outs, torch.zeros_like(parts[-1])]), inverse_P, order_P)
        y_TKD = y_PD.view(tokens, slots, -1) * weights_TK[:, :, None]
        return y_TKD.sum(dim=1).to(x_TD.dtype)

    def _output(self, expert: int, x_ND: Tensor) -> Tensor:
        *firsts, down_DF = self.matrices(expert)
        h_NF = self._form.intermediate(firsts, x_ND, expert).to(self._dtype)
        return self._form.output(down_DF, h_NF, expert)

    @staticmethod
    def _reorder(x_PD: Tensor, order_P: Tensor, inverse_P: Tensor) -> Tensor:
        found: Tensor = _Reorder.apply(x_PD, order_P, inverse_P)  # type: ignore[no-untyped-call]
        return found


class TeacherBank(Bank):
    """The experts before pruning, which do not learn."""

    def __init__(self, form: ExpertForm, teachers: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        super().__init__(form, len(teachers), dtype)
        self._teachers = teachers

    def matrices(self, expert: int) -> list[Tensor]:
        """Matrices ``(out, in)`` of one expert, down last."""
        return [weight.to(self._dtype) for weight in self._teachers[expert]]


class StudentBank(Bank):
    """The pruned experts, of which every kept weight learns."""

    def __init__(self, form: ExpertForm, students: Sequence[PackedExpert], dtype: torch.dtype) -> None:
        super().__init__(form, len(students), dtype)
        self.students = nn.ModuleList(
            nn.ModuleList(KeptWeights(weight, dtype) for weight in student.weights()) for student in students
        )

    def matrices(self, expert: int) -> list[Tensor]:
        """Matrices ``(out, in)`` of one expert as they are now, down last."""
        return [matrix() for matrix in self._kept(expert)]

    def learned(self) -> Iterator[list[Tensor]]:
        """The matrices in fp32, expert by expert."""
        for expert in range(len(self.students)):
            found = []
            for kept in self._kept(expert):
                weight_OI = torch.zeros(kept.matrix_OI.shape)
                weight_OI.view(-1)[kept.place_Z] = kept.values.detach()
                found.append(weight_OI)
            yield found

    def _kept(self, expert: int) -> list[KeptWeights]:
        matrices = self.students[expert]
        assert isinstance(matrices, nn.ModuleList)
        return [matrix for matrix in matrices if isinstance(matrix, KeptWeights)]

"""What other folders do with a block; each call goes to the block's adapter."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import dense_codec_name, get_codec
from gangline.kernels.reference import ExpertMath
from gangline.models.view import ExpertsForward, MoEBlock, Undo


def install(block: MoEBlock, forward: ExpertsForward) -> Undo:
    """Make the block compute its experts through ``forward(x_TD, ids_TK, weights_TK) -> y_TD``.

    The router stays the model's own. An id outside ``[0, E)`` marks an empty slot that ``forward`` must skip.
    The returned function puts the former implementation back.
    """
    return block.adapter.install(block, forward)


def expert_math(block: MoEBlock) -> ExpertMath:
    """Return what the block's experts compute besides their matrices: gate function, biases, norm."""
    return block.adapter.math(block)


def stored_fields(block: MoEBlock, dtype: torch.dtype) -> ExpertLayout:
    """Return the layout of one expert as the module holds it, in a dense codec of ``dtype``."""
    codec = dense_codec_name(dtype)
    return ExpertLayout(
        tuple(
            FieldSpec(field.name, field.shape, codec, get_codec(codec).nbytes(field.shape), field.transposed)
            for field in block.fields
        )
    )


def expert_tensors(block: MoEBlock, expert: int) -> tuple[Tensor, ...]:
    """Return the module's own matrices of one expert in field order; they share the module's memory."""
    return block.adapter.expert_tensors(block, expert)


def drop_expert_params(block: MoEBlock) -> None:
    """Free the module's expert matrices and remove their keys from its state dict; biases stay."""
    block.adapter.drop(block)


def restore_expert_params(block: MoEBlock, experts: Iterable[tuple[Tensor, ...]]) -> None:
    """Give the module its matrices back: one tuple per expert in ascending id, fields in order, as stored."""
    block.adapter.restore(block, experts)

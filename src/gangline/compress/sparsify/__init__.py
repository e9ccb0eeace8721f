"""Sparsify the experts of a MoE under the two-level pattern of Samoyeds, one layer after the other."""

from gangline.compress.sparsify.distill import (
    DistillReport,
    distill_student,
    make_student,
    make_teacher,
    product_dtype,
)
from gangline.compress.sparsify.expert import PackedExpert, PrunedMatrix
from gangline.compress.sparsify.layers import Sink, sparsify_layers, walk_texts
from gangline.compress.sparsify.report import ExpertReport, LayerReport, MatrixReport
from gangline.compress.sparsify.settings import METHODS, Method, SparsifySettings
from gangline.compress.sparsify.walk import LayerWalk
from gangline.compress.sparsify.writers import DenseWriter, PackedWriter

__all__ = [
    "METHODS",
    "DenseWriter",
    "DistillReport",
    "ExpertReport",
    "LayerReport",
    "LayerWalk",
    "MatrixReport",
    "Method",
    "PackedExpert",
    "PackedWriter",
    "PrunedMatrix",
    "Sink",
    "SparsifySettings",
    "distill_student",
    "make_student",
    "make_teacher",
    "product_dtype",
    "sparsify_layers",
    "walk_texts",
]

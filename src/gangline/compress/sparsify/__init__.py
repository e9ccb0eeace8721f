"""Sparsify the experts of a MoE under the two-level pattern of Samoyeds, one layer after the other."""

from gangline.compress.sparsify.layers import sparsify_layers, walk_texts
from gangline.compress.sparsify.report import ExpertReport, LayerReport, MatrixReport
from gangline.compress.sparsify.settings import METHODS, Method, SparsifySettings
from gangline.compress.sparsify.walk import LayerWalk
from gangline.compress.sparsify.writers import DenseWriter, PackedWriter

__all__ = [
    "METHODS",
    "DenseWriter",
    "ExpertReport",
    "LayerReport",
    "LayerWalk",
    "MatrixReport",
    "Method",
    "PackedWriter",
    "SparsifySettings",
    "sparsify_layers",
    "walk_texts",
]

"""Turn a dense Llama-like model into a Mixture-of-Experts model that plain transformers loads."""

from gangline.compress.dense_to_moe.convert import convert_dense
from gangline.compress.dense_to_moe.distill import distill
from gangline.compress.dense_to_moe.layer import DenseFFN, FitConfig, LayerPlan, LowRank, fit_layer
from gangline.compress.dense_to_moe.source import load_dense
from gangline.compress.dense_to_moe.stream import fit_layers
from gangline.compress.dense_to_moe.writer import complete_folder, write_mixtral
from gangline.compress.distillation import DistillConfig

__all__ = [
    "DenseFFN",
    "DistillConfig",
    "FitConfig",
    "LayerPlan",
    "LowRank",
    "complete_folder",
    "convert_dense",
    "distill",
    "fit_layer",
    "fit_layers",
    "load_dense",
    "write_mixtral",
]

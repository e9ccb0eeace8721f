"""One view of every MoE family in transformers: blocks, routers, layouts, and where our experts plug in."""

from gangline.models.access import (
    drop_expert_params,
    expert_math,
    expert_tensors,
    install,
    restore_expert_params,
    stored_fields,
)
from gangline.models.chunking import is_chunk_safe
from gangline.models.conformance import check_conformance
from gangline.models.detect import find_moe
from gangline.models.resident import resident_forward
from gangline.models.router import RouterSpec, Selection, select
from gangline.models.view import ExpertsForward, MoEBlock, MoEView, Undo

__all__ = [
    "ExpertsForward",
    "MoEBlock",
    "MoEView",
    "RouterSpec",
    "Selection",
    "Undo",
    "check_conformance",
    "drop_expert_params",
    "expert_math",
    "expert_tensors",
    "find_moe",
    "install",
    "is_chunk_safe",
    "resident_forward",
    "restore_expert_params",
    "select",
    "stored_fields",
]

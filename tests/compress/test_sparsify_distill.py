"""Pruned experts learn: the banks are the model and its pruned twin, and the student comes nearer."""

import pytest
import torch

from compress.sparsify_rig import save_tiny
from gangline.checkpoint.locate import LocalCheckpoint
from gangline.compress.sparsify import (
    LayerWalk,
    PackedExpert,
    SparsifySettings,
    distill_experts,
    sparsify_layers,
    two_banks,
)
from gangline.runtime.opened import open_model


def pruned(folder, ids_SC: torch.Tensor):
    """The opened model, and its pruned experts by layer and number."""
    opened = open_model(LocalCheckpoint(str(folder), folder, None), torch.float32)
    settings, experts = SparsifySettings(method="magnitude", precision="bf16"), {}
    model, view = opened.load_dense(None)

    def keep(key, matrices) -> None:
        experts[key] = PackedExpert(matrices, settings.codec)

    list(sparsify_layers(LayerWalk(model.eval(), view, ids_SC), opened.source, settings, keep))
    return opened, experts


def banked(opened, experts):
    """The model with both kinds of experts, and its banks."""
    model, view = opened.load_dense(None)
    banks = [
        two_banks(block, opened.source, [e for key, e in experts.items() if key.layer == block.layer])
        for block in view.blocks
    ]
    return model.eval(), banks


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_teacher_is_the_model(family: str, tmp_path, seed) -> None:
    plain = save_tiny(family, tmp_path, seed, torch.float32)
    ids_SC = torch.randint(3, 90, (2, 24))
    model, banks = banked(*pruned(tmp_path, ids_SC))
    with torch.no_grad():
        expected = plain(ids_SC).logits
        student = model(ids_SC).logits
        for bank in banks:
            bank.teacher = True
        teacher = model(ids_SC).logits
    assert (teacher - expected).norm() < 1e-4 * expected.norm()
    assert (student - expected).norm() > 1e-3 * expected.norm()


def test_learning_brings_the_student_nearer(tmp_path, seed) -> None:
    save_tiny("mixtral", tmp_path, seed)
    ids_SC = torch.randint(3, 90, (4, 24))
    opened, experts = pruned(tmp_path, ids_SC)
    model, banks = banked(opened, experts)
    seen: list[int] = []
    report = distill_experts(
        model, banks, ids_SC, 20 * 2048, on_step=lambda step, steps, loss: seen.append(step)
    )
    assert seen == list(range(1, len(seen) + 1))
    assert len(report.losses) == 10
    assert report.losses[-1] < 0.9 * report.losses[0]

"""A pruned model learns: teacher and student are the model before and after, and the student comes nearer."""

import pytest
import torch
from torch import nn

from compress.sparsify_rig import save_tiny
from gangline.checkpoint.locate import LocalCheckpoint
from gangline.compress.sparsify import (
    LayerWalk,
    PackedExpert,
    SparsifySettings,
    distill,
    distill_student,
    make_student,
    make_teacher,
    sparsify_layers,
)
from gangline.compress.sparsify.banks import KeptWeights
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


def pair(opened, experts, dtype: torch.dtype = torch.float32):
    """Teacher and student."""
    teacher = make_teacher(*opened.load_dense(None), opened.source, dtype)

    def of_layer(layer: int) -> list[PackedExpert]:
        return [expert for key, expert in experts.items() if key.layer == layer]

    model, view = opened.load_dense(None)
    return teacher, make_student(model, view, opened.source, of_layer, dtype, lambda name, shape: True)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_the_teacher_is_the_model(family: str, tmp_path, seed) -> None:
    plain = save_tiny(family, tmp_path, seed, torch.float32)
    ids_SC = torch.randint(3, 90, (2, 24))
    teacher, student = pair(*pruned(tmp_path, ids_SC))
    with torch.no_grad():
        expected = plain(ids_SC).logits
        assert (teacher(ids_SC).logits - expected).norm() < 1e-4 * expected.norm()
        assert (student.model(ids_SC).logits - expected).norm() > 1e-3 * expected.norm()


def test_gradients_are_those_of_the_plain_arithmetic(tmp_path, seed) -> None:
    """Of what goes in, and of every kept weight, against matrices that autograd knows in full."""
    save_tiny("mixtral", tmp_path, seed, torch.float32)
    opened, experts = pruned(tmp_path, torch.randint(3, 90, (2, 24)))
    bank = pair(opened, experts)[1].banks[0]
    matrices = [[matrix.requires_grad_() for matrix in expert] for expert in bank.learned()]
    count, tokens = len(matrices), 40
    x_TD = torch.randn(tokens, matrices[0][0].shape[1], requires_grad=True)
    ids_TK = torch.rand(tokens, count + 1).topk(2, dim=1).indices  # the number `count` marks an empty slot
    weights_TK = torch.rand(tokens, 2, requires_grad=True)
    goal_TD = torch.randn_like(x_TD)

    def by_hand() -> torch.Tensor:
        out_TD = torch.zeros_like(x_TD)
        for expert, (gate_FD, up_FD, down_DF) in enumerate(matrices):
            y_TD = (nn.functional.silu(x_TD @ gate_FD.t()) * (x_TD @ up_FD.t())) @ down_DF.t()
            out_TD = out_TD + y_TD * (weights_TK * (ids_TK == expert)).sum(dim=1, keepdim=True)
        return out_TD

    values = [kept.values for kept in bank.modules() if isinstance(kept, KeptWeights)]
    places = [kept.place_Z for kept in bank.modules() if isinstance(kept, KeptWeights)]
    flat = [matrix for expert in matrices for matrix in expert]
    ours = torch.autograd.grad((bank(x_TD, ids_TK, weights_TK) * goal_TD).sum(), [x_TD, weights_TK, *values])
    plain = torch.autograd.grad(
        (by_hand() * goal_TD).sum(), [x_TD, weights_TK, *flat], allow_unused=True, materialize_grads=True
    )
    expected = [*plain[:2], *(grad.flatten()[at] for grad, at in zip(plain[2:], places, strict=True))]
    for one, other in zip(ours, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_what_learns_and_what_stays(tmp_path, seed) -> None:
    save_tiny("qwen2_moe", tmp_path, seed)
    ids_SC = torch.randint(3, 90, (4, 24))
    teacher, student = pair(*pruned(tmp_path, ids_SC))
    before = {name: value.clone() for name, value in student.model.named_parameters()}
    distill_student(teacher, student, ids_SC, 960)
    changed = {n for n, v in student.model.named_parameters() if not torch.equal(v, before[n])}
    assert changed <= set(student.dense)
    assert any("self_attn" in name for name in changed)
    assert any("shared_expert" in name for name in changed)
    assert not any(word in name for name in changed for word in ("embed", "lm_head", "mlp.gate."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learning_brings_the_student_nearer(dtype: torch.dtype, tmp_path, seed, monkeypatch) -> None:
    monkeypatch.setattr(distill, "RATE", 0.003)  # a tiny model bears larger steps
    save_tiny("mixtral", tmp_path, seed)
    ids_SC = torch.randint(3, 90, (4, 24))
    teacher, student = pair(*pruned(tmp_path, ids_SC), dtype)
    zeros = [[matrix == 0 for matrix in expert] for bank in student.banks for expert in bank.learned()]
    seen: list[int] = []
    report = distill_student(
        teacher,
        student,
        ids_SC,
        20 * 2048,
        dtype=dtype,
        on_step=lambda step, steps, loss: seen.append(step),
    )
    assert seen == list(range(1, len(seen) + 1))
    assert len(report.losses) == 10
    assert report.losses[-1] < 0.9 * report.losses[0]
    learned = [expert for bank in student.banks for expert in bank.learned()]
    for expert, masks in zip(learned, zeros, strict=True):
        assert not any(matrix[mask].any() for matrix, mask in zip(expert, masks, strict=True))


def test_a_share_of_the_text_brings_the_student_nearer_to_it(tmp_path, seed, monkeypatch) -> None:
    """Than the teacher alone does, which has never seen it."""
    monkeypatch.setattr(distill, "RATE", 0.003)
    save_tiny("mixtral", tmp_path, seed)
    ids_SC = torch.randint(3, 90, (4, 24))
    opened, experts = pruned(tmp_path, ids_SC)
    found = []
    for text in (0.0, 0.5):
        teacher, student = pair(opened, experts)
        distill_student(teacher, student, ids_SC, 20 * 2048, text=text)
        with torch.no_grad():
            logits_TV = student.model(ids_SC).logits[:, :-1].flatten(0, 1)
        found.append(float(nn.functional.cross_entropy(logits_TV, ids_SC[:, 1:].flatten())))
    assert found[1] < found[0]

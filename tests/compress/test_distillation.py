"""The losses, against their definitions, and learning that is interrupted and goes on."""

import torch
from torch import nn

from gangline.compress.distillation import DistillConfig, Progress, Said, distance, divergence, learn


def test_divergence_and_its_gradient(seed) -> None:
    torch.manual_seed(seed)
    student_TV = (3 * torch.randn(150, 70)).requires_grad_()
    teacher_TV = 3 * torch.randn(150, 70)
    expected = nn.functional.kl_div(
        student_TV.log_softmax(-1), teacher_TV.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    found = divergence(student_TV, teacher_TV)
    torch.testing.assert_close(found, expected)
    (ours,) = torch.autograd.grad(2 * found, student_TV)
    (theirs,) = torch.autograd.grad(2 * expected, student_TV)
    torch.testing.assert_close(ours, theirs)


def test_the_text_takes_its_share_of_the_gradient(seed) -> None:
    """That of the mixed cross-entropies; where the text ends, the teacher alone decides."""
    torch.manual_seed(seed)
    student_TV = (3 * torch.randn(150, 70)).requires_grad_()
    teacher_TV = 3 * torch.randn(150, 70)
    next_T = torch.randint(0, 70, (150,))
    next_T[::10] = -1
    found = divergence(student_TV, teacher_TV, next_T, 0.3)
    torch.testing.assert_close(found, divergence(student_TV, teacher_TV))
    goal_TV = teacher_TV.softmax(-1)
    inside = next_T >= 0
    goal_TV[inside] = 0.7 * goal_TV[inside] + 0.3 * nn.functional.one_hot(next_T[inside], 70)
    expected = nn.functional.cross_entropy(student_TV, goal_TV)
    (ours,) = torch.autograd.grad(found, student_TV)
    (theirs,) = torch.autograd.grad(expected, student_TV)
    torch.testing.assert_close(ours, theirs)


def test_distance_counts_every_token_the_same(seed) -> None:
    torch.manual_seed(seed)
    teacher = [torch.randn(2, 5, 8) * 10.0 ** torch.randint(-2, 3, (2, 5, 1)) for _ in range(3)]
    student = [tensor * 1.5 for tensor in teacher]
    torch.testing.assert_close(distance(student, teacher), torch.tensor(0.25))
    torch.testing.assert_close(distance(teacher, teacher), torch.tensor(0.0))


def test_large_gradients_are_scaled_down(seed) -> None:
    """To a norm of all parameters together; smaller ones stay."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 20, (2, 6), generator=generator)]
    teacher_VV, start_VV = torch.randn(2, 20, 20, generator=generator)

    def gradients(clip: float) -> list[torch.Tensor]:
        """Of a table and of a bias; Adam's mean of one step is a tenth of them."""
        parameters = [nn.Parameter(start_VV.clone()), nn.Parameter(torch.ones(20))]
        kept: list[Progress] = []

        def speak(ids_BC: torch.Tensor, teacher: bool) -> Said:
            logits_VV = teacher_VV if teacher else parameters[0] + parameters[1]
            return Said(logits_VV[ids_BC].flatten(0, 1))

        learn(parameters, speak, batches, DistillConfig(steps=1, rate=0.05, clip=clip), kept.append)
        return [10 * mean for mean, _ in kept[-1].moments]

    free = gradients(0.0)
    norm = float(torch.cat([gradient.flatten() for gradient in free]).norm())
    for one, other in zip(gradients(norm / 4), free, strict=True):
        torch.testing.assert_close(one, other / 4, rtol=1e-3, atol=1e-6)
    for one, other in zip(gradients(norm * 4), free, strict=True):
        torch.testing.assert_close(one, other)


def test_learning_goes_on_where_it_stopped(seed) -> None:
    """Stopped after some steps and begun again from what was kept: the very same parameters."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 20, (2, 6), generator=generator) for _ in range(9)]
    teacher_VV, start_VV = torch.randn(2, 20, 20, generator=generator)
    config = DistillConfig(steps=9, rate=0.05, warmup=3)

    def run(weight: nn.Parameter, steps: int, begun: Progress | None = None) -> Progress:
        kept: list[Progress] = []

        def speak(ids_BC: torch.Tensor, teacher: bool) -> Said:
            return Said((teacher_VV if teacher else weight)[ids_BC].flatten(0, 1))

        learn([weight], speak, batches[:steps], config, kept.append, begun)
        return kept[-1]

    whole, parted = nn.Parameter(start_VV.clone()), nn.Parameter(start_VV.clone())
    expected = run(whole, 9)
    found = run(parted, 9, run(parted, 4))
    assert torch.equal(whole, parted)
    assert found.losses == expected.losses
    assert found.step == 9
    assert not torch.equal(whole, start_VV)

"""What students are taught, where the teacher is known: a denoiser of a Gaussian."""

import pytest
import torch
from torch import Tensor

from diffusion_policy.diffusion.distillation import Ladder, agree_along, follow, halve_steps, repeat_pairs
from diffusion_policy.diffusion.process import Noising
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.diffusion.schedules import choose_levels, cosine

SCHEDULE = cosine(40)
B = 64
SPREAD = 0.5


def teacher(xt: Tensor, level: Tensor) -> Tensor:
    """E[x0 | xt] of data N(0, SPREAD²)."""
    alpha, sigma = (table[level].float()[:, None] for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    return alpha * SPREAD**2 * xt / (alpha**2 * SPREAD**2 + sigma**2)


def randn(seed: int = 0) -> Tensor:
    return torch.randn(B, 3, generator=torch.Generator().manual_seed(seed))


def ladder(steps: int) -> Ladder:
    return Ladder(SCHEDULE, choose_levels(SCHEDULE, steps))


def noising() -> Noising:
    return Noising(torch.arange(B) % 40, randn(1))


def test_a_jump_and_its_solution_are_inverse() -> None:
    rungs, xt, x0 = ladder(8), randn(), randn(1)
    start, end = torch.full((B,), 30), torch.full((B,), 4)
    assert torch.allclose(rungs.solve(xt, rungs.jump(xt, x0, start, end), start, end), x0, atol=1e-4)
    clean = torch.full((B,), -1)
    assert torch.equal(rungs.jump(xt, x0, start, clean), x0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_jumps_of_a_path_lead_to_the_teachers_sequence(steps: int) -> None:
    fine, start = ladder(8), randn()

    def denoise(xt: Tensor, level: int) -> Tensor:
        return teacher(xt, torch.full((B,), level))

    expected = SAMPLERS["ddim"](denoise, start, SCHEDULE, fine.levels)
    coarse = ladder(steps)
    jumped = follow(teacher, start, fine, coarse.levels)
    assert jumped.xts.shape == jumped.x0s.shape == (B, steps, 3)
    xt = start
    for i in range(steps):
        assert torch.allclose(jumped.xts[:, i], xt, atol=1e-4)
        xt = coarse.jump(xt, jumped.x0s[:, i], *(coarse.path[i + j].expand(B) for j in (0, 1)))
    assert torch.allclose(xt, expected, atol=1e-4)
    known = {level: jumped.x0s[:, i] for i, level in enumerate(coarse.levels)}

    def student(xt: Tensor, level: Tensor) -> Tensor:
        return torch.stack([known[int(one)][row] for row, one in enumerate(level)])

    assert repeat_pairs(student, jumped, coarse, noising()).abs().max() < 1e-6
    assert repeat_pairs(lambda *asked: student(*asked) + 0.1, jumped, coarse, noising()).mean() == pytest.approx(0.1)


def test_a_teacher_of_one_step_more_is_met_by_what_two_of_its_jumps_make() -> None:
    fine = ladder(8)

    def student(xt: Tensor, level: Tensor) -> Tensor:
        """Exactly two jumps of the teacher."""
        place = (level[:, None] == fine.path[None]).int().argmax(dim=1)
        middle, end = fine.path[place + 1], fine.path[place + 2]
        between = fine.jump(xt, teacher(xt, level), level, middle)
        return fine.solve(xt, fine.jump(between, teacher(between, middle), middle, end), level, end)

    assert halve_steps(student, teacher, SPREAD * randn(), fine, noising()).max() < 1e-6
    assert halve_steps(teacher, teacher, SPREAD * randn(), fine, noising()).mean() > 1e-3


def test_consistency_holds_for_the_end_of_the_path_alone() -> None:
    path = ladder(8)

    def end_of_path(xt: Tensor, level: Tensor) -> Tensor:
        """The teacher's path from there, to the end."""
        for i in range(len(path)):
            start, end = path.path[i].expand(B), path.path[i + 1].expand(B)
            moved = path.jump(xt, teacher(xt, start), start, end)
            xt = torch.where((level >= start)[:, None], moved, xt)
        return xt

    x0 = SPREAD * randn()
    assert agree_along(end_of_path, teacher, x0, path, noising()).max() < 1e-5
    assert agree_along(teacher, teacher, x0, path, noising()).mean() > 1e-3


def test_targets_pass_no_gradient_but_the_students_own() -> None:
    weight = torch.ones((), requires_grad=True)

    def student(xt: Tensor, level: Tensor) -> Tensor:
        return weight * teacher(xt, level)

    path = ladder(4)
    for errors in (
        agree_along(student, teacher, randn(), path, noising()),
        halve_steps(student, teacher, randn(), path, noising()),
    ):
        (gradient,) = torch.autograd.grad(errors.sum(), weight)
        assert torch.isfinite(gradient)
        assert gradient != 0

"""What students are taught, where the teacher is known: a denoiser of a Gaussian."""

import pytest
import torch
from torch import Tensor

from diffusion_policy.diffusion.distillation import (
    Ladder,
    agree_along,
    find_ends,
    follow,
    halve_steps,
    repeat_pairs,
)
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


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_holds_for_the_end_of_each_stretch_alone(steps: int) -> None:
    path, coarse = ladder(8), ladder(steps)
    ends = find_ends(path, coarse.levels)
    assert ends.unique().tolist() == sorted([*coarse.levels[1:], -1])

    def to_the_end(xt: Tensor, level: Tensor) -> Tensor:
        """The x0 that leads to where the teacher's path is at the end of the stretch."""
        here, at = xt, level
        end = ends[(level[:, None] == path.path[None]).int().argmax(dim=1)]
        for i in range(len(path)):
            start, after = path.path[i].expand(B), path.path[i + 1].expand(B)
            moves = ((at == start) & (at > end))[:, None]
            here = torch.where(moves, path.jump(here, teacher(here, start), start, after), here)
            at = torch.where(moves[:, 0], after, at)
        return path.solve(xt, here, level, end)

    x0 = SPREAD * randn()
    assert agree_along(to_the_end, teacher, x0, path, ends, noising()).max() < 1e-5
    if steps < 8:
        assert agree_along(teacher, teacher, x0, path, ends, noising()).mean() > 1e-4
    xt = sampled = randn(3)  # and it is sampled by DDIM at the coarse levels
    for i in range(8):
        start, after = path.path[i].expand(B), path.path[i + 1].expand(B)
        xt = path.jump(xt, teacher(xt, start), start, after)
    for i in range(steps):
        start, after = coarse.path[i].expand(B), coarse.path[i + 1].expand(B)
        sampled = coarse.jump(sampled, to_the_end(sampled, start), start, after)
    assert torch.allclose(sampled, xt, atol=1e-4)


def test_progressive_errors_are_weighed_by_the_truncated_snr() -> None:
    fine, noises = ladder(8), noising()
    x0 = SPREAD * randn()

    def off(xt: Tensor, level: Tensor) -> Tensor:
        place = (level[:, None] == fine.path[None]).int().argmax(dim=1)
        middle, end = fine.path[place + 1], fine.path[place + 2]
        between = fine.jump(xt, teacher(xt, level), level, middle)
        return fine.solve(xt, fine.jump(between, teacher(between, middle), middle, end), level, end) + 0.1

    found = halve_steps(off, teacher, x0, fine, noises)
    start = fine.path[2 * (noises.level % 4)]
    snr = (SCHEDULE.alpha[start] / SCHEDULE.sigma[start]) ** 2
    assert torch.allclose(found, 0.01 * snr.clamp(min=1).float(), rtol=1e-3)


def test_targets_pass_no_gradient_but_the_students_own() -> None:
    weight, frozen = torch.ones((), requires_grad=True), torch.ones(())
    path = ladder(4)
    ends = find_ends(path, path.levels[:1])

    def gradient(of_target: Tensor) -> Tensor:
        """With a student that says its target by one weight, and all else by another."""
        calls: list[None] = []

        def student(xt: Tensor, level: Tensor) -> Tensor:
            calls.append(None)
            return (of_target if len(calls) == 1 else weight) * teacher(xt, level) + 0.1 * xt

        errors = agree_along(student, teacher, randn(), path, ends, noising())
        assert len(calls) == 2
        return torch.autograd.grad(errors.sum(), weight)[0]

    assert torch.equal(gradient(weight), gradient(frozen))

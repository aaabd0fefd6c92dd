"""Students of a toy: the same lessons as those of policies, on points that can be seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffusion_policy.diffusion.distillation import (
    Denoiser,
    Ladder,
    agree_along,
    find_ends,
    follow,
    halve_steps,
    repeat_pairs,
    velocity_of,
)
from diffusion_policy.diffusion.objectives import JUMPING, MeanFlow, Shortcut
from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.process import Diffusion
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.training.losses import Draws, derive_generator
from diffusion_policy.training.toy import Fitted, PointNetwork, Points, Problem, fit_by, one_hot

FEW = (1, 2, 4)
"""Steps that students are trained for."""
FOLLOWED = 8
"""Steps by which the teacher is followed."""
STUDENT_STEPS = 1500
"""Training steps of each student."""


def fit_students(problem: Problem, teacher: Fitted, name: str, seed: int = 0) -> Iterator[tuple[int, Fitted]]:
    """(steps, a student for so many), from 4 down to 1. Those of progressive learn from each other, from 8 steps down;
    shortcut and meanflow are one network for all."""
    taught = teacher
    for steps in (2 * FEW[-1], *reversed(FEW)):
        if name == "progressive":
            taught = _fit(problem, taught, name, steps, seed)
        elif steps in FEW and (name not in JUMPING or taught is teacher):
            taught = _fit(problem, teacher, name, steps, seed)
        if steps in FEW:
            yield steps, taught


def _fit(problem: Problem, teacher: Fitted, name: str, steps: int, seed: int) -> Fitted:
    diffusion, loss = LESSONS[name](problem, teacher, steps)
    return fit_by(problem, diffusion, loss, STUDENT_STEPS, seed=seed)


def _denoiser(fitted: Fitted, label: Tensor) -> Denoiser:
    cond = one_hot(label, fitted.classes)
    return fitted.diffusion.decode(lambda xt, level: fitted.network(xt, level, cond))  # pyright: ignore


def _taught(teacher: Fitted, label: Tensor) -> Denoiser:
    return torch.no_grad()(_denoiser(teacher, label))


def _few_steps(problem: Problem, steps: int) -> Diffusion:
    return Diffusion(problem.schedule, PREDICTIONS["sample"], trained_steps=(steps,))


def _levels(diffusion: Diffusion, steps: int) -> list[int]:
    return diffusion.choose_levels(SAMPLERS["ddim"], steps)


Learns = Callable[[Denoiser, Denoiser, Points, Draws], Tensor]


def _by(diffusion: Diffusion, teacher: Fitted, lesson: Learns) -> tuple[Diffusion, Any]:
    """A lesson as the loss of a network."""

    def loss(network: PointNetwork, points: Points, draws: Draws) -> Tensor:
        student = teacher._replace(network=network, diffusion=diffusion)
        return lesson(_denoiser(student, points.label), _taught(teacher, points.label), points, draws)

    return diffusion, loss


def _pairs(problem: Problem, teacher: Fitted, steps: int) -> tuple[Diffusion, Any]:
    diffusion = _few_steps(problem, steps)
    chosen = _levels(diffusion, steps)
    ladder, path = Ladder(problem.schedule, chosen), Ladder(problem.schedule, _levels(teacher.diffusion, FOLLOWED))
    numbers = itertools.count()

    def lesson(student: Denoiser, asked: Denoiser, points: Points, draws: Draws) -> Tensor:
        start = torch.randn(points.x.shape, generator=derive_generator("toy pairs", next(numbers)))
        return repeat_pairs(student, follow(asked, start, path, chosen), ladder, draws.noising)

    return _by(diffusion, teacher, lesson)


def _progressive(problem: Problem, teacher: Fitted, steps: int) -> tuple[Diffusion, Any]:
    fine = Ladder(problem.schedule, _levels(teacher.diffusion, 2 * steps))
    return _by(
        _few_steps(problem, steps),
        teacher,
        lambda student, asked, points, draws: halve_steps(student, asked, points.x, fine, draws.noising),
    )


def _consistency(problem: Problem, teacher: Fitted, steps: int) -> tuple[Diffusion, Any]:
    diffusion, path = _few_steps(problem, steps), Ladder(problem.schedule, _levels(teacher.diffusion, FOLLOWED))
    ends = find_ends(path, _levels(diffusion, steps))
    return _by(
        diffusion,
        teacher,
        lambda student, asked, points, draws: agree_along(student, asked, points.x, path, ends, draws.noising),
    )


def _jumping(problem: Problem, teacher: Fitted, kind: type[Shortcut | MeanFlow]) -> tuple[Diffusion, Any]:
    diffusion = kind(problem.schedule)

    def loss(network: PointNetwork, points: Points, draws: Draws) -> Tensor:
        velocity = velocity_of(_taught(teacher, points.label), diffusion)
        cond = one_hot(points.label, problem.classes)
        return diffusion.loss(network, points.x, cond, draws.noising, velocity)

    return diffusion, loss


LESSONS: dict[str, Callable[[Problem, Fitted, int], tuple[Diffusion, Any]]] = {
    "pairs": _pairs,
    "progressive": _progressive,
    "consistency": _consistency,
    "shortcut": lambda problem, teacher, _: _jumping(problem, teacher, Shortcut),
    "meanflow": lambda problem, teacher, _: _jumping(problem, teacher, MeanFlow),
}

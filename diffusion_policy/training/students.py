"""Students: policies that learn from a trained one to be sampled in few steps. Each way to learn is a loss for the one
trainer (`diffusion.distillation`, `diffusion.objectives`); pairs bring their own batches too.

A student is a policy like any other. How it is sampled stands in its `Diffusion`: a denoiser that is called at the few
levels of its steps, or one that jumps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_policy.config import ConfigError, DistillationConfig, PolicyConfig, SampleConfig
from diffusion_policy.datasets.windows import WHOLE, Batch, Shard, orders, send
from diffusion_policy.diffusion.distillation import (
    Denoiser,
    Jumped,
    Ladder,
    agree_along,
    find_ends,
    follow,
    halve_steps,
    repeat_pairs,
    velocity_of,
)
from diffusion_policy.diffusion.objectives import JUMPING
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import Draws, Loss, derive_generator
from diffusion_policy.training.trainer import BatchesOfWindows

TEACHER_STEPS = 8
MADE_AT_ONCE = 1024
"""Pairs in one call of the teacher."""


def student_options(policy: PolicyConfig, distillation: DistillationConfig) -> PolicyConfig:
    """The options of the policy that learns so; nothing changes without a student. A student predicts what has a
    meaning without signal too. Raises ConfigError for what no student can be."""
    name = distillation.student
    if (distillation.teacher is None) != (name is None):
        raise ConfigError("--teacher and --student belong together")
    if name is None:
        if dataclasses.replace(distillation, guard="warn") != DistillationConfig():
            raise ConfigError("these are options of a student, which has a --teacher and a --student")
        if policy.objective == "denoising" and policy.student_steps:
            raise ConfigError("student-steps are those of a student: give --teacher and --student")
        return policy
    plain = DistillationConfig()
    if name != "pairs" and (distillation.pairs, distillation.pair_noise) != (plain.pairs, plain.pair_noise):
        raise ConfigError(f"--pairs and --pair-noise are options of the student pairs; this one is {name}")
    objective = name if name in JUMPING else "denoising"
    if policy.objective not in ("denoising", objective):
        raise ConfigError(f"the student {name} has the objective {objective}; got --objective {policy.objective}")
    return dataclasses.replace(
        policy,
        objective=objective,
        prediction="sample" if policy.prediction == "noise" else policy.prediction,
        student_steps=policy.student_steps or 1,
        learn_variance=False,
        snr_gamma=0.0,
        max_delay=0,
        condition_dropout=0.0,
    )


class Teacher:
    """A trained policy, asked at levels and observations of a batch. It learns nothing."""

    def __init__(self, policy: DiffusionPolicy, steps: int | None = None) -> None:
        """`steps`: of DDIM by which it is followed. Raises ValueError for those that it cannot take, and for a policy
        that does not denoise."""
        if policy.config.objective != "denoising":
            raise ConfigError(f"a teacher denoises; this one has the objective {policy.config.objective}")
        self.policy = policy.eval().requires_grad_(False)
        usual = None if policy.config.is_few_step else min(TEACHER_STEPS, policy.config.noise_levels - 1)
        self.levels = policy.diffusion.ddim_levels(steps or usual)
        self.sampling = SampleConfig(sampling_steps=len(self.levels))

    def denoiser(self, batch: Batch) -> Denoiser:
        """Clipped as in sampling."""
        policy = self.policy
        cond = policy.encode(batch.observations, batch.labels)
        return policy.decode(lambda xt, level: policy.network(xt, level, cond), self.sampling)  # pyright: ignore


def _denoiser(policy: DiffusionPolicy, batch: Batch | Pair) -> Denoiser:
    """What a student says."""
    cond = policy.encode(batch.observations, batch.labels)
    return policy.diffusion.decode(lambda xt, level: policy.network(xt, level, cond))  # pyright: ignore


def _clean(policy: DiffusionPolicy, batch: Batch) -> Tensor:
    return policy.sequences.normalize(batch.actions, batch.observations)


def _require_on_path(student: DiffusionPolicy, teacher: Teacher) -> None:
    """Raise ConfigError where a student's levels are none of its teacher's."""
    own, taught = student.diffusion.ddim_levels(), teacher.levels
    if own[0] != taught[0]:
        raise ConfigError(
            f"the teacher begins at level {taught[0]}, a student at {own[0]}: one that predicts noise cannot begin "
            "without signal, as with --schedule flow"
        )
    if not {*own} <= {*taught}:
        raise ConfigError(f"teacher-steps must be a multiple of the {len(own)} student-steps; got {len(taught)}")


def pairs_loss(student: DiffusionPolicy, teacher: Teacher) -> Callable[[DiffusionPolicy, Pair, Draws], Tensor]:
    """See `distillation.repeat_pairs`; the pairs are made beforehand."""
    ladder = Ladder(student.diffusion.schedule, student.diffusion.ddim_levels(), student.device)

    def loss(policy: DiffusionPolicy, batch: Pair, draws: Draws) -> Tensor:
        return repeat_pairs(_denoiser(policy, batch), batch.jumped, ladder, draws.to(policy.device).noising)

    return loss


def progressive_loss(student: DiffusionPolicy, teacher: Teacher) -> Loss:
    """See `distillation.halve_steps`. Raises ConfigError for a teacher that does not take twice as many steps."""
    coarse = student.diffusion.ddim_levels()
    try:
        fine = teacher.policy.diffusion.ddim_levels(2 * len(coarse))
    except ValueError as error:
        raise ConfigError(f"the student progressive needs a teacher that takes twice its steps: {error}") from error
    if fine[::2] != coarse:
        raise ConfigError("the student progressive needs a teacher whose first level is its own")
    ladder = Ladder(student.diffusion.schedule, fine, student.device)

    def loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
        asked, learns = teacher.denoiser(batch), _denoiser(policy, batch)
        return halve_steps(learns, asked, _clean(policy, batch), ladder, draws.to(policy.device).noising)

    return loss


def consistency_loss(student: DiffusionPolicy, teacher: Teacher) -> Loss:
    """See `distillation.agree_along`. Raises ConfigError where the student's levels are not on the teacher's path."""
    _require_on_path(student, teacher)
    ladder = Ladder(student.diffusion.schedule, teacher.levels, student.device)
    ends = find_ends(ladder, student.diffusion.ddim_levels())

    def loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
        asked, learns = teacher.denoiser(batch), _denoiser(policy, batch)
        noising = draws.to(policy.device).noising
        return agree_along(learns, asked, _clean(policy, batch), ladder, ends, noising)

    return loss


def jumping_loss(student: DiffusionPolicy, teacher: Teacher) -> Loss:
    """The student's own objective, with the teacher's velocity in place of that of each demonstration and its noise."""

    def loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
        velocity = velocity_of(teacher.denoiser(batch), policy.diffusion)
        cond = policy.encode(batch.observations, batch.labels)
        x0, noising = _clean(policy, batch), draws.to(policy.device).noising
        return policy.diffusion.loss(policy.network, x0, cond, noising, velocity)  # pyright: ignore

    return loss


LOSSES: dict[str, Callable[[DiffusionPolicy, Teacher], Any]] = {
    "pairs": pairs_loss,
    "progressive": progressive_loss,
    "consistency": consistency_loss,
    "shortcut": jumping_loss,
    "meanflow": jumping_loss,
}
"""By the name of the student."""


class Pair(NamedTuple):
    """Observations, and what the teacher made of noise there."""

    observations: dict[str, Tensor]
    """{key: (B, To, ...)}"""
    jumped: Jumped
    """Normalized, (B, student's steps, T, D)."""
    labels: Tensor | None = None
    rows: None = None

    def part(self, first: int, last: int) -> Pair:
        """Some of them."""
        return self.map(lambda values: values[first:last])

    def map(self, change: Callable[[Tensor], Tensor]) -> Pair:
        """The same with every tensor changed."""
        observations = {key: change(values) for key, values in self.observations.items()}
        labels = None if self.labels is None else change(self.labels)
        return Pair(observations, Jumped(*map(change, self.jumped)), labels)


class Pairs:
    """Pairs that were made, as batches for the trainer."""

    def __init__(self, pairs: Pair, action_dim: int) -> None:
        self._pairs, self._action_dim = pairs, action_dim

    def __len__(self) -> int:
        return len(self._pairs.jumped.xts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As those of windows, with raw actions."""
        observations = {key: tuple(values.shape[1:]) for key, values in self._pairs.observations.items()}
        return {**observations, "action": (self._pairs.jumped.xts.shape[2], self._action_dim)}

    def gather(self, indices: Tensor) -> Pair:
        """Some of them."""
        there = send(indices, self._pairs.jumped.xts.device)
        return self._pairs.map(lambda values: values[there])

    def batches(self, batch_size: int, seed: int, first_step: int = 0, shard: Shard = WHOLE) -> Iterator[Pair]:
        """As `Windows.batches`."""
        for indices in orders(len(self), batch_size, seed, first_step, shard):
            yield self.gather(torch.from_numpy(indices))


@torch.no_grad()
def make_pairs(
    student: DiffusionPolicy,
    teacher: Teacher,
    windows: BatchesOfWindows,
    count: int,
    noise: float,
    seed: int,
    on_made: Callable[[int], None] = lambda _: None,
) -> Pairs:
    """So many pairs at the observations of windows, with this much normalized noise on them. Raises ConfigError where
    the student's levels are not on the teacher's path."""
    _require_on_path(student, teacher)
    ladder = Ladder(student.diffusion.schedule, teacher.levels, student.device)
    at_once = min(MADE_AT_ONCE, count, len(windows))
    batches = windows.batches(at_once, seed)
    made: list[Pair] = []
    for number in range(-(-count // at_once)):
        generator = derive_generator("pairs of a student", seed, number)
        batch = _scatter(teacher.policy, next(batches), noise, generator)
        shape = len(batch.actions), *student.sequences.shape
        start = torch.randn(shape, generator=generator).to(student.device)
        jumped = follow(teacher.denoiser(batch), start, ladder, student.diffusion.ddim_levels())
        made.append(Pair({key: batch.observations[key] for key in student.keys}, jumped, batch.labels))
        on_made(min(count, (number + 1) * at_once))
    return Pairs(_join(made).map(lambda values: values[:count]), *student.shapes.action)


def _join(pairs: list[Pair]) -> Pair:
    """All of them, one after the other."""
    first = pairs[0]
    observations = {key: torch.cat([one.observations[key] for one in pairs]) for key in first.observations}
    labels = None if first.labels is None else torch.cat([one.labels for one in pairs if one.labels is not None])
    return Pair(observations, Jumped(*map(torch.cat, zip(*(one.jumped for one in pairs), strict=True))), labels)


def _scatter(policy: DiffusionPolicy, batch: Batch, noise: float, generator: torch.Generator) -> Batch:
    """Observations with noise of this deviation, in normalized numbers; images are left as they are."""
    scattered = {}
    for key in policy.keys:
        scattered[key] = batch.observations[key]
        if key not in policy.images:
            values = policy.normalizer.normalize(key, batch.observations[key])
            drawn = torch.randn(values.shape, generator=generator).to(values)
            scattered[key] = policy.normalizer.unnormalize(key, values + noise * drawn).to(batch.observations[key])
    return batch._replace(observations=scattered)

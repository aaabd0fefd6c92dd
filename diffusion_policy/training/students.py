"""Students: policies that learn from a trained one to be sampled in few steps. Each way to learn is a loss for the one
trainer; pairs bring their own batches too.

A student is a policy like any other. What it is asked for stands in its `Diffusion`: a denoiser that is called at the
few levels of its steps, or one that jumps (`diffusion.objectives`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_policy.config import ConfigError, DistillationConfig, PolicyConfig, SampleConfig
from diffusion_policy.datasets.windows import WHOLE, Batch, Shard, orders
from diffusion_policy.diffusion.objectives import Jumps
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import Draws, Loss, derive_generator
from diffusion_policy.training.trainer import BatchesOfWindows

TEACHER_STEPS = 8
MADE_AT_ONCE = 1024
"""Pairs in one call of the teacher."""
SMOOTH = 0.03
"""Below this the pseudo-Huber loss of consistency is square."""

JUMPING = ("shortcut", "meanflow")
"""Students whose objective is of the same name."""


def student_options(policy: PolicyConfig, distillation: DistillationConfig) -> PolicyConfig:
    """The options of the policy that learns so; nothing changes without a student. A student is told what its teacher
    is told, and predicts what has a meaning without signal too. Raises ConfigError for what no student can be."""
    name = distillation.student
    if (distillation.teacher is None) != (name is None):
        raise ConfigError("--teacher and --student belong together")
    if name is None:
        if policy.objective == "denoising" and policy.student_steps:
            raise ConfigError("student-steps are those of a student: give --teacher and --student")
        return policy
    objective = name if name in JUMPING else "denoising"
    if policy.objective not in ("denoising", objective):
        raise ConfigError(f"the student {name} has the objective {objective}; got --objective {policy.objective}")
    prediction = "sample" if policy.prediction == "noise" and objective == "denoising" else policy.prediction
    return dataclasses.replace(
        policy,
        objective=objective,
        prediction=prediction,
        student_steps=policy.student_steps or 1,
        learn_variance=False,
        snr_gamma=0.0,
        max_delay=0,
        condition_dropout=0.0,
    )


class Teacher:
    """A trained policy, asked at levels and observations of a batch. It learns nothing."""

    def __init__(self, policy: DiffusionPolicy, steps: int | None) -> None:
        """`steps`: of DDIM by which it is followed. Raises ValueError for those that it cannot take."""
        if policy.config.objective != "denoising":
            raise ConfigError(
                f"a teacher denoises at every level; this one has the objective {policy.config.objective}"
            )
        self.policy = policy.eval().requires_grad_(False)
        usual = None if policy.config.is_few_step else TEACHER_STEPS
        self.sampling = policy.complete(SampleConfig(sampling_steps=steps or usual))
        _, self.levels = policy.resolve_sampling(self.sampling)

    def denoiser(self, batch: Batch) -> Callable[[Tensor, Tensor | int], Tensor]:
        """(xt (B, T, D), level of all or of each row) → x0, clipped as in sampling."""
        policy = self.policy
        cond = policy.encode(batch.observations, batch.modes)

        def outputs(xt: Tensor, level: Tensor | int) -> Tensor:
            return policy.network(xt, torch.as_tensor(level, device=xt.device).expand(len(xt)), cond)

        return torch.no_grad()(policy.decode(outputs, self.sampling))  # pyright: ignore


class Ladder:
    """alpha and sigma of levels, −1 for the clean sequence, and what a step of DDIM between them does."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        schedule = policy.diffusion.schedule
        one, zero = schedule.alpha.new_ones(1), schedule.alpha.new_zeros(1)
        tables = torch.cat([schedule.alpha, one]), torch.cat([schedule.sigma, zero])
        self._alpha, self._sigma = (table.float().to(policy.device) for table in tables)

    def at(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each row, (B, 1, 1)."""
        return self._alpha[level][:, None, None], self._sigma[level][:, None, None]

    def step(self, xt: Tensor, x0: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """DDIM from level to level (Song et al. 2021, arXiv 2010.02502, eq. 12)."""
        (alpha, sigma), (next_alpha, next_sigma) = self.at(start), self.at(end)
        return next_alpha * x0 + next_sigma * (xt - alpha * x0) / sigma

    def solve(self, xt: Tensor, there: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The x0 by which `step` leads from xt to `there` (Salimans & Ho 2022, arXiv 2202.00512, appendix G)."""
        (alpha, sigma), (next_alpha, next_sigma) = self.at(start), self.at(end)
        ratio = next_sigma / sigma
        return (there - ratio * xt) / (next_alpha - ratio * alpha)


def _denoiser(policy: DiffusionPolicy, batch: Batch | Pair) -> Callable[[Tensor, Tensor], Tensor]:
    """What a student says, with its gradients: (xt, level of each row) → x0."""
    cond = policy.encode(batch.observations, batch.modes)
    return policy.diffusion.decode(lambda xt, level: policy.network(xt, level, cond))  # pyright: ignore


def _noised(policy: DiffusionPolicy, ladder: Ladder, batch: Batch, draws: Draws, level: Tensor) -> Tensor:
    """The batch's sequences at a level each."""
    x0 = policy.normalizer.normalize(policy.target.key, batch.actions)
    alpha, sigma = ladder.at(level)
    return alpha * x0 + sigma * draws.noising.eps.to(x0)


def _student_levels(student: DiffusionPolicy) -> list[int]:
    return student.resolve_sampling(SampleConfig())[1]


def progressive_loss(student: DiffusionPolicy, teacher: Teacher) -> Loss:
    """Two steps of the teacher in one (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2), with their truncated SNR
    weights. Raises ConfigError for a teacher that does not take twice as many steps."""
    coarse, ladder = _student_levels(student), Ladder(student)
    fine = _levels_of(teacher, 2 * len(coarse))
    if fine[::2] != coarse:
        raise ConfigError("the teacher's levels are others than the student's: give both the same schedule")
    path = [*fine, -1]
    starts, middles, ends = (torch.tensor(one, device=student.device) for one in (path[:-1:2], path[1::2], path[2::2]))

    def loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
        place = draws.noising.level.to(policy.device) % len(starts)
        start, middle, end = starts[place], middles[place], ends[place]
        xt, asked = _noised(policy, ladder, batch, draws, start), teacher.denoiser(batch)
        between = ladder.step(xt, asked(xt, start), start, middle)
        there = ladder.step(between, asked(between, middle), middle, end)
        target = ladder.solve(xt, there, start, end)
        alpha, sigma = ladder.at(start)
        errors = (_denoiser(policy, batch)(xt, start) - target).square().flatten(1).mean(dim=1)
        return (alpha / sigma).square().clamp(min=1).flatten() * errors

    return loss


def _levels_of(teacher: Teacher, steps: int) -> list[int]:
    try:
        return teacher.policy.resolve_sampling(SampleConfig(sampling_steps=steps))[1]
    except ValueError as error:
        raise ConfigError(f"the student progressive needs a teacher that takes twice its steps: {error}") from error


def consistency_loss(student: DiffusionPolicy, teacher: Teacher) -> Loss:
    """One end from all levels of a path of the teacher (Song et al. 2023, arXiv 2303.01469, algorithm 2): a step of the
    teacher, and what the student itself says there, without its gradient; with the pseudo-Huber loss of Song & Dhariwal
    2023, arXiv 2310.14189. Raises ConfigError where the student's levels are not on the path."""
    if not {*_student_levels(student)} <= {*teacher.levels}:
        raise ConfigError(f"teacher-steps must be a multiple of student-steps; got {len(teacher.levels)}")
    ladder, path = Ladder(student), torch.tensor([*teacher.levels, -1], device=student.device)

    def loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
        place = draws.noising.level.to(policy.device) % (len(path) - 1)
        start, end = path[place], path[place + 1]
        xt, student = _noised(policy, ladder, batch, draws, start), _denoiser(policy, batch)
        taught = teacher.denoiser(batch)(xt, start)
        with torch.no_grad():
            there = student(ladder.step(xt, taught, start, end), end.clamp(min=0))
            target = torch.where((end < 0)[:, None, None], taught, there)
        errors = (student(xt, start) - target).square().flatten(1).mean(dim=1)
        return (errors + SMOOTH**2).sqrt() - SMOOTH

    return loss


def jumping_loss(student: DiffusionPolicy, teacher: Teacher) -> Loss:
    """The student's own objective, with the teacher's velocity in place of that of each demonstration and its noise.
    Raises ConfigError for another schedule."""
    if not torch.equal(student.diffusion.schedule.alpha, teacher.policy.diffusion.schedule.alpha):
        raise ConfigError("the student must have the schedule of its teacher")
    jumps = student.diffusion
    assert isinstance(jumps, Jumps)

    def loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
        asked = teacher.denoiser(batch)

        def velocity(xt: Tensor, level: Tensor) -> Tensor:
            alpha, sigma = policy.diffusion.tables(level, xt)
            x0 = asked(xt, level)
            return (xt - alpha * x0) / sigma - x0

        x0 = policy.normalizer.normalize(policy.target.key, batch.actions)
        cond = policy.encode(batch.observations, batch.modes)
        return policy.diffusion.loss(policy.network, x0, cond, draws.noising, velocity)  # pyright: ignore

    return loss


def pairs_loss(student: DiffusionPolicy, teacher: Teacher) -> Callable[[DiffusionPolicy, Pair, Draws], Tensor]:
    """Mean absolute error of x0 at one of the student's levels (Luhman & Luhman 2021, arXiv 2101.02388)."""
    levels = torch.tensor(_student_levels(student), device=student.device)

    def loss(policy: DiffusionPolicy, batch: Pair, draws: Draws) -> Tensor:
        place = draws.noising.level.to(policy.device) % len(levels)
        rows = torch.arange(len(place), device=place.device)
        x0 = _denoiser(policy, batch)(batch.xts[rows, place], levels[place])
        return (x0 - batch.x0s[rows, place]).abs().flatten(1).mean(dim=1)

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
    xts: Tensor
    """The teacher's path at the student's levels, the first one noise; normalized, (B, steps, T, D)."""
    x0s: Tensor
    """The x0 by which a step of DDIM leads from each to the next, the last one to the teacher's sequence."""
    modes: Tensor | None = None
    rows: None = None

    def part(self, first: int, last: int) -> Pair:
        """Some of them."""
        observations = {key: values[first:last] for key, values in self.observations.items()}
        modes = None if self.modes is None else self.modes[first:last]
        return Pair(observations, self.xts[first:last], self.x0s[first:last], modes)


class Pairs:
    """Pairs that were made, as batches for the trainer."""

    def __init__(self, pairs: Pair, action_dim: int) -> None:
        self._pairs, self._action_dim = pairs, action_dim

    def __len__(self) -> int:
        return len(self._pairs.xts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As those of windows, with raw actions."""
        observations = {key: tuple(values.shape[1:]) for key, values in self._pairs.observations.items()}
        return {**observations, "action": (self._pairs.xts.shape[2], self._action_dim)}

    def gather(self, indices: Tensor) -> Pair:
        """Some of them."""
        pairs = self._pairs
        observations = {key: values[indices] for key, values in pairs.observations.items()}
        modes = None if pairs.modes is None else pairs.modes[indices]
        return Pair(observations, pairs.xts[indices], pairs.x0s[indices], modes)

    def batches(self, batch_size: int, seed: int, first_step: int = 0, shard: Shard = WHOLE) -> Iterator[Pair]:
        """As `Windows.batches`."""
        for indices in orders(len(self), batch_size, seed, first_step, shard):
            yield self.gather(torch.from_numpy(indices).to(self._pairs.xts.device))


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
    chosen, ladder = _student_levels(student), Ladder(student)
    if not {*chosen} <= {*teacher.levels}:
        raise ConfigError(f"teacher-steps must be a multiple of student-steps; got {len(teacher.levels)}")
    at_once = min(MADE_AT_ONCE, count, len(windows))
    batches = windows.batches(at_once, seed)
    made: list[Pair] = []
    for number in range(-(-count // at_once)):
        generator = derive_generator("pairs of a student", seed, number)
        batch = _scatter(teacher.policy, next(batches), noise, generator)
        made.append(_make_pair(teacher, ladder, chosen, batch, generator))
        on_made(min(count, (number + 1) * at_once))
    observations = {key: torch.cat([one.observations[key] for one in made])[:count] for key in student.keys}
    modes = None if made[0].modes is None else torch.cat([one.modes for one in made if one.modes is not None])[:count]
    xts, x0s = (torch.cat([getattr(one, part) for one in made])[:count] for part in ("xts", "x0s"))
    pairs = Pair(observations, xts, x0s, modes)
    return Pairs(pairs, *student.shapes.action)


def _scatter(policy: DiffusionPolicy, batch: Batch, noise: float, generator: torch.Generator) -> Batch:
    """Observations with noise of this deviation, in normalized numbers."""
    scattered = {}
    for key in policy.keys:
        values = policy.normalizer.normalize(key, batch.observations[key])
        drawn = torch.randn(values.shape, generator=generator).to(values)
        scattered[key] = policy.normalizer.unnormalize(key, values + noise * drawn).to(batch.observations[key])
    return batch._replace(observations=scattered)


def _make_pair(teacher: Teacher, ladder: Ladder, chosen: list[int], batch: Batch, generator: torch.Generator) -> Pair:
    policy, rows = teacher.policy, len(batch.actions)
    _, *shape = policy.noise_shape(teacher.sampling)
    start = torch.randn(rows, *shape, generator=generator).to(policy.device)
    path = {0: start}

    def keep(xt: Tensor, i: int) -> Tensor:
        path[i] = xt
        return xt

    asked = teacher.denoiser(batch)
    clean = SAMPLERS["ddim"](asked, start, policy.diffusion.schedule, teacher.levels, None, [keep])
    xts = [path[teacher.levels.index(level)] for level in chosen]
    ends = [torch.full((rows,), level, device=policy.device) for level in (*chosen, -1)]
    x0s = [
        ladder.solve(xt, there, first, last)
        for xt, there, first, last in zip(xts, [*xts[1:], clean], ends, ends[1:], strict=False)
    ]
    return Pair(batch.observations, torch.stack(xts, dim=1), torch.stack(x0s, dim=1), batch.modes)

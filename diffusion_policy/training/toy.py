"""Toy problems: points on a line or in a plane, a small MLP, and how near its samples come to the data.

The same schedules, predictions, samplers and guidance as for robots, with nothing else around them. Knows no policy.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_policy.config import TrainConfig
from diffusion_policy.datasets.windows import WHOLE, Shard
from diffusion_policy.diffusion.guidance import classifier_free
from diffusion_policy.diffusion.likelihood import variational_bound
from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.process import Diffusion, count_draws
from diffusion_policy.diffusion.samplers import SAMPLERS, Denoise, Levels
from diffusion_policy.diffusion.schedules import Schedule, linear, low_middle_high
from diffusion_policy.networks.blocks import Films, LevelEmbedding
from diffusion_policy.training.losses import Draws, derive_generator
from diffusion_policy.training.trainer import Progress, Trainer

COUNT = 2000
"""Points in each set of samples."""
STEPS = (1, 2, 4, 8, 16, 32)
WEIGHTS = (0.0, 1.0, 3.0, 7.0)
"""Guidance weights of the two-class problem."""
RADIUS = 2.0
SHARES = (0.3, 0.7)
"""Weights of the modes of the mixture, at -1 and 1."""
DROPOUT = 0.15
"""Share of the points whose class is dropped in training."""
TOO_CLEAN = linear(40, 1e-4, 0.02)
"""A schedule with too little noise for the mixture."""
SWEEP_STEPS = 1000
"""Training steps of each network in the sweep of the mixture."""
OFF = 0.05
"""A mode whose weight is off by more has collapsed, or swallowed the other."""


class Points(NamedTuple):
    """What a problem draws."""

    x: Tensor
    """(n, dimensions)"""
    label: Tensor
    """Class of each point, (n,) int64; 0 where there is one class."""
    rows: None = None
    """They come from no data."""

    def part(self, first: int, last: int) -> Points:
        """Some of the points."""
        return Points(self.x[first:last], self.label[first:last])


def draw_ring(count: int, generator: torch.Generator) -> Points:
    """A circle of radius 2.0 with a width (standard deviation) of 0.05."""
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    radius = RADIUS + 0.05 * torch.randn(count, generator=generator)
    return Points(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), torch.zeros(count).long())


def draw_mixture(count: int, generator: torch.Generator) -> Points:
    """Two Gaussians on a line, at −1 with weight 0.3 and at 1 with weight 0.7, 0.2 wide."""
    right = torch.rand(count, generator=generator) < SHARES[1]
    x = torch.where(right, 1.0, -1.0) + 0.2 * torch.randn(count, generator=generator)
    return Points(x[:, None], torch.zeros(count).long())


def draw_moons(count: int, generator: torch.Generator) -> Points:
    """Two half circles that reach into each other, 0.08 wide."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos() - 0.5, 0.5 - angle.cos())
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    return Points(
        torch.stack([x, y], dim=1) + 0.08 * torch.randn(count, 2, generator=generator), torch.zeros(count).long()
    )


def draw_two_class(count: int, generator: torch.Generator) -> Points:
    """Two classes around (∓0.84, 0), both 1 wide, so that 80 % of each lie on their own side."""
    label = (torch.rand(count, generator=generator) < 0.5).long()
    center = torch.stack([0.84 * (2 * label - 1), torch.zeros(count)], dim=1)
    return Points(center + torch.randn(count, 2, generator=generator), label)


@dataclass(frozen=True)
class Problem:
    """A toy problem and how it is learned."""

    draw: Callable[[int, torch.Generator], Points]
    schedule: Schedule
    training_steps: int = 2000
    classes: int = 1


PROBLEMS = {
    "ring": Problem(draw_ring, linear(400, 1e-4, 0.04), training_steps=3000),
    "mixture": Problem(draw_mixture, linear(40, 1e-3, 0.25)),
    "moons": Problem(draw_moons, linear(100, 1e-3, 0.12), training_steps=4000),
    "two-class": Problem(draw_two_class, linear(100, 1e-3, 0.12), training_steps=3000, classes=2),
}


class PointNetwork(nn.Module):
    """A small MLP: (xt (B, dimensions), level (B,), cond (B, classes)) → (B, dimensions)."""

    def __init__(self, dimensions: int, classes: int, width: int = 128, level_inputs: int = 1) -> None:
        super().__init__()
        self.embed_level = LevelEmbedding(32, level_inputs)
        self.first = nn.Linear(dimensions + 32 + classes, width)
        self.others = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, dimensions),
        )  # fmt: skip
        self._sizes = [dimensions, 32, classes]

    def forward(self, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        return self.denoise(xt, self.condition(level, cond).at(...))

    def condition(self, level: Tensor, cond: Tensor) -> Films:
        """The parts of the first layer that levels (L,) and classes (B, classes) give."""
        _, of_level, of_cond = self.first.weight.split(self._sizes, dim=1)
        levels = functional.linear(self.embed_level(level), of_level)
        return Films((levels,), (functional.linear(cond, of_cond, self.first.bias),))

    def denoise(self, xt: Tensor, films: Sequence[Tensor]) -> Tensor:
        of_xt, _, _ = self.first.weight.split(self._sizes, dim=1)
        return self.others(functional.linear(xt, of_xt) + films[0])

    def undecayed_parameters(self) -> list[nn.Parameter]:
        return []


class FreshPoints(NamedTuple):
    """New points of a problem in every batch."""

    problem: Problem

    def __len__(self) -> int:
        return sys.maxsize

    def batches(self, batch_size: int, seed: int, first_step: int = 0, shard: Shard = WHOLE) -> Iterator[Points]:
        """As `Windows.batches`."""
        for step in itertools.count(first_step):
            yield self.problem.draw(batch_size, derive_generator("toy points", seed, step)).part(*shard.of(batch_size))


class Fitted(NamedTuple):
    """A trained network with what it was trained for."""

    network: PointNetwork
    diffusion: Diffusion
    classes: int
    dimensions: int
    losses: list[float]
    """Training loss of each step."""
    seconds: float


def fit(
    problem: Problem,
    prediction: str = "noise",
    schedule: Schedule | None = None,
    training_steps: int | None = None,
    batch_size: int = 512,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> Fitted:
    """Train on fresh points at every step; `schedule` and `training_steps` instead of the problem's own."""
    diffusion = Diffusion(schedule or problem.schedule, PREDICTIONS[prediction])

    def loss(network: PointNetwork, points: Points, draws: Draws) -> Tensor:
        cond = one_hot(points.label, problem.classes) * ~draws.dropped[:, None]
        return diffusion.loss(network, points.x, cond, draws.noising)

    return fit_by(problem, diffusion, loss, training_steps, batch_size, seed, on_step)


def fit_by(
    problem: Problem,
    diffusion: Diffusion,
    loss: Callable[[PointNetwork, Points, Draws], Tensor],
    training_steps: int | None = None,
    batch_size: int = 512,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> Fitted:
    """As `fit`, by a loss of each point, (B,)."""
    started = time.perf_counter()
    steps = training_steps or problem.training_steps
    dimensions = problem.draw(1, torch.Generator()).x.shape[1]
    losses: list[float] = []

    def draw(_: PointNetwork, rows: int, generator: torch.Generator) -> Draws:
        dropped = torch.rand(rows, generator=generator) < (DROPOUT if problem.classes > 1 else 0)
        return Draws(diffusion.draw((rows, dimensions), generator), dropped)

    def hear(progress: Progress) -> None:
        losses.append(progress.loss)
        on_step(progress.step)

    config = TrainConfig(
        steps, batch_size, learning_rate=2e-3, weight_decay=0, warmup_steps=0, gradient_clip=1e3, seed=seed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PointNetwork(dimensions, problem.classes, level_inputs=diffusion.level_inputs)
        Trainer(network, FreshPoints(problem), config, loss, draw).run(hear, report_every=1)
    return Fitted(network.eval(), diffusion, problem.classes, dimensions, losses, time.perf_counter() - started)


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Classes (B,) as conditions (B, classes)."""
    return functional.one_hot(label, classes).float()


def denoiser(fitted: Fitted, label: Tensor, weight: float = 0.0, levels: Levels | None = None) -> Denoise:
    """The network for points of these classes (B,), guided with this weight, for some levels or all."""
    cond = one_hot(label, fitted.classes)
    if weight == 0:
        return fitted.diffusion.denoiser(fitted.network, cond, levels)
    both = fitted.diffusion.denoiser(fitted.network, torch.cat([cond, torch.zeros_like(cond)]), levels)
    return classifier_free(both, torch.full((len(fitted.diffusion.schedule),), weight, dtype=torch.float64))


@torch.no_grad()
def sample(
    fitted: Fitted, sampler: str, steps: int, count: int, label: int | None = None, weight: float = 0.0
) -> Tensor:
    """Draw points, (count, dimensions): of one class, or of all classes equally often."""
    chosen = SAMPLERS[sampler]
    levels = fitted.diffusion.choose_levels(chosen, steps)
    draws = count_draws(chosen, levels)
    noise = torch.randn(draws, count, fitted.dimensions, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % fitted.classes if label is None else torch.full((count,), label)
    return fitted.diffusion.sample(denoiser(fitted, labels, weight, levels), noise, chosen, levels)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'| (Székely & Rizzo 2013, eq. 5), unbiased, so about 0 for equal distributions;
    x and y are (n, dimensions)."""

    def mean_within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - mean_within(x) - mean_within(y))


def noise_floor(problem: Problem) -> float:
    """Energy distance, without its sign, between two sets of data; averaged over five pairs."""
    sets = [problem.draw(COUNT, torch.Generator().manual_seed(100 + i)).x for i in range(10)]
    return sum(abs(energy_distance(x, y)) for x, y in zip(sets[::2], sets[1::2], strict=True)) / 5


def compare_samplers(fitted: Fitted, data: Tensor, on_cell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """{sampler: {steps: {"energy_distance", "milliseconds"}}} at 1, 2, 4 ... and all steps."""
    table: dict[str, Any] = {}
    for name in SAMPLERS:
        table[name] = {}
        most = fitted.diffusion.most_steps(SAMPLERS[name])
        for steps in (*(n for n in STEPS if n < most), most):
            started = time.perf_counter()
            points = sample(fitted, name, steps, len(data))
            milliseconds = 1000 * (time.perf_counter() - started)
            distance = energy_distance(points, data) if torch.isfinite(points).all() else None
            table[name][str(steps)] = {"energy_distance": distance, "milliseconds": milliseconds}
            on_cell(name)
    return table


@torch.no_grad()
def measure_bound(fitted: Fitted, points: Points) -> dict[str, Any]:
    """The variational bound on −log p of points, on all levels; its terms from the last level to level 0."""
    levels = list(reversed(range(len(fitted.diffusion.schedule))))
    noise = torch.randn(len(levels), *points.x.shape, generator=torch.Generator().manual_seed(2))
    denoise = denoiser(fitted, points.label)
    bound = variational_bound(denoise, points.x, fitted.diffusion.schedule, levels, noise)
    return {
        "nats": float(bound.nats.mean()),
        "bits_per_dimension": float(bound.bits_per_dimension.mean()),
        "prior_nats": float(bound.prior.mean()),
        "terms_nats": bound.terms.mean(dim=1).tolist(),
    }


def measure_ring(fitted: Fitted) -> dict[str, Any]:
    """Radius and eight sectors of samples with all steps."""
    points = sample(fitted, "ddpm", len(fitted.diffusion.schedule), 4000)
    radius = points.norm(dim=1)
    sector = ((torch.atan2(points[:, 1], points[:, 0]) + math.pi) / (math.pi / 4)).long().clamp(max=7)
    return {
        "radius_mean": float(radius.mean()),
        "share_within_0.3": float(((radius - RADIUS).abs() < 0.3).double().mean()),
        "sector_shares": (torch.bincount(sector, minlength=8) / len(sector)).tolist(),
    }


def measure_weights(fitted: Fitted) -> dict[str, Any]:
    """Weights of the two modes of the mixture among samples with all steps, and whether one has collapsed."""
    points = sample(fitted, "ddpm", len(fitted.diffusion.schedule), 4000)[:, 0]
    left = float((points < 0).double().mean())
    return {"weights": [left, 1 - left], "collapsed": abs(left - SHARES[0]) > OFF}


def measure_mixture(fitted: Fitted) -> dict[str, Any]:
    """The mixture's weights; also with too little noise (β up to 0.02), and with fewer levels for two predictions."""
    problem = PROBLEMS["mixture"]
    sweep = [
        {"levels": levels, "prediction": prediction, "last_alpha": float(schedule.alpha[-1])}
        | measure_weights(fit(problem, prediction, schedule, training_steps=SWEEP_STEPS))
        for levels in (5, 10, 15, 20, 30, 40)
        for schedule in (linear(levels, 1e-3, 0.25),)
        for prediction in ("noise", "velocity")
    ]
    return {
        **measure_weights(fitted),
        "too_little_noise": {
            "last_alpha": float(TOO_CLEAN.alpha[-1]),
            "last_signal_power": float(TOO_CLEAN.alpha[-1] ** 2),
            **measure_weights(fit(problem, schedule=TOO_CLEAN)),
        },
        "sweep": sweep,
    }


def measure_guidance(fitted: Fitted) -> dict[str, Any]:
    """Share of samples on the side of the class that was asked, at each guidance weight."""

    levels = len(fitted.diffusion.schedule)

    def share(weight: float) -> float:
        sides = [(sample(fitted, "ddim", levels, COUNT, label, weight)[:, 0] > 0) == label for label in (0, 1)]
        return float(torch.cat(sides).double().mean())

    return {"share_in_asked_class": {f"{weight:g}": share(weight) for weight in WEIGHTS}}


MEASURES: Mapping[str, Callable[[Fitted], dict[str, Any]]] = {
    "ring": measure_ring,
    "mixture": measure_mixture,
    "two-class": measure_guidance,
}
"""What is looked at beside the table, for the problems that have a number to meet."""


class Shown(NamedTuple):
    """Points to draw."""

    data: Points
    noised: Sequence[tuple[int, Tensor]]
    """A low, a middle and a high level, with the data noised to it."""
    samples: Points


@torch.no_grad()
def show(fitted: Fitted, problem: Problem) -> Shown:
    """Data, the same data at three levels, and samples."""
    generator = torch.Generator().manual_seed(3)
    data = problem.draw(COUNT, generator)
    schedule = problem.schedule
    noised = []
    for level in low_middle_high(schedule):
        eps = torch.randn(data.x.shape, generator=generator)
        noised.append((level, schedule.alpha[level] * data.x + schedule.sigma[level] * eps))
    samples = sample(fitted, "ddpm", len(schedule), COUNT)
    return Shown(data, noised, Points(samples, torch.arange(COUNT) % fitted.classes))

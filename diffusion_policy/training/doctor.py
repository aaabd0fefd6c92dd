"""Checks that tell why a policy misbehaves: of the noise schedule, of the data, and of a trained policy.

Each check is a function that returns a `Check`: pass, warn or fail, with the figure and what to do. The thresholds are
stated where they are used; those of trained policies were set beside healthy and broken ones. Knows no simulator.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.config import PolicyConfig, SampleConfig, TrainConfig
from diffusion_policy.datasets.statistics import Statistics
from diffusion_policy.datasets.windows import Batch, Windows
from diffusion_policy.diffusion.likelihood import variational_bound
from diffusion_policy.diffusion.schedules import Schedule, low_middle_high
from diffusion_policy.normalizer import NORMALIZATIONS, describe_columns
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import derive_generator
from diffusion_policy.training.trainer import Progress, Trainer

OVERFIT_WINDOWS = 32
OVERFIT_LOSS = 0.02
"""A healthy network comes below this on 32 windows in 2000 steps."""
LEVELS_SHOWN = 8
"""Levels at which a trained policy is looked at."""
HELD_JUMP = 1.5
"""Times the largest demonstrated step that a sample may jump where start and goal are held."""
BOUND_LEVELS = 200
"""The variational bound is taken over at most so many levels, evenly from all."""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    status: Literal["pass", "warn", "fail"]
    figure: str
    advice: str = ""
    """What to do; empty when it passed."""


def judge(name: str, figure: str, advice: str, *, passes: bool, fails: bool = True) -> Check:
    """Pass, else fail or, where that is not `fails`, warn."""
    if passes:
        return Check(name, "pass", figure)
    return Check(name, "fail" if fails else "warn", figure, advice)


def judge_number(name: str, value: float, figure: str, advice: str, *, passes: float, fails: float) -> Check:
    """Judge a number that should be low: pass up to `passes`, fail from above `fails` on, and where it is NaN."""
    return judge(name, figure, advice, passes=value <= passes, fails=not value <= fails)


# The noise schedule


def check_last_level(schedule: Schedule, deviation: float = 1.0) -> Check:
    """Sampling starts from standard normal noise, so the last level must be that. `deviation`: root mean square of the
    normalized data, whose share alpha · deviation must be at most 0.05 (warn) or 0.15 (fail) of what is there."""
    alpha, sigma = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    kept = alpha * deviation
    return judge(
        "last level is standard normal",
        f"alpha {alpha:.4f}, sigma {sigma:.4f}: {alpha**2:.2%} of the signal's power is left",
        "more noise levels, or a larger last beta: sampling starts from noise that this network never saw",
        passes=kept <= 0.05 and abs(sigma - 1) <= 0.02,
        fails=kept > 0.15 or abs(sigma - 1) > 0.1,
    )


def check_first_level(schedule: Schedule) -> Check:
    """The last sampling step jumps from level 0 to the clean sequence, so level 0 must be nearly the data: sigma at
    most 0.1 (warn) or 0.3 (fail)."""
    sigma = float(schedule.sigma[0])
    return judge_number(
        "level 0 is nearly the data",
        sigma,
        f"sigma {sigma:.4f}, alpha {float(schedule.alpha[0]):.4f}",
        "more noise levels, or a smaller first beta: the last step has to guess what the noise hides",
        passes=0.1,
        fails=0.3,
    )


def check_decreasing(make: Callable[[], Schedule]) -> tuple[Check, Schedule | None]:
    """Whether the options make a schedule at all, and that schedule."""
    name = "alpha decreases"
    try:
        schedule = make()
    except ValueError as error:
        return Check(name, "fail", str(error), "other schedule options"), None
    smallest = float(-schedule.alpha.diff().max())
    return Check(name, "pass", f"{len(schedule)} levels, at least {smallest:.1e} from one to the next"), schedule


# The data


def check_constant(statistics: Mapping[str, Statistics], normalization: str) -> Check:
    """Columns that are constant, or vary too rarely for the normalization; the keys are called as they are here."""
    peculiar = describe_columns(statistics, NORMALIZATIONS[normalization])
    columns = sum(found.mean.size for found in statistics.values())
    return judge(
        "no constant dimensions",
        "; ".join(peculiar) if peculiar else f"all {columns} columns vary",
        "leave them out, or check how they were recorded",
        passes=not peculiar,
        fails=False,
    )


def check_padding(lengths: np.ndarray, config: PolicyConfig) -> Check:
    """Share of predicted steps that lie outside their episode, where its first or last action is repeated; above 0.3
    the policy learns to stand still."""
    before, ahead = config.observation_horizon - 1, config.prediction_horizon - config.observation_horizon
    outside = sum(
        int(np.minimum(np.arange(1, reach + 1), length).sum()) for length in lengths for reach in (before, ahead)
    )
    share = outside / (int(lengths.sum()) * config.prediction_horizon)
    return judge(
        "little padding",
        f"{share:.1%} of the predicted steps repeat an episode's first or last action",
        "a shorter prediction horizon, or longer episodes",
        passes=share <= 0.3,
        fails=False,
    )


def check_horizons(lengths: np.ndarray, config: PolicyConfig) -> Check:
    """Episodes should be at least as long as the prediction; the configuration itself has made sure of the rest."""
    short = int((lengths < config.prediction_horizon).sum())
    horizons = f"To {config.observation_horizon}, T {config.prediction_horizon}, Ta {config.action_horizon}"
    return judge(
        "horizons fit",
        f"{horizons}; {short} of {len(lengths)} episodes are shorter than T (shortest {lengths.min()})",
        "a shorter prediction horizon",
        passes=short == 0,
        fails=short > len(lengths) / 2,
    )


def draw_timeline(config: PolicyConfig) -> str:
    """Which steps are observed, predicted and executed, as text."""
    now, rows = config.observation_horizon - 1, []
    spans = {
        "observed": (0, config.observation_horizon),
        "predicted": (0, config.prediction_horizon),
        "executed": (now, now + config.action_horizon),
    }
    rows.append("step       " + "".join(f"{step - now:>4}" for step in range(config.prediction_horizon)))
    for name, (first, end) in spans.items():
        marks = ("   x" if first <= step < end else "    " for step in range(config.prediction_horizon))
        rows.append(f"{name:11}" + "".join(marks).rstrip())
    return "\n".join(rows)


# Learning


def check_overfit(
    policy: DiffusionPolicy,
    windows: Windows,
    steps: int,
    seed: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> Check:
    """Train this new policy on 32 windows: whatever cannot learn those by heart cannot learn. Its loss should weigh all
    levels alike and drop no condition, or the bound means nothing."""
    generator = derive_generator("doctor overfit", seed)
    few = windows.subset(torch.randperm(len(windows), generator=generator)[:OVERFIT_WINDOWS].numpy())
    config = TrainConfig(steps, OVERFIT_WINDOWS, learning_rate=1e-3, weight_decay=0, warmup_steps=0, seed=seed)
    found = math.inf

    def hear(progress: Progress) -> None:
        nonlocal found
        found = progress.loss
        on_step(progress.step)

    Trainer.for_policy(policy, few, None, config).run(hear, report_every=max(1, steps // 20))
    return judge_number(
        f"overfits {len(few)} windows",
        found,
        f"loss {found:.4f} after {steps} steps; {OVERFIT_LOSS} is asked",
        "a wider network, or look at the data: two equal observations with different actions cannot be told apart",
        passes=OVERFIT_LOSS,
        fails=5 * OVERFIT_LOSS,
    )


# A trained policy


class Probe(NamedTuple):
    """What a policy predicts at one level for windows whose noise is known."""

    level: int
    scale: float
    """Root mean square of the predicted noise."""
    noise_error: float
    """Mean squared error of the predicted noise."""

    @property
    def expected_scale(self) -> float:
        """Of a predictor that says the mean: |E[eps]|² + variance left = 1."""
        return max(0.0, 1 - self.noise_error) ** 0.5


def noised(policy: DiffusionPolicy, x0: Tensor, seed: int) -> list[tuple[int, np.ndarray]]:
    """One normalized sequence (T, D), noised to a low, a middle and a high level."""
    eps = torch.randn(x0.shape, generator=derive_generator("doctor noised", seed)).to(x0)
    rows = []
    for level in low_middle_high(policy.diffusion.schedule):
        alpha, sigma = policy.diffusion.tables(level, x0)
        rows.append((level, (alpha * x0 + sigma * eps).cpu().numpy()))
    return rows


@torch.no_grad()
def probe(policy: DiffusionPolicy, batch: Batch, seed: int) -> list[Probe]:
    """The policy at some levels, from the lowest to the highest that holds signal."""
    generator = derive_generator("doctor probe", seed)
    x0 = policy.sequences.normalize(batch.actions, batch.observations)
    levels = _levels(policy.diffusion.schedule)
    denoise = policy.predictor(batch.observations, batch.labels, levels)
    probes = []
    for level in levels:
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        alpha, sigma = policy.diffusion.tables(level, x0)
        xt = alpha * x0 + sigma * eps
        predicted = (xt - alpha * denoise(xt, level)) / sigma
        error = float((predicted - eps).square().mean())
        probes.append(Probe(level, float(predicted.square().mean().sqrt()), error))
    return probes


def check_noise_scale(probes: Sequence[Probe]) -> Check:
    """A network that predicts the mean of the noise has the scale sqrt(1 − its error), and at the noisier half of the
    levels, where nearly all is noise, a scale near 1. Off by more than 0.1 (warn) or 0.3 (fail) it is not trained, or
    trained with another schedule."""
    off = [abs(probe.scale - probe.expected_scale) for probe in probes]
    off += [abs(probe.scale - 1) for probe in probes[len(probes) // 2 :]]
    scales = ", ".join(f"{probe.scale:.2f} at {probe.level}" for probe in probes)
    return judge_number(
        "predicted noise has the right scale",
        float(np.max(off)),
        f"scale of the true noise is 1; predicted {scales}",
        "train longer; check that training and sampling use one schedule and one prediction",
        passes=0.1,
        fails=0.3,
    )


def check_one_step(probes: Sequence[Probe]) -> Check:
    """One denoising step must bring x0 nearer than the noised input (divided by alpha) is: noise error below 0.95."""
    errors = np.array([probe.noise_error for probe in probes])
    bad = [probe.level for probe in probes if not probe.noise_error < 0.95]
    return judge(
        "one denoising step improves on its input",
        f"remaining error at most {errors.max():.2f} of the input's, at level {probes[int(errors.argmax())].level}",
        f"train longer; at levels {bad} the policy does not make its input better",
        passes=not bad,
        fails=len(bad) > 1 or not np.isfinite(errors).all(),
    )


def check_conditioning(policy: DiffusionPolicy, batch: Batch, seed: int) -> Check:
    """The error must rise when each window is given the observations of another: by a fifth at least."""
    plain = _error(policy, batch, batch.observations, seed)
    swapped = {key: rows.roll(1, dims=0) for key, rows in batch.observations.items()}
    ratio = _error(policy, batch, swapped, seed) / max(plain, 1e-12)
    return judge_number(
        "observations are used",
        -ratio,
        f"error {ratio:.2f} times as high with observations swapped between windows",
        "train longer; check that observations and actions belong to the same steps",
        passes=-1.2,
        fails=-1.05,
    )


def check_copying(policy: DiffusionPolicy, batch: Batch, seed: int) -> Check:
    """A policy that only goes on with its last motion is lost without it: its error when every observed step shows the
    last one, so that nothing moves, should be below that of swapped observations, half way at most."""
    name = "does not merely repeat its last motion"
    if policy.config.observation_horizon == 1:
        return Check(name, "pass", "one observed step holds no motion")
    plain = _error(policy, batch, batch.observations, seed)
    still = {key: rows[:, -1:].expand_as(rows) for key, rows in batch.observations.items()}
    swapped = {key: rows.roll(1, dims=0) for key, rows in batch.observations.items()}
    without, lost = _error(policy, batch, still, seed), _error(policy, batch, swapped, seed)
    share = (without - plain) / max(lost - plain, 1e-12)
    return judge_number(
        name,
        share,
        f"error {without / max(plain, 1e-12):.2f} times as high without motion, {share:.0%} of what swapping costs",
        "observe one step only, or add noise to the executed actions when collecting: it copies instead of looking",
        passes=0.5,
        fails=1.0,
    )


@torch.no_grad()
def _error(policy: DiffusionPolicy, batch: Batch, observations: Mapping[str, Tensor], seed: int) -> float:
    """Error of x0 under these observations, at the noisier half of the levels, where conditions count."""
    generator = derive_generator("doctor error", seed)
    x0 = policy.sequences.normalize(batch.actions, batch.observations)
    levels = _levels(policy.diffusion.schedule)
    denoise = policy.predictor(observations, batch.labels, levels)
    furthest = max(1.0, float(x0.abs().max()))
    total = 0.0
    for level in levels[len(levels) // 2 :]:
        alpha, sigma = policy.diffusion.tables(level, x0)
        xt = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator).to(x0)
        total += float((denoise(xt, level).clamp(-furthest, furthest) - x0).square().mean())
    return total


def _levels(schedule: Schedule) -> list[int]:
    """Some levels, from the lowest to the highest that holds signal."""
    highest = len(schedule) - 1 - schedule.ends_silent
    return sorted({round(level) for level in np.linspace(0, highest, LEVELS_SHOWN)})


def check_clipping(normalized: Tensor, clip: str) -> Check:
    """Static clipping to [-1, 1] must not cut demonstrated actions off, here normalized, (steps, A): at most 0.1 %.
    `clip`: see `DiffusionPolicy.choose_clip`."""
    share = float((normalized.abs() > 1 + 1e-4).float().mean())
    return judge(
        "clipping fits the normalizer",
        f"{share:.2%} of the demonstrated numbers lie beyond [-1, 1], at most {float(normalized.abs().max()):.2f}",
        "normalize actions by their limits, or sample with --clip auto, none or dynamic",
        passes=share <= 0.001 or clip != "static",
        fails=share > 0.01,
    )


def check_jumps(policy: DiffusionPolicy, batch: Batch, largest: np.ndarray, sampling: SampleConfig, seed: int) -> Check:
    """Sampled actions should not jump from step to step further than the demonstrated ones ever do. `largest`: the
    largest demonstrated jump of each number of an action, (A,)."""
    generators = [derive_rng("doctor plans", seed, row) for row in range(len(batch.actions))]
    plans = policy.sample(batch.observations, generators, config=sampling)[:, 0].cpu().numpy()  # (B, T, A)
    ratios = np.abs(np.diff(plans, axis=1)) / np.maximum(largest, 1e-6)
    share = float(np.mean(~(ratios <= 1.2)))
    return judge_number(
        "actions jump no further than demonstrated",
        share,
        f"{share:.2%} of the sampled steps exceed 1.2 times the largest demonstrated; at most {ratios.max():.2f} times",
        "train longer, more sampling steps, or another sampler (study samplers)",
        passes=0.001,
        fails=0.02,
    )


@torch.no_grad()
def check_held(policy: DiffusionPolicy, batch: Batch, sampling: SampleConfig, seed: int) -> Check:
    """Samples should come to the start and the goal that are held in them as smoothly as demonstrations do: a jump
    there means that they end elsewhere."""
    held = policy.hold(batch.observations)
    assert held is not None
    generators = [derive_rng("doctor held", seed, row) for row in range(len(batch.actions))]
    noise = torch.from_numpy(policy.draw_noise(generators, 1, sampling)[:, 0]).to(policy.device).transpose(0, 1)
    _, levels = policy.resolve_sampling(sampling)
    cond = policy.encode(batch.observations, batch.labels)
    x0 = policy.denoise_from(noise, cond, levels, sampling, held=held)
    steps, shown = (
        rows.diff(dim=1).abs() for rows in (x0, policy.sequences.normalize(batch.actions, batch.observations))
    )
    joints = held.mask[1:] ^ held.mask[:-1]  # (T - 1, D): between what is held and what is free
    largest = torch.where(joints, steps / shown.amax(dim=(0, 1)).clamp(min=0.02), 0).amax(dim=(1, 2))  # (B,)
    share = float((~(largest <= HELD_JUMP)).float().mean())
    return judge_number(
        "samples come to their start and goal",
        share,
        f"{share:.0%} of the samples jump there by more than {HELD_JUMP:g} times the largest demonstrated step, "
        f"at most by {float(largest.max()):.2f} times",
        "train longer, more sampling steps, or a longer prediction horizon: the goal cannot be reached in time",
        passes=0.05,
        fails=0.3,
    )


def largest_jumps(actions: np.ndarray, episode_ends: np.ndarray) -> np.ndarray:
    """The largest step of each number of an action within an episode, (A,); `actions` (steps, A)."""
    jumps = np.abs(np.diff(actions.astype(np.float64), axis=0))
    jumps[episode_ends[:-1] - 1] = 0
    return jumps.max(axis=0)


@torch.no_grad()
def check_bound(policy: DiffusionPolicy, batch: Batch, seed: int) -> Check:
    """The variational bound on -log p of the normalized sequences given their observations: a figure to compare
    policies on the same data with, lower is better."""
    schedule = policy.diffusion.schedule
    highest = len(schedule) - 1 - schedule.ends_silent
    levels = np.linspace(highest, 0, min(highest + 1, BOUND_LEVELS)).round().astype(int).tolist()
    x0 = policy.sequences.normalize(batch.actions, batch.observations).cpu().double()
    generator = derive_generator("doctor bound", seed)
    noise = (torch.randn(x0.shape, generator=generator, dtype=torch.float64) for _ in levels)
    network = policy.predictor(batch.observations, batch.labels, levels)

    def denoise(xt: Tensor, level: int) -> Tensor:
        return network(xt.float().to(policy.device), level).cpu().double()

    bound = variational_bound(denoise, x0, schedule, levels, noise)
    over = f", over {len(levels)} of {highest + 1} levels" if len(levels) <= highest else ""
    bits, nats = float(bound.bits_per_dimension.mean()), float(bound.nats.mean())
    return judge(
        "likelihood is finite",
        f"variational bound {bits:.3f} bits per dimension, {nats:.1f} nats a sequence{over}",
        "the policy predicts NaN or infinity; train again with a lower learning rate",
        passes=bool(np.isfinite(bits)),
    )

"""What evaluations measure: pure functions of episodes, each a value with its 95 % interval.

Knows episodes. Knows no simulator and no policy. How intervals are found is in `intervals`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.special import digamma

from diffusion_policy.evaluation import intervals
from diffusion_policy.evaluation.episode import Episode, Observations
from diffusion_policy.evaluation.intervals import Metric
from diffusion_policy.evaluation.intervals import wilson as wilson

NONE = "none"
"""Label under which episodes without a mode are counted."""
MEASURE_BOUNDS = {"score": (0.0, 1.0)}
"""Measures whose range is known."""


@dataclass(frozen=True)
class ModeCount:
    """How often a mode was taken."""

    episodes: int
    successes: int
    success_rate: Metric
    """Successes among the episodes that took this mode."""


# Success


def success_rate(episodes: Sequence[Episode]) -> Metric:
    """Share of successful episodes. Repeats of a seed count as far as they differ (`intervals.effective_trials`)."""
    seeds = [episode.seed for episode in episodes]
    return intervals.clustered_share(*intervals.by_cluster(seeds, [episode.success for episode in episodes]))


def mean_measures(episodes: Sequence[Episode]) -> dict[str, Metric]:
    """The mean of every measure over the episodes that have it, resampled by seed; a share, with a share's interval,
    where all values are 0 or 1. The value is None where one is not finite, the ends where all values are equal and the
    measure's range is unknown."""
    names = dict.fromkeys(name for episode in episodes for name in episode.measures)
    return {
        name: _mean(
            [(episode.seed, episode.measures[name]) for episode in episodes if name in episode.measures],
            MEASURE_BOUNDS.get(name),
            share=all(episode.measures.get(name, 0) in (0, 1) for episode in episodes),
        )
        for name in names
    }


def time_to_success(episodes: Sequence[Episode], period: float) -> Metric:
    """Mean duration [s] of successful episodes, which end at success; `period`: of control [s]."""
    return _mean([(episode.seed, period * len(episode.actions)) for episode in episodes if episode.success])


# Modes


def count_modes(episodes: Iterable[Episode], modes: Sequence[str]) -> dict[str, ModeCount]:
    """Episodes and successes of every mode, and of `none` where any episode has no mode."""
    taken: dict[str, list[Episode]] = {label: [] for label in (*modes, NONE)}
    for episode in episodes:
        taken.setdefault(episode.mode or NONE, []).append(episode)
    labels = [*modes, NONE] if taken[NONE] else modes
    return {
        label: ModeCount(len(taken[label]), sum(one.success for one in taken[label]), success_rate(taken[label]))
        for label in labels
    }


def successes_by_mode(episodes: Iterable[Episode]) -> dict[str, int]:
    """How many successful episodes took each mode: what entropy and coverage count."""
    return dict(Counter(episode.mode for episode in episodes if episode.success and episode.mode is not None))


def effective_successes(episodes: Sequence[Episode]) -> dict[str, float]:
    """`successes_by_mode`, scaled down to the number of independent successes that they are worth where seeds repeat:
    episodes from one start need not tell more than one (`intervals.effective_trials`)."""
    counts = successes_by_mode(episodes)
    by_seed = list(_successes_of_seeds(episodes).values())
    if not by_seed:
        return {}
    table = np.array([[one[mode] for mode in counts] for one in by_seed])  # (seeds, modes)
    total = table.sum()
    variance = float(1 - ((table.sum(axis=0) / total) ** 2).sum())
    worth = intervals.effective_trials(table, table.sum(axis=1), variance)
    return {mode: float(count * worth / total) for mode, count in counts.items()}


def mode_entropy(counts: Mapping[str, float], modes: Sequence[str]) -> float | None:
    """Behaviour entropy −Σ p log_|B| p of the modes among `counts`, from 0 (one mode) to 1 (all equally often); |B| is
    the number of `modes` (Jia et al. 2024, arXiv 2402.14606, eq. 3). None without any count or with a single mode."""
    vector = _vector(counts, modes)
    if vector.sum() == 0 or len(modes) < 2:
        return None
    shares = vector / vector.sum()
    shares = shares[shares > 0]
    return abs(float(-(shares * np.log(shares)).sum() / math.log(len(modes))))


def behaviour_entropy(counts: Mapping[str, float], modes: Sequence[str], corrected: bool = False) -> Metric:
    """`mode_entropy` with the interval of the policy's own entropy, widened where it would leave out the value.

    The value lies below the policy's entropy, on average by (|B| − 1) / (2 n ln |B|) where every mode is taken now and
    then, so it may lie at the lower end. `corrected` adds Miller's and Madow's estimate of that, with the number of
    modes that were met in place of |B|, and clips the sum to 1.
    """
    value = mode_entropy(counts, modes)
    if value is None:
        return Metric(None)
    vector = _vector(counts, modes)
    if corrected:
        value = min(1.0, value + (np.count_nonzero(vector) - 1) / (2 * float(vector.sum()) * math.log(len(modes))))
    uniform = np.full(len(modes), 1 / len(modes))
    low, high = intervals.spread_interval(vector, uniform, intervals.concentration)
    return _holding(value, 1 - high, 1 - low)


def mode_divergence(counts: Mapping[str, float], demonstrated: Mapping[str, int], modes: Sequence[str]) -> Metric:
    """Jensen-Shannon divergence between the modes of the successes and those of the demonstrations, 0 (equal) to 1
    (none in common), with the interval of the policy's own divergence, widened where it would leave out the value.
    The demonstrations are what the policy learned from, so their shares are taken as they are, not as a sample. None
    without successes or demonstrations in any of the modes, or with a single mode."""
    vector, reference = _vector(counts, modes), _vector(demonstrated, modes)
    if vector.sum() == 0 or reference.sum() == 0 or len(modes) < 2:
        return Metric(None)
    reference = reference / reference.sum()
    value = float(intervals.jensen_shannon(vector / vector.sum(), reference).value)
    return _holding(max(0.0, value), *intervals.spread_interval(vector, reference, intervals.jensen_shannon))


def mode_coverage(counts: Mapping[str, float], modes: Sequence[str]) -> float | None:
    """Share of the modes that occur among `counts`; None without modes."""
    return sum(counts.get(mode, 0) > 0 for mode in modes) / len(modes) if modes else None


def behaviour_coverage(counts: Mapping[str, float], modes: Sequence[str]) -> Metric:
    """`mode_coverage` with the interval of the share of modes that the policy takes at all (`intervals.coverage`): at
    least those that were met, and unmet ones unless there are too many episodes for one of 1 % to be missed."""
    return intervals.coverage(_vector(counts, modes)) if modes else Metric(None)


def conditional_entropy(episodes: Sequence[Episode], modes: Sequence[str]) -> Metric:
    """Behaviour entropy given the initial state: the mean over seeds of the entropy among a seed's own successes, from
    0 (the start decides the mode) to 1 (Jia et al. 2024, arXiv 2402.14606), resampled by seed.

    Seeds with fewer than two successes in a mode tell nothing of it and are left out (D3IL counts them as 0); None
    where no seed has two. A seed's few repeats make the plain entropy far too low: two repeats of a fair coin give 0.5.
    So each seed's is Σ p̂ (ψ(n) − ψ(n p̂)) [nats] (Zhang 2012, Neural Computation 24): its bias falls exponentially in
    the number n of repeats, is never positive, and here always smaller than with the Miller-Madow correction. Two
    repeats of the coin still give 0.72, five 0.98; five repeats of 24 equal modes give 0.60. The interval is of what so
    many repeats give on average.
    """
    if len(modes) < 2:
        return Metric(None)
    values = []
    for seed, counts in _successes_of_seeds(episodes).items():
        vector = _vector(counts, modes)
        met, total = vector[vector > 0], vector.sum()
        if total >= 2:
            entropy = float((met / total * (digamma(total) - digamma(met))).sum())
            values.append((seed, max(0.0, entropy) / math.log(len(modes))))
    mean = _mean(values, bounds=(0.0, 1.0))
    return Metric(*(None if end is None else min(1.0, max(0.0, end)) for end in (mean.value, mean.low, mean.high)))


def commitment(
    episodes: Sequence[Episode], choice: Callable[[Observations, np.ndarray], tuple[str, str] | None]
) -> Metric:
    """Among consecutive plans of one episode that face the same decision, the share that decide as the plan before.

    `choice(observation, actions (steps, A)) → (question, answer)`, or None where a plan decides nothing. None where no
    two plans face the same decision.
    """
    seeds, kept = [], []
    for episode in episodes:
        decisions = [
            choice({key: values[plan.step] for key, values in episode.observations.items()}, plan.actions)
            for plan in episode.plans
        ]
        for before, after in pairwise(decisions):
            if before is not None and after is not None and before[0] == after[0]:
                seeds.append(episode.seed)
                kept.append(before[1] == after[1])
    return intervals.clustered_share(*intervals.by_cluster(seeds, kept))


# Movement, samples and time


def diversity(samples: np.ndarray) -> Metric:
    """How different the sequences are that a policy samples at one state: the mean over states of the mean distance
    between two of N normalized sequences, the root of their mean squared difference; samples (states, N, T, A). In
    normalized units, in which an action's whole range is 2. None for fewer than two samples."""
    states, number = samples.shape[:2]
    if number < 2:
        return Metric(None)
    first, second = np.triu_indices(number, k=1)
    distances = [
        float(np.sqrt(((rows[first] - rows[second]) ** 2).mean(axis=1)).mean())
        for rows in samples.reshape(states, number, -1).astype(float)
    ]
    return _mean(list(enumerate(distances)))


def jerk(episodes: Sequence[Episode], path: Callable[[Observations], np.ndarray] | None, period: float) -> Metric:
    """How uneven the movement is: the mean over episodes of the root mean square of the third derivative of the path,
    as third differences over period³.

    `path(observations) → (steps + 1, D)`, in which case the unit is that of the path per s³ (m/s³ for metres); without
    it the actions are differentiated, in their unit per s³ (where an action is a step's displacement, that is a
    derivative more of the movement). `period`: of control [s]. Episodes with fewer than four points are left out.
    """
    values = []
    for episode in episodes:
        points = np.asarray(episode.actions if path is None else path(episode.observations), dtype=float)
        if len(points) >= 4:
            third = np.diff(points, n=3, axis=0) / period**3
            values.append((episode.seed, math.sqrt((third**2).sum(axis=-1).mean())))
    return _mean(values)


def latency(times_ms: Sequence[float]) -> dict[str, Metric]:
    """The median and the 95th and 99th percentile of planning times, [ms]: {"p50": ..., "p95": ..., "p99": ...}. An end
    of an interval is None where there are too few times (fewer than 6, 72 and 368 for the upper ends)."""
    return {f"p{percent}": intervals.quantile(times_ms, percent) for percent in (50, 95, 99)}


def percentiles(values: Sequence[float], which: Sequence[int]) -> dict[str, float]:
    """{"p50": ..., "p95": ...}."""
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in which}


def _vector(counts: Mapping[str, float], modes: Sequence[str]) -> np.ndarray:
    """Counts in the order of the modes, (modes,)."""
    return np.array([counts.get(mode, 0) for mode in modes], dtype=float)


def _holding(value: float, low: float, high: float) -> Metric:
    """An interval that also holds the value."""
    return Metric(value, min(low, value), max(high, value))


def _successes_of_seeds(episodes: Iterable[Episode]) -> dict[int, Counter[str]]:
    """How many successes each seed has in each mode; only seeds with any."""
    seeds: dict[int, Counter[str]] = {}
    for episode in episodes:
        if episode.success and episode.mode is not None:
            seeds.setdefault(episode.seed, Counter())[episode.mode] += 1
    return seeds


def _mean(
    values: Sequence[tuple[int, float]], bounds: tuple[float, float] | None = None, share: bool = False
) -> Metric:
    """Mean of (seed, value) pairs, resampled by seed, or as the share that they are."""
    sums, counts = intervals.by_cluster([seed for seed, _ in values], [value for _, value in values])
    return intervals.clustered_share(sums, counts) if share else intervals.clustered_mean(sums, counts, bounds)

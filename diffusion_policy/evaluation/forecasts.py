"""What forecasts are worth: pure functions of sampled futures and of what came.

`samples` (episodes, N, steps, agents, 2) are joint futures of all agents, `truth` (episodes, steps, agents, 2) what
came, in the unit of the data. Distances are averaged over the agents of a sample first; then the best of k samples is
taken, so that a sample must be right for all agents at once: the variants for worlds of Argoverse 2 (Wilson et al.
2021, arXiv 2301.00493). Knows arrays. Knows no policy and no store.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_policy.evaluation.intervals import Metric, clustered_mean, clustered_share, wilson

COUNTS = (1, 6, 20)
"""Samples of which the best one counts (k)."""
BINS = 10
"""Of predicted probabilities."""


class Bin(NamedTuple):
    """Predictions that are alike."""

    predicted: float
    """Mean of the predicted probabilities."""
    predictions: int
    happened: Metric
    """Share of them of which the mode came."""
    true: Metric
    """Mean of the true probabilities; None where they are unknown."""


# Distances


def joint_distances(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """From what came, averaged over the agents, (episodes, N, steps)."""
    return np.linalg.norm(samples - truth[:, None], axis=-1).mean(axis=-1)


def min_ade(distances: np.ndarray, k: int) -> np.ndarray:
    """Of the first k samples, the least mean distance over all steps, (episodes,)."""
    return distances[:, :k].mean(axis=-1).min(axis=1)


def min_fde(distances: np.ndarray, k: int) -> np.ndarray:
    """Of the first k samples, the least distance at the last step, (episodes,)."""
    return distances[:, :k, -1].min(axis=1)


def brier_min_fde(distances: np.ndarray, k: int) -> np.ndarray:
    """`min_fde` plus (1 - p)^2 with the probability p = 1/k of each of k samples, (episodes,)."""
    return min_fde(distances, k) + (1 - 1 / k) ** 2


def misses(distances: np.ndarray, k: int, farthest: float) -> np.ndarray:
    """Whether none of the first k samples ends within `farthest` of what came, (episodes,) bool."""
    return min_fde(distances, k) > farthest


def energy_score(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """E|X - y| - E|X - X'| / 2 of joint futures, (episodes,): a proper score, which on average is least for samples of
    the true distribution (Gneiting & Raftery 2007, JASA 102, eq. 22). |.| is the root of the mean over steps and agents
    of the squared distance; X' runs over the other samples. Of a single sample it is the distance itself."""
    episodes, count = samples.shape[:2]
    flat = samples.reshape(episodes, count, -1)
    scale = np.sqrt(samples.shape[2] * samples.shape[3])
    away = np.linalg.norm(flat - truth.reshape(episodes, 1, -1), axis=-1).mean(axis=1) / scale
    if count == 1:
        return away
    apart = [np.linalg.norm(one[:, None] - one[None], axis=-1).sum() / (count * (count - 1)) for one in flat]
    return away - np.array(apart) / scale / 2


def collisions(futures: np.ndarray, nearest: float) -> np.ndarray:
    """Whether two agents come nearer than this at any step of (..., steps, agents, 2): (...) bool."""
    i, j = np.triu_indices(futures.shape[-2], 1)
    if not len(i):
        return np.zeros(futures.shape[:-3], bool)
    apart = np.linalg.norm(futures[..., i, :] - futures[..., j, :], axis=-1)  # (..., steps, pairs)
    return (apart < nearest).any(axis=(-2, -1))


def constant_velocity(history: np.ndarray, steps: int) -> np.ndarray:
    """What comes if all agents of (episodes, observed, agents, 2) go on as between their last two steps, (episodes,
    steps, agents, 2)."""
    last = history[:, -1:]
    return last + np.arange(1, steps + 1)[:, None, None] * (last - history[:, -2:-1])


# Modes


def count_modes(labels: Sequence[Sequence[str | None]], modes: Sequence[str]) -> np.ndarray:
    """How many samples of each episode have each mode, (episodes, M)."""
    return np.array([[sum(one == mode for one in of_episode) for mode in modes] for of_episode in labels])


def mode_errors(counts: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean over the modes of how far the shares of N samples, counts (episodes, M), are from the true probabilities,
    (episodes,)."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.abs(shares - true).mean(axis=1)


def least_mode_errors(true: np.ndarray, count: int) -> np.ndarray:
    """What `mode_errors` are on average of N = `count` samples of the true distribution, (episodes,): the mean absolute
    deviation of binomial shares, 2 v C(N, v) p^v (1 - p)^(N - v + 1) / N with v = floor(N p) + 1 (de Moivre)."""
    p = np.clip(true.astype(np.float64), 1e-12, 1 - 1e-12)
    v = np.minimum(np.floor(count * p) + 1, count)
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    choose = factorial[count] - factorial[v.astype(int)] - factorial[(count - v).astype(int)]
    logs = np.log(2 * v / count) + choose + v * np.log(p) + (count - v + 1) * np.log1p(-p)
    return np.exp(logs).mean(axis=1)


def log_scores(counts: np.ndarray, came: np.ndarray) -> np.ndarray:
    """-log of the predicted probability of the mode that came, by its index (episodes,): (n + 1) / (N + M), as a mode
    that no sample shows is not impossible (Laplace). [nats]"""
    smooth = (counts + 1) / (counts.sum(axis=1, keepdims=True) + counts.shape[1])
    return -np.log(smooth[np.arange(len(came)), came])


def reliability(shares: np.ndarray, came: np.ndarray, true: np.ndarray | None) -> list[Bin]:
    """Predictions (episodes, M), each of a mode in an episode, in bins of like probability: which share of them came,
    and what was true of them; intervals over episodes."""
    happened = came[:, None] == np.arange(shares.shape[1])
    bins = np.minimum((shares * BINS).astype(int), BINS - 1)
    found = []
    for which in np.unique(bins):
        inside = bins == which
        each = inside.sum(axis=1)
        episodes = each > 0
        sums = [np.where(inside, of, 0).sum(axis=1)[episodes] for of in (happened, shares if true is None else true)]
        known = Metric(None) if true is None else clustered_mean(sums[1], each[episodes], (0.0, 1.0))
        share = clustered_share(sums[0].astype(float), each[episodes])
        found.append(Bin(float(shares[inside].mean()), int(inside.sum()), share, known))
    return found


# With intervals


def mean_of(values: np.ndarray, bounds: tuple[float, float] | None = None) -> Metric:
    """The mean over episodes."""
    return clustered_mean(values.astype(float), np.ones(len(values)), bounds)


def share_of(values: np.ndarray) -> Metric:
    """The share of episodes that are true; of shares (episodes,), their mean."""
    return wilson(float(values.sum()), len(values)) if values.dtype == bool else mean_of(values, (0.0, 1.0))


class Judged(NamedTuple):
    """How samples are judged."""

    miss_distance: float
    """Farther from what came than this, an end is missed."""
    collision_distance: float
    """Agents nearer to each other than this collide."""


def judge(samples: np.ndarray, truth: np.ndarray, how: Judged) -> dict[str, dict[str, Metric]]:
    """Distances, misses and collisions of sampled futures: by name, and by the number of samples where it matters."""
    distances = joint_distances(samples, truth)
    counts = [k for k in COUNTS if k <= samples.shape[1]]
    return {
        "min_ade": {str(k): mean_of(min_ade(distances, k)) for k in counts},
        "min_fde": {str(k): mean_of(min_fde(distances, k)) for k in counts},
        "miss_rate": {str(k): share_of(misses(distances, k, how.miss_distance)) for k in counts},
        "brier_min_fde": {str(k): mean_of(brier_min_fde(distances, k)) for k in counts},
        "energy_score": {"": mean_of(energy_score(samples, truth))},
        "collision_rate": {"": share_of(collisions(samples, how.collision_distance).mean(axis=1))},
    }


def judge_modes(counts: np.ndarray, came: np.ndarray, true: np.ndarray | None) -> dict[str, dict[str, Metric]]:
    """How predicted modes, counts (episodes, M), fit those that came, by index (episodes,), and the true probabilities
    (episodes, M), where they are known."""
    found = {"log_score": {"": mean_of(log_scores(counts, came))}}
    if true is not None:
        found["mode_error"] = {"": mean_of(mode_errors(counts, true), (0.0, 1.0))}
    return found

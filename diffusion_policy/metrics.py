"""What evaluations measure: pure functions of episodes, each a value with its 95 % interval.

Knows episodes. Knows no simulator and no policy.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

NONE = "none"
"""Label under which episodes without a mode are counted."""


@dataclass(frozen=True)
class Episode:
    """One rollout."""

    seed: int
    success: bool
    mode: str | None
    """None: no mode completed."""
    observations: dict[str, np.ndarray]
    """Each key: (steps + 1, ...)."""
    actions: np.ndarray
    """Raw, (steps, A)."""


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % interval; None where it is undefined or not computed."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ModeCount:
    """How often a mode was taken."""

    episodes: int
    successes: int
    success_rate: Metric
    """Successes among the episodes that took this mode."""


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Metric:
    """A proportion with its score interval (Wilson 1927); all None without trials."""
    if trials == 0:
        return Metric(None)
    z = norm.ppf((1 + confidence) / 2)
    share = successes / trials
    center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Metric(share, max(0.0, float(center - half)), min(1.0, float(center + half)))


def success_rate(episodes: Sequence[Episode]) -> Metric:
    """Share of successful episodes."""
    return wilson(sum(episode.success for episode in episodes), len(episodes))


def count_modes(episodes: Iterable[Episode], modes: Sequence[str]) -> dict[str, ModeCount]:
    """Episodes and successes of every mode, and of `none` where any episode has no mode."""
    taken, succeeded = Counter(), Counter()
    for episode in episodes:
        taken[episode.mode or NONE] += 1
        succeeded[episode.mode or NONE] += episode.success
    labels = [*modes, NONE] if taken[NONE] else modes
    return {
        label: ModeCount(taken[label], succeeded[label], wilson(succeeded[label], taken[label])) for label in labels
    }


def mode_entropy(counts: Mapping[str, int], modes: Sequence[str]) -> float | None:
    """Behaviour entropy −Σ p log_|B| p of the modes among `counts`, from 0 (one mode) to 1 (all equally often); |B| is
    the number of `modes` (Jia et al. 2024, arXiv 2402.14606, eq. 3). None without any count or with a single mode."""
    total = sum(counts.get(mode, 0) for mode in modes)
    if total == 0 or len(modes) < 2:
        return None
    shares = np.array([counts.get(mode, 0) / total for mode in modes])
    shares = shares[shares > 0]
    return abs(float(-(shares * np.log(shares)).sum() / math.log(len(modes))))


def mode_coverage(counts: Mapping[str, int], modes: Sequence[str]) -> float | None:
    """Share of the modes that occur among `counts`; None without modes."""
    return sum(counts.get(mode, 0) > 0 for mode in modes) / len(modes) if modes else None


def successes_by_mode(episodes: Iterable[Episode]) -> dict[str, int]:
    """How many successful episodes took each mode: what entropy and coverage count."""
    return dict(Counter(episode.mode for episode in episodes if episode.success and episode.mode is not None))


def percentiles(values: Sequence[float], which: Sequence[int]) -> dict[str, float]:
    """{"p50": ..., "p95": ...}."""
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in which}

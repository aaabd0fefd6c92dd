"""Two evaluations on the same seeds: is one policy better than the other, and how many more episodes would tell?

Knows outcomes as plain data (those of results.json). Knows no environment and no policy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri

from diffusion_policy.evaluation.intervals import CONFIDENCE, Metric, by_cluster, clustered_mean, effective_trials

POWER = 0.8
"""With how many more episodes the difference would show with this probability."""
SCORE = "score"
Z = float(ndtri((1 + CONFIDENCE) / 2))

Outcomes = Sequence[Mapping[str, Any]]
"""Each with `seed`, `repeat`, `success` and `measures`."""
Name = tuple[int, int]
"""Seed and repeat of an episode."""


@dataclass(frozen=True)
class Comparison:
    """What two policies, A and B, did in the same episodes. Differences are B less A."""

    episodes: int
    """In both evaluations: those that are compared."""
    left_out_a: int
    """Episodes that only A's evaluation has."""
    left_out_b: int
    both: int
    """Episodes in which both succeeded."""
    only_a: int
    only_b: int
    neither: int
    only_a_seeds: tuple[Name, ...]
    """(seed, repeat) of the episodes in which only A succeeded."""
    only_b_seeds: tuple[Name, ...]
    success_difference: Metric
    p_value: float
    """How probable so large a difference in successes is when there is none: McNemar's exact test."""
    score_difference: Metric | None
    """Of the measure `score`, None where an episode has none."""
    more_episodes: int | None
    """So many further episodes would show a difference as large as this one with a probability of 80 %; 0 where it
    shows already; None where there is no difference."""
    sentence: str


def compare(a: Outcomes, b: Outcomes) -> Comparison:
    """Compare the outcomes of two evaluations, paired by seed and repeat. Raises ValueError when they share none."""
    first, second = ({(one["seed"], one.get("repeat", 0)): one for one in outcomes} for outcomes in (a, b))
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError(f"no episode is in both evaluations: A has {_seeds(first)}, B has {_seeds(second)}")
    only_a = tuple(name for name in common if first[name]["success"] and not second[name]["success"])
    only_b = tuple(name for name in common if second[name]["success"] and not first[name]["success"])
    both = sum(bool(first[name]["success"] and second[name]["success"]) for name in common)

    differences, counts = by_cluster(
        [seed for seed, _ in common], [(name in only_b) - (name in only_a) for name in common]
    )
    pairs = len(common)
    gain = len(only_b) - len(only_a)
    discordant = len(only_a) + len(only_b)
    worth = effective_trials(differences, counts, discordant / pairs - (gain / pairs) ** 2) / pairs
    p_value = sign_flip_test(differences)
    low, high = paired_interval(len(only_a) * worth, len(only_b) * worth, pairs * worth)
    success = Metric(gain / pairs, low, high)
    more = 0 if p_value < 1 - CONFIDENCE else _more_episodes(discordant, gain, pairs, worth)
    return Comparison(
        pairs,
        len(first) - pairs,
        len(second) - pairs,
        both,
        len(only_a),
        len(only_b),
        pairs - both - discordant,
        only_a,
        only_b,
        success,
        p_value,
        _score_difference(first, second, common),
        more,
        _sentence(success, p_value, more, discordant, pairs),
    )


def sign_flip_test(differences: np.ndarray) -> float:
    """Two-sided p-value of whole numbers (G,), each of which might as well have the other sign: the share of all 2^G
    choices of signs whose sum is at least as far from 0. For one episode a seed, each 1, 0 or −1, it is the exact test
    of McNemar (1947, Psychometrika 12); for more, seeds and not episodes are taken to be independent."""
    sizes = np.abs(np.rint(differences)).astype(int)
    chances = np.ones(1)  # of the sums −reach, −reach + 2, ..., reach
    reach = 0
    for size in sizes[sizes > 0]:
        wider = np.zeros(reach + size + 1)
        wider[: reach + 1] += chances / 2
        wider[size:] += chances / 2
        chances, reach = wider, reach + size
    sums = 2 * np.arange(reach + 1) - reach
    return min(1.0, float(chances[np.abs(sums) >= abs(np.rint(differences).sum())].sum()))


def paired_interval(only_a: float, only_b: float, pairs: float) -> tuple[float, float]:
    """95 % interval of the difference (B less A) between two shares of the same pairs: all differences that the score
    test does not reject (Tango 1998, Statistics in Medicine 17). It has a width without discordant pairs, too:
    ±z² / (pairs + z²)."""

    def score(difference: float) -> float:
        """The score statistic for a true difference; q: the share of pairs of A alone that is then most likely."""
        linear = -only_a - only_b + (2 * pairs - only_b + only_a) * difference
        constant = -only_a * difference * (1 - difference)
        q = (math.sqrt(max(linear**2 - 8 * pairs * constant, 0)) - linear) / (4 * pairs)
        variance = pairs * (2 * q + difference * (1 - difference))
        return (only_b - only_a - pairs * difference) / math.sqrt(max(variance, 1e-300))

    found = (only_b - only_a) / pairs
    edge = 1 - 1e-9
    low: Any = -1.0 if found <= -edge else brentq(lambda d: score(d) - Z, -edge, found)
    high: Any = 1.0 if found >= edge else brentq(lambda d: score(d) + Z, found, edge)
    return float(low), float(high)


def _more_episodes(discordant: int, gain: int, pairs: int, worth: float) -> int | None:
    """How many pairs beyond those at hand McNemar's test needs for a difference as large as the one seen (Miettinen
    1968, Biometrics 24; Connor 1987, Biometrics 43); `worth`: independent pairs in one."""
    if gain == 0:
        return None
    share, difference = discordant / pairs, gain / pairs
    needed = (Z * math.sqrt(share) + ndtri(POWER) * math.sqrt(max(share - difference**2, 0))) ** 2 / difference**2
    return max(1, math.ceil(needed / worth) - pairs)


def _score_difference(first: Mapping[Name, Any], second: Mapping[Name, Any], common: Sequence[Name]) -> Metric | None:
    """Mean difference in score, resampled by seed."""
    scores = [[outcomes[name].get("measures", {}).get(SCORE) for name in common] for outcomes in (first, second)]
    if any(score is None for score in (*scores[0], *scores[1])):
        return None
    differences = [of_b - of_a for of_a, of_b in zip(*scores, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers near the largest there are
        sums, counts = by_cluster([seed for seed, _ in common], differences)
        return clustered_mean(sums, counts, bounds=(-1, 1))


def _sentence(success: Metric, p_value: float, more: int | None, discordant: int, pairs: int) -> str:
    value, low, high = (100 * (end or 0.0) for end in (success.value, success.low, success.high))
    interval = f"95 % interval of B less A {low:+.1f} to {high:+.1f} points"
    if more is None:
        same = "the same" if discordant == 0 else "equally many"
        return (
            f"No difference was seen: A and B succeed in {same} of {pairs} episodes ({interval}). If they are equally "
            "good, no number of further episodes will tell them apart."
        )
    better, worse = ("B", "A") if value > 0 else ("A", "B")
    seen = f"{better} succeeds in {abs(value):.1f} percentage points more of {pairs} episodes than {worse}"
    test = f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"
    if more == 0:
        return f"The difference is real: {seen} ({test}, {interval}). No further episodes are needed."
    return (
        f"The difference may be chance: {seen} ({test}, {interval}). If it is as large as it looks, about {more} more "
        f"episode{'s' if more > 1 else ''} would show it with a probability of {100 * POWER:.0f} %."
    )


def _seeds(outcomes: Mapping[Name, Any]) -> str:
    if not outcomes:
        return "no episodes"
    seeds = [seed for seed, _ in outcomes]
    repeats = 1 + max(repeat for _, repeat in outcomes)
    return f"seeds {min(seeds)} to {max(seeds)}" + (f" in {repeats} repeats" if repeats > 1 else "")

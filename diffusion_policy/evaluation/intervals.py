"""Numbers with 95 % intervals: shares, means, quantiles, and how spread a choice among modes is.

Episodes of one seed are alike, so the units that are resampled, and counted where nothing varies, are seeds ("clusters"
below). Everything is deterministic: resampling draws from generators seeded here. Knows counts and values. Knows no
episodes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, ndtr, ndtri, stdtrit  # scipy.stats, which has the same, takes half a second to import

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2
RESAMPLES = 2000
"""Draws of a bootstrap."""

NULL_DRAWS = 800
"""Draws from each policy that `spread_interval` tests."""
NULL_TAIL = 0.02
"""Share of these below which a policy is rejected: less than 2.5 %, because the family of policies is itself taken from
the counts, which costs up to three points of coverage."""
TOO_CLOSE = 0.16
"""Counts that fit the reference better than in this share of draws from the reference itself exclude no more policies
than if they fitted just so well."""
ROUNDING = 1e-9
SMALLEST_SHARE = 1e-6
"""In place of 0 for a reference's logarithms."""
SMALLEST_ERROR = 1e-6
"""Added to standard errors, which are 0 where all counts are in one mode or equal."""
RARE = 0.01
"""`coverage` takes no mode to be rarer than this, unless it is never taken."""


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % interval; None where it is undefined or not computed."""

    value: float | None
    low: float | None = None
    high: float | None = None


# Shares and means


def wilson(successes: float, trials: float, confidence: float = CONFIDENCE) -> Metric:
    """A proportion with its score interval (Wilson 1927); all None without trials. Trials need not be whole."""
    if trials == 0:
        return Metric(None)
    z = ndtri((1 + confidence) / 2)
    share = successes / trials
    center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = max(0.0, float(center - half)), min(1.0, float(center + half))
    return Metric(share, min(low, share), max(high, share))  # the formula's ends round past 0 and 1


def by_cluster(clusters: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster, in the order of the clusters' numbers, each (G,)."""
    which = np.unique(np.asarray(clusters, dtype=int), return_inverse=True)[1]
    return np.bincount(which, weights=np.asarray(values, dtype=float)), np.bincount(which)


def effective_trials(sums: np.ndarray, counts: np.ndarray, variance: float) -> float:
    """How many independent trials the trials of G clusters are worth; `sums` of their values (G,), or of several values
    of each (G, K), `counts` (G,).

    Trials divided by the design effect: the variance of the mean as it shows between clusters, over that of independent
    trials of this `variance` (of K values both are summed: Rao & Scott 1981, JASA 76). The effect lies between 1 and
    the size of a cluster; Student's correction stands for few clusters (Korn & Graubard 1998, Survey Methodology 24).
    Where no trial differs from another nothing is known of how alike a cluster is, and it counts once. Trials
    themselves where each is a cluster.
    """
    clusters, trials = len(counts), float(np.sum(counts))
    if clusters == trials:
        return trials
    if clusters == 1 or variance <= 1e-12:
        return float(clusters)
    values = np.reshape(sums, (clusters, -1)).astype(float)
    deviations = values - np.outer(counts, values.sum(axis=0) / trials)
    between = clusters / (clusters - 1) * float((deviations**2).sum()) / trials**2
    effect = min(max(between * trials / variance, 1.0), trials / clusters)
    student = float(ndtri(1 - TAIL) / stdtrit(clusters - 1, 1 - TAIL)) ** 2
    return max(student * trials / effect, 1.0)


def clustered_share(successes: np.ndarray, trials: np.ndarray) -> Metric:
    """A proportion from clusters with `successes` among `trials`, each (G,): Wilson's interval with the effective
    number of trials (as compared by Dean & Pagano 2015, J. Survey Statistics and Methodology 3)."""
    if np.sum(trials) == 0:
        return Metric(None)
    share = float(np.sum(successes) / np.sum(trials))
    worth = effective_trials(successes, trials, share * (1 - share))
    interval = wilson(share * worth, worth)
    return Metric(share, interval.low, interval.high)


def clustered_mean(sums: np.ndarray, counts: np.ndarray, bounds: tuple[float, float] | None = None) -> Metric:
    """The mean of values whose `sums` and `counts` in each cluster are given, each (G,), with its BCa bootstrap
    interval over clusters (Efron 1987, JASA 82), which stays within the data's range.

    Where all clusters agree there is nothing to resample, but values never met are as likely as successes never met:
    within known `bounds` the ends are then where the mean would lie if Wilson's share for G of G held the common value
    and the rest a bound. Without bounds, or for a single cluster, the ends are None; without any count, or where a
    value is not finite, the mean is.
    """
    clusters = len(counts)
    if clusters == 0 or not np.isfinite(sums).all():
        return Metric(None)
    mean = float(sums.sum() / counts.sum())
    if clusters == 1:
        return Metric(mean)
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    influence = left_out.mean() - left_out
    if np.ptp(sums / counts) <= 1e-12 * max(1.0, abs(mean)):
        seen = wilson(clusters, clusters).low
        if bounds is None or seen is None:
            return Metric(mean)
        return Metric(mean, bounds[0] + seen * (mean - bounds[0]), bounds[1] - seen * (bounds[1] - mean))
    chosen = np.random.default_rng(0).integers(clusters, size=(RESAMPLES, clusters))
    means = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    below = (np.mean(means < mean) + np.mean(means <= mean)) / 2
    bias = ndtri(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    skew = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    shifted = bias + ndtri([TAIL, 1 - TAIL])
    low, high = np.quantile(means, ndtr(bias + shifted / (1 - skew * shifted)))
    return Metric(mean, min(float(low), mean), max(float(high), mean))


def quantile(values: Sequence[float], percent: float) -> Metric:
    """A percentile with the order statistics around it that hold it with 95 %, whatever the distribution (Hahn & Meeker
    1991, chapter 5); an end is None where the sample is too small to have one."""
    if not len(values):
        return Metric(None)
    ordered = np.sort(np.asarray(values, dtype=float))
    total = len(ordered)
    under = bdtr(np.arange(total + 1), total, percent / 100)  # P(at most k values lie below the true percentile)
    low = int(np.searchsorted(under, TAIL, side="right"))  # the most values that P(fewer of them lie below) <= TAIL
    high = int(np.searchsorted(under, 1 - TAIL)) + 1  # the fewest with P(that many or more lie below) <= TAIL
    return Metric(
        float(np.percentile(ordered, percent)),
        float(ordered[low - 1]) if low >= 1 else None,
        float(ordered[high - 1]) if high <= total else None,
    )


# How spread a choice among modes is


class Spread(NamedTuple):
    """What a measure f(p) = Σ f_i(p_i) of distributions p (..., K) is, and its slopes, 0 where p is."""

    value: np.ndarray
    """(...,)"""
    slope: np.ndarray
    """∂f/∂p_i up to a constant, (..., K)."""
    curvature: np.ndarray
    """p_i ∂²f/∂p_i², (..., K)."""


Measure = Callable[[np.ndarray, np.ndarray], Spread]
"""(distributions (..., K), reference (K,)) → how far each is from the reference, 0 at the reference itself."""


def concentration(shares: np.ndarray, reference: np.ndarray) -> Spread:
    """1 − H: what is missing to the entropy −Σ p log_K p of the uniform distribution, which `reference` must be."""
    modes = len(reference)
    slope = np.log(np.where(shares > 0, shares, 1)) / math.log(modes)
    return Spread(1 + (shares * slope).sum(axis=-1), slope, (shares > 0) / math.log(modes))


def jensen_shannon(shares: np.ndarray, reference: np.ndarray) -> Spread:
    """Divergence of Jensen and Shannon to the reference, 0 (equal) to 1 (no mode in common): with m = (p + q) / 2,
    ½ Σ p log₂(p/m) + ½ Σ q log₂(q/m) (Lin 1991, IEEE Trans. Inf. Theory 37)."""
    middle = np.where(shares + reference > 0, (shares + reference) / 2, 1)
    slope = np.log2(np.where(shares > 0, shares / middle, 1)) / 2
    rest = reference * np.log2(np.where(reference > 0, reference / middle, 1)) / 2
    curvature = (shares > 0) * reference / (4 * middle * math.log(2))
    return Spread((shares * slope).sum(axis=-1) + rest.sum(axis=-1), slope, curvature)


def estimate(counts: np.ndarray, reference: np.ndarray, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """f from counts (..., K) less its bias, and its standard error, each (...,): Taylor's series of f(p̂) around p to
    the second order, Σ f'' p (1 − p) / 2n over the modes that were met. For the entropy this is Miller's and Madow's
    correction (Miller 1955)."""
    total = counts.sum(axis=-1)
    shares = counts / total[..., None]
    spread = measure(shares, reference)
    bias = (spread.curvature * (1 - shares)).sum(axis=-1) / (2 * total)
    variance = (shares * spread.slope**2).sum(axis=-1) - (shares * spread.slope).sum(axis=-1) ** 2
    return spread.value - bias, np.sqrt(np.maximum(variance, 0) / total)


def spread_interval(counts: np.ndarray, reference: np.ndarray, measure: Measure) -> tuple[float, float]:
    """95 % interval of f(p), from counts (K,), whole or not, of independent draws from p.

    f(p̂) is biased, and for a policy that equals the reference all of it lies on one side of the truth. So bootstraps
    fail: percentile intervals cover nothing there from four modes on, and basic ones, clipped, 68 to 93 % of skewed
    policies at 50 episodes. This interval, which covers at least 95 % there, inverts a test instead: it holds f of all
    policies of a family under which the counts would not be unusual. Unusual: the studentized estimate lies within
    NULL_TAIL of either end of its distribution. Counts that happen to fit the reference too well would exclude all
    else; TOO_CLOSE bounds what they exclude (Cowan et al. 2011, arXiv 1105.3166).
    """
    family = _Family.through(counts, reference, measure)
    found = estimate(counts, reference, measure)
    estimates, errors = family.draw(0)
    at_reference = family.studentized(0, (estimates, errors))
    just_so = np.argsort(at_reference, kind="stable")[int(TOO_CLOSE * NULL_DRAWS)]
    nearest = max(found, (estimates[just_so], errors[just_so]), key=lambda one: float(family.studentized(0, one)))

    def not_too_far(s: float) -> bool:
        seen = family.studentized(s, found)
        return float(np.mean(family.studentized(s, family.draw(s)) >= seen - ROUNDING * (1 + abs(seen)))) >= NULL_TAIL

    def too_close(s: float) -> bool:
        seen = family.studentized(s, nearest)
        return float(np.mean(family.studentized(s, family.draw(s)) <= seen + ROUNDING * (1 + abs(seen)))) < NULL_TAIL

    value = float(found[0])
    return _boundary(not_too_far, family, value), _boundary(too_close, family, value)


@dataclass(frozen=True)
class _Family:
    """Policies p_s ∝ q^(1−s) p̃^s, s ≥ 0, from the reference q on through the counts p̃ and beyond, ever farther.

    For the entropy this is the family along which data say least of f, so that no other is harder (Stein 1956; for
    bootstraps DiCiccio & Romano 1990, Int. Stat. Review 58).
    """

    reference: np.ndarray
    direction: np.ndarray
    """log (p̃ / q), (K,)."""
    total: int
    measure: Measure

    @classmethod
    def through(cls, counts: np.ndarray, reference: np.ndarray, measure: Measure) -> "_Family":
        """p̃ spreads over all modes the share of those met once, which estimates what was missed (Good 1953, Biometrika
        40)."""
        total, modes = max(round(float(counts.sum())), 1), len(counts)
        missed = min(max(float(counts[counts <= 1].sum()), 0.5) / total, 0.5)
        smooth = (1 - missed) * counts / counts.sum() + missed / modes
        # Where the counts equal the reference the family needs some direction; else this tilt is lost in their noise
        tilt = np.linspace(-1, 1, modes) * 0.01 / math.sqrt(total)
        return cls(reference, np.log(smooth) - np.log(np.maximum(reference, SMALLEST_SHARE)) + tilt, total, measure)

    def policy(self, s: float) -> np.ndarray:
        """p_s, (K,); p_∞ takes a single mode."""
        if s == 0:
            return self.reference
        if math.isinf(s):
            return np.eye(len(self.reference))[self.direction.argmax()]
        logits = np.log(np.maximum(self.reference, SMALLEST_SHARE)) + s * self.direction
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def distance(self, s: float) -> float:
        """f(p_s)."""
        return float(self.measure(self.policy(s), self.reference).value)

    def draw(self, s: float) -> tuple[np.ndarray, np.ndarray]:
        """Estimates of f and their errors for counts drawn from p_s, each (NULL_DRAWS,); always the same ones."""
        shares = self.policy(s)
        order = np.argsort(-shares)  # numpy draws multinomials faster when the common ones come first
        counts = np.random.default_rng(0).multinomial(self.total, shares[order], NULL_DRAWS)
        return estimate(counts, self.reference[order], self.measure)

    def studentized(self, s: float, estimates: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """By how many of their errors estimates differ from f(p_s)."""
        value, error = estimates
        return (value - self.distance(s)) / (error + SMALLEST_ERROR)


def _boundary(holds: Callable[[float], bool], family: _Family, value: float) -> float:
    """f where a condition begins to hold on the way along a family, to 3 % of its distance to `value`: 0 if it always
    does, that of a single mode if it never does."""
    if holds(0):
        return family.distance(0)
    low, high = 0.0, 1.0
    while not holds(high):
        if family.policy(high).max() > 1 - ROUNDING:
            return family.distance(math.inf)
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        near, far = family.distance(low), family.distance(high)
        if far - near <= 0.03 * abs(family.distance(middle) - value):
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return family.distance((low + high) / 2)


def coverage(counts: np.ndarray) -> Metric:
    """Share of the modes that are ever taken, from how often each was, (K,).

    Modes that were met are certain, so the low end is the value itself. For the high end no sample excludes a mode of
    any rarity; it assumes that a mode is taken never or in at least RARE of the episodes, and holds every number of
    modes of which so few would be met with a probability of at least 5 %, even if all but one are that rare (and met
    independently; in truth meeting one leaves less room for others, so that so few are met less often: Joag-Dev &
    Proschan 1983, Ann. Statist. 11).
    """
    modes, met, total = len(counts), int((counts > 0).sum()), float(counts.sum())
    if total == 0:
        return Metric(0.0, 0.0, 1.0)
    number = np.arange(met, modes + 1)
    probability = bdtr(met - 1, number - 1, 1 - (1 - min(RARE, 1 / modes)) ** total)
    return Metric(met / modes, met / modes, float(number[probability >= 1 - CONFIDENCE].max() / modes))

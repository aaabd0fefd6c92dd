import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from diffusion_policy.evaluation.intervals import (
    Measure,
    Metric,
    by_cluster,
    clustered_mean,
    clustered_share,
    concentration,
    coverage,
    effective_trials,
    estimate,
    jensen_shannon,
    quantile,
    spread_interval,
    wilson,
)

# Shares


@given(st.integers(1, 500).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    successes, trials = counts
    reference = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    metric = wilson(successes, trials)
    assert metric.value == successes / trials
    assert metric.low == pytest.approx(reference.low, abs=1e-9)
    assert metric.high == pytest.approx(reference.high, abs=1e-9)


def test_nothing_is_known_without_trials() -> None:
    assert wilson(0, 0) == clustered_share(np.zeros(0), np.zeros(0)) == Metric(None, None, None)


@pytest.mark.parametrize("trials, least", [(10, 0.89), (50, 0.93), (100, 0.92), (500, 0.93)])
def test_wilson_covers_exactly_as_published(trials: int, least: float) -> None:
    """Exact coverage over all counts: 95 % on average over p, and the known dips (Brown, Cai & DasGupta 2001)."""
    ends = [wilson(successes, trials) for successes in range(trials + 1)]
    low, high = np.array([[end.low, end.high] for end in ends]).T
    truth = np.linspace(0.001, 0.999, 999)[:, None]
    covered = (binom.pmf(np.arange(trials + 1), trials, truth) * ((low <= truth) & (truth <= high))).sum(axis=1)
    assert covered.mean() == pytest.approx(0.95, abs=0.005)
    assert covered[(truth[:, 0] >= 0.05) & (truth[:, 0] <= 0.95)].min() >= least
    assert covered.min() >= 0.84


def test_single_episodes_of_seeds_are_independent_trials() -> None:
    successes = np.array([1, 0, 1, 1])
    assert clustered_share(successes, np.ones(4)) == wilson(3, 4)


def test_repeats_that_always_agree_are_worth_one_trial() -> None:
    all_alike = clustered_share(np.array([5, 0] * 50), np.full(100, 5))
    plain = wilson(50, 100)
    assert all_alike.low == pytest.approx(plain.low, abs=0.002)
    assert all_alike.high == pytest.approx(plain.high, abs=0.002)


def test_repeats_that_differ_as_coins_do_are_worth_almost_all_trials() -> None:
    successes = np.random.default_rng(0).binomial(5, 0.5, 100)
    assert 400 < effective_trials(successes, np.full(100, 5), 0.25) <= 500


def test_repeats_of_certain_success_count_once_a_seed() -> None:
    assert clustered_share(np.full(20, 5), np.full(20, 5)).low == wilson(20, 20).low


def test_a_single_seed_tells_little_of_others() -> None:
    assert clustered_share(np.array([7]), np.array([10])) == Metric(0.7, *_ends(wilson(0.7, 1)))


@pytest.mark.parametrize("likeness", [0.02, 0.3, 0.9])
def test_shares_of_seeds_that_repeat_are_covered(likeness: float) -> None:
    rng = np.random.default_rng(0)
    more = (1 - likeness) / likeness
    rates = rng.beta(0.7 * more, 0.3 * more, (500, 25))
    intervals = [clustered_share(row, np.full(25, 5)) for row in rng.binomial(5, rates)]
    assert np.mean([_holds(interval, 0.7) for interval in intervals]) >= 0.93


# Means and quantiles


def test_means_are_ratios_of_what_clusters_sum_up_to() -> None:
    sums, counts = by_cluster([7, 3, 7], [1.0, 5.0, 2.0])
    assert sums.tolist() == [5, 3]
    assert counts.tolist() == [1, 2]
    assert clustered_mean(sums, counts).value == pytest.approx(8 / 3)


@pytest.mark.parametrize("episodes", [20, 100])
def test_means_of_skewed_scores_are_covered(episodes: int) -> None:
    scores = np.random.default_rng(1).beta(0.5, 0.2, (200, episodes))
    intervals = [clustered_mean(row, np.ones(episodes), (0, 1)) for row in scores]
    assert np.mean([_holds(interval, 0.5 / 0.7) for interval in intervals]) >= 0.92


def test_equal_values_within_bounds_are_as_uncertain_as_equal_successes() -> None:
    best = clustered_mean(np.ones(50), np.ones(50), (0, 1))
    assert best == Metric(1, wilson(50, 50).low, 1)
    middle = clustered_mean(np.full(50, 0.5), np.ones(50), (0, 1))
    assert middle.low == pytest.approx(0.5 * (wilson(50, 50).low or 0))
    assert middle.high == pytest.approx(1 - 0.5 * (wilson(50, 50).low or 0))


def test_a_mean_without_spread_or_bounds_has_no_interval() -> None:
    assert clustered_mean(np.full(3, 2.0), np.ones(3)) == Metric(2)
    assert clustered_mean(np.full(1, 2.0), np.ones(1), (0, 3)) == Metric(2)


def test_there_is_no_mean_of_nothing_or_of_what_is_not_finite() -> None:
    assert clustered_mean(np.zeros(0), np.zeros(0)) == Metric(None)
    assert clustered_mean(np.array([1, np.nan]), np.ones(2)) == Metric(None)


def test_quantiles_lie_between_order_statistics() -> None:
    """For the median of 10, ranks 2 and 9 hold it with 1 − 2 (1 + 10) / 2^10 = 97.9 %."""
    assert quantile([*range(10)], 50) == Metric(4.5, 1, 8)


def test_an_end_of_a_quantile_needs_enough_values() -> None:
    assert quantile(range(71), 95).high is None
    assert quantile(range(72), 95).high == 71
    assert quantile(range(5), 50) == Metric(2, None, None)
    assert quantile([], 50) == Metric(None)


@pytest.mark.parametrize("percent", [50, 95])
def test_quantiles_are_covered(percent: int) -> None:
    samples = np.random.default_rng(2).exponential(size=(1000, 100))
    truth = -math.log(1 - percent / 100)
    assert np.mean([_holds(quantile(row, percent), truth) for row in samples]) >= 0.95


# Distributions over modes


def uniform(modes: int) -> np.ndarray:
    return np.full(modes, 1 / modes)


def geometric(modes: int) -> np.ndarray:
    return _scaled(0.5 ** np.arange(modes))


def zipf(modes: int) -> np.ndarray:
    return _scaled(1 / np.arange(1, modes + 1))


def half_zipf(modes: int) -> np.ndarray:
    """Skewed, and half of the modes never taken."""
    return _scaled((np.arange(modes) < modes / 2) / np.arange(1, modes + 1))


def half(modes: int) -> np.ndarray:
    """Half of the modes never taken."""
    return _scaled(np.arange(modes) < modes / 2)


def backwards(modes: int) -> np.ndarray:
    return zipf(modes)[::-1]


def share_covered(measure: Measure, truth: np.ndarray, reference: np.ndarray, episodes: int, draws: int) -> float:
    """In which share of draws the interval holds the true value."""
    samples = np.random.default_rng(20).multinomial(episodes, truth, draws).astype(float)
    if np.ptp(reference) == 0:
        samples = np.sort(samples)  # names do not matter, so that fewer counts differ
    value = float(measure(truth, reference).value)
    known: dict[tuple[float, ...], bool] = {}
    held = 0
    for counts in samples:
        key = tuple(counts)
        if key not in known:
            low, high = spread_interval(counts, reference, measure)
            known[key] = low - 1e-9 <= value <= high + 1e-9
        held += known[key]
    return held / draws


def test_jensen_shannon_by_hand() -> None:
    """Of (1, 0) and (½, ½): ½ log₂(4/3) + ½ (½ log₂(2/3) + ½ log₂ 2)."""
    expected = 0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3) + 0.25
    assert jensen_shannon(np.array([1.0, 0]), np.array([0.5, 0.5])).value == pytest.approx(expected)
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])).value == pytest.approx(1)
    assert jensen_shannon(np.array([0.2, 0.8]), np.array([0.2, 0.8])).value == pytest.approx(0)


@pytest.mark.parametrize("measure", [concentration, jensen_shannon])
def test_slopes_and_curvatures_are_derivatives(measure: Measure) -> None:
    shares, step = zipf(4), 1e-4
    reference = uniform(4) if measure is concentration else geometric(4)
    spread = measure(shares, reference)
    along = np.array([1.0, -1, 0, 0])
    forward, back = (float(measure(shares + sign * step * along, reference).value) for sign in (1, -1))
    assert (forward - back) / (2 * step) == pytest.approx(float(spread.slope @ along), abs=1e-6)
    second = (forward + back - 2 * float(spread.value)) / step**2
    assert second == pytest.approx(float((spread.curvature / shares) @ along**2), abs=1e-4)


@pytest.mark.parametrize("measure", [concentration, jensen_shannon])
def test_the_estimate_is_nearly_unbiased_and_knows_its_error(measure: Measure) -> None:
    reference = uniform(4) if measure is concentration else geometric(4)
    truth = float(measure(zipf(4), reference).value)
    counts = np.random.default_rng(0).multinomial(100, zipf(4), 20_000)
    found, error = estimate(counts, reference, measure)
    plain = measure(counts / 100, reference).value
    assert abs(found.mean() - truth) < 0.1 * abs(plain.mean() - truth)
    assert error.mean() == pytest.approx(found.std(), rel=0.05)


@pytest.mark.parametrize("modes, episodes, draws", [(2, 50, 1000), (2, 500, 1000), (4, 50, 150), (24, 50, 25)])
@pytest.mark.parametrize("policy", [uniform, zipf])
def test_the_true_entropy_is_covered(policy, modes: int, episodes: int, draws: int) -> None:
    assert share_covered(concentration, policy(modes), uniform(modes), episodes, draws) >= 0.92


@pytest.mark.parametrize("modes, episodes, draws", [(2, 50, 1000), (24, 50, 25)])
@pytest.mark.parametrize("policy, demonstrations", [(zipf, zipf), (uniform, zipf)])
def test_the_true_divergence_is_covered(policy, demonstrations, modes: int, episodes: int, draws: int) -> None:
    assert share_covered(jensen_shannon, policy(modes), demonstrations(modes), episodes, draws) >= 0.92


GRID = pytest.mark.parametrize("modes, episodes", [(k, n) for k in (2, 4, 24) for n in (50, 500)])


@pytest.mark.slow
@GRID
@pytest.mark.parametrize("policy", [uniform, geometric, zipf, half, half_zipf])
def test_the_true_entropy_is_covered_in_a_thousand_draws(policy, modes: int, episodes: int) -> None:
    assert share_covered(concentration, policy(modes), uniform(modes), episodes, 1000) >= 0.92


@pytest.mark.slow
@GRID
@pytest.mark.parametrize(
    "policy, demonstrations",
    [(uniform, uniform), (zipf, uniform), (zipf, zipf), (uniform, half), (half, uniform), (zipf, backwards)],
)
def test_the_true_divergence_is_covered_in_a_thousand_draws(policy, demonstrations, modes: int, episodes: int) -> None:
    assert share_covered(jensen_shannon, policy(modes), demonstrations(modes), episodes, 1000) >= 0.92


def test_a_policy_that_took_one_mode_may_take_others() -> None:
    """As the exact interval of a share says: with 50 of 50, another mode may have 1 − tail^(1/50) of the episodes."""
    low, high = spread_interval(np.array([50.0, 0]), uniform(2), concentration)
    rest = 1 - 0.02 ** (1 / 50)
    assert low == pytest.approx(float(concentration(np.array([1 - rest, rest]), uniform(2)).value), abs=0.02)
    assert high == pytest.approx(1)


@pytest.mark.parametrize("measure", [concentration, jensen_shannon])
@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [1, 0, 0, 0], [1, 1, 0, 0], [0.4, 0, 0, 0], [3000, 2, 0, 0]])
def test_intervals_of_odd_counts_are_sound(counts: list[float], measure: Measure) -> None:
    low, high = spread_interval(np.array(counts, dtype=float), uniform(4), measure)
    assert 0 <= low < high <= 1 + 1e-9


def test_a_demonstrated_distribution_may_lack_modes() -> None:
    reference = np.array([0.5, 0.5, 0])
    assert spread_interval(np.array([30.0, 30, 0]), reference, jensen_shannon)[0] == 0
    assert spread_interval(np.array([20.0, 20, 20]), reference, jensen_shannon)[0] > 0.05


def test_intervals_shrink_with_episodes_and_repeat_exactly() -> None:
    few, many = (spread_interval(n * np.array([4.0, 3, 2, 1]), uniform(4), concentration) for n in (5, 50))
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])
    assert many == spread_interval(50 * np.array([4.0, 3, 2, 1]), uniform(4), concentration)


def test_modes_that_were_met_are_certain_and_others_are_not() -> None:
    assert coverage(np.array([3, 1, 0, 0])) == Metric(0.5, 0.5, 1)
    assert coverage(np.array([250, 250])) == Metric(1, 1, 1)
    assert coverage(np.zeros(3)) == Metric(0, 0, 1)


def test_many_episodes_exclude_a_mode_that_they_never_met() -> None:
    """A mode of 1 % is missed by n episodes with 0.99^n, which is 5 % at 298."""
    assert coverage(np.array([297, 0])).high == 1
    assert coverage(np.array([299, 0])).high == 0.5


@pytest.mark.parametrize("episodes", [50, 300])
def test_the_share_of_modes_taken_is_covered_when_as_many_as_may_be_are_rare(episodes: int) -> None:
    truth = np.array([0.9] + 10 * [0.01] + [0])
    samples = np.random.default_rng(3).multinomial(episodes, truth, 1000)
    assert np.mean([_holds(coverage(counts), 11 / 12) for counts in samples]) >= 0.95


def _scaled(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def _ends(metric: Metric) -> tuple[float | None, float | None]:
    return metric.low, metric.high


def _holds(metric: Metric, truth: float) -> bool:
    assert metric.low is not None
    assert metric.high is not None
    return metric.low - 1e-12 <= truth <= metric.high + 1e-12

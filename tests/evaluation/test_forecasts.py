"""Forecasts: each formula on samples made by hand, and against a plainer way to compute it."""

import math

import numpy as np
import pytest

from diffusion_policy.evaluation import forecasts
from diffusion_policy.evaluation.forecasts import Judged
from diffusion_policy.evaluation.intervals import Metric


@pytest.fixture
def made() -> tuple[np.ndarray, np.ndarray]:
    """Two episodes of two agents, three steps and three samples that lie off by known distances."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 5, (2, 3, 2, 2))
    off = np.array([[[4, 4, 4], [1, 1, 4], [2, 2, 2]], [[0, 0, 0], [1, 1, 1], [3, 3, 0]]], float)
    samples = np.repeat(truth[:, None], 3, axis=1)
    samples[..., 0, 0] += off  # the first agent alone is off, so that the mean over agents is half
    return samples, truth


def test_distances_are_averaged_over_agents_before_the_best_sample_is_taken(made) -> None:
    distances = forecasts.joint_distances(*made)
    assert distances.shape == (2, 3, 3)
    np.testing.assert_allclose(forecasts.min_ade(distances, 1), [2, 0])
    np.testing.assert_allclose(forecasts.min_ade(distances, 2), [1, 0])
    np.testing.assert_allclose(forecasts.min_fde(distances, 1), [2, 0])
    np.testing.assert_allclose(forecasts.min_fde(distances, 3), [1, 0])
    np.testing.assert_allclose(forecasts.brier_min_fde(distances, 3), [1 + 4 / 9, 4 / 9])
    assert forecasts.misses(distances, 2, 1.5).tolist() == [True, False]
    assert forecasts.misses(distances, 3, 1.5).tolist() == [False, False]


def test_no_sample_is_right_for_one_agent_alone() -> None:
    truth = np.zeros((1, 1, 2, 2))
    samples = np.array([[[[[0, 0], [6, 0]]], [[[6, 0], [0, 0]]]]], float)  # each right for another agent
    assert forecasts.min_fde(forecasts.joint_distances(samples, truth), 2).item() == 3


def test_the_energy_score_is_that_of_the_formula(made) -> None:
    samples, truth = made
    wanted = []
    for drawn, came in zip(samples, truth, strict=True):

        def norm(a: np.ndarray) -> float:
            return math.sqrt((a**2).sum(-1).mean())

        away = np.mean([norm(one - came) for one in drawn])
        apart = np.mean([norm(drawn[i] - drawn[j]) for i in range(3) for j in range(3) if i != j])
        wanted.append(away - apart / 2)
    np.testing.assert_allclose(forecasts.energy_score(samples, truth), wanted)
    np.testing.assert_allclose(forecasts.energy_score(samples[:, :1], truth), [math.sqrt(8), 0])


def test_the_energy_score_is_least_for_the_true_distribution() -> None:
    rng = np.random.default_rng(0)
    came = rng.choice([-1.0, 1.0], 3000, p=[0.3, 0.7]).reshape(-1, 1, 1, 1) * np.ones((1, 1, 1, 2))

    def score(share: float) -> float:
        drawn = rng.choice([-1.0, 1.0], (3000, 10), p=[1 - share, share]).reshape(3000, 10, 1, 1, 1)
        return forecasts.energy_score(drawn * np.ones((1, 1, 1, 1, 2)), came).mean()

    assert score(0.7) < min(score(0.5), score(0.9), score(1.0))


def test_constant_velocity_is_exact_where_nobody_changes_it() -> None:
    start, velocity = np.array([[[1.0, 2], [3, 4]]]), np.array([[[0.5, -1], [0, 2]]])
    path = start[:, None] + np.arange(12)[:, None, None] * velocity[:, None]
    np.testing.assert_allclose(forecasts.constant_velocity(path[:, :4], 8), path[:, 4:])


def test_agents_collide_where_any_two_come_near_at_the_same_time() -> None:
    rows = np.zeros((2, 3, 3, 2))
    rows[..., 0] = [0, 10, 20]
    rows[1, 1, 2] = rows[1, 1, 0] + [0.6, 0.6]
    assert forecasts.collisions(rows, 1.0).tolist() == [False, True]
    assert forecasts.collisions(rows, 0.8).tolist() == [False, False]
    rows[0, 0, 0], rows[0, 2, 1] = [5, 5], [5, 5]  # at different times
    assert not forecasts.collisions(rows, 1.0)[0]
    assert not forecasts.collisions(rows[:, :, :1], 1.0).any()


def test_mode_figures_are_those_of_their_formulas() -> None:
    counts = forecasts.count_modes([["a", "a", "b", None], ["c", "c", "c", "c"]], ("a", "b", "c"))
    assert counts.tolist() == [[2, 1, 0], [0, 0, 4]]
    true = np.array([[0.5, 0.25, 0.25], [0, 0, 1.0]])
    np.testing.assert_allclose(forecasts.mode_errors(counts, true), [(1 / 6 + 1 / 12 + 1 / 4) / 3, 0])
    np.testing.assert_allclose(forecasts.log_scores(counts, np.array([0, 1])), [math.log(6 / 3), math.log(7 / 1)])
    found = forecasts.judge_modes(counts, np.array([0, 1]), true)
    assert found["log_score"][""].value == pytest.approx((math.log(2) + math.log(7)) / 2)
    assert forecasts.judge_modes(counts, np.array([0, 1]), None).keys() == {"log_score"}


def test_so_many_samples_of_the_truth_are_off_by_so_much() -> None:
    rng, true = np.random.default_rng(0), np.array([[0.1, 0.3, 0.6]])
    drawn = rng.multinomial(20, true[0], 20_000)
    expected = forecasts.mode_errors(drawn, np.repeat(true, 20_000, axis=0)).mean()
    assert forecasts.least_mode_errors(true, 20).item() == pytest.approx(expected, rel=0.02)
    assert forecasts.least_mode_errors(np.array([[0.0, 1.0]]), 20).item() == pytest.approx(0, abs=1e-9)


def test_reliability_says_what_was_true_of_alike_predictions() -> None:
    shares = np.array([[0.25, 0.75], [0.25, 0.75], [0.75, 0.25], [0.25, 0.75]])
    true = np.array([[0.1, 0.9], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    low, high = forecasts.reliability(shares, np.array([1, 1, 0, 0]), true)
    assert (low.predicted, low.predictions, low.happened.value) == (0.25, 4, 0.25)
    assert low.true.value == pytest.approx((0.1 + 0.3 + 0.4 + 0.2) / 4)
    assert (high.predicted, high.happened.value) == (0.75, 0.75)
    assert high.true.low < 0.75 < high.true.high
    assert forecasts.reliability(shares, np.array([1, 1, 0, 0]), None)[0].true == Metric(None)


def test_everything_stands_with_its_interval(made) -> None:
    found = forecasts.judge(*made, Judged(1.5, 1.0))
    assert found["min_ade"].keys() == {"1"}  # there are three samples, fewer than six
    assert found["min_ade"]["1"].value == 1
    assert found["miss_rate"]["1"].value == 0.5
    assert found["miss_rate"]["1"].low < 0.5 < found["miss_rate"]["1"].high
    assert found["collision_rate"][""].value == pytest.approx(forecasts.collisions(made[0], 1.0).mean(), abs=1e-12)

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_policy.basics.metric_table import METRICS, evaluated_metrics, lower_is_better
from diffusion_policy.config import MetricName
from diffusion_policy.evaluation.episode import Episode, Plan
from diffusion_policy.evaluation.metrics import (
    Metric,
    behaviour_coverage,
    behaviour_entropy,
    commitment,
    conditional_entropy,
    count_modes,
    diversity,
    effective_successes,
    jerk,
    latency,
    mean_measures,
    mode_coverage,
    mode_divergence,
    mode_entropy,
    percentiles,
    success_rate,
    successes_by_mode,
    time_to_success,
    wilson,
)
from diffusion_policy.evaluation.scorecard import FORMULAS, scorecard

MODES = ("a", "b", "c", "d")


def episode(success: bool, mode: str | None, seed: int = 0, repeat: int = 0, steps: int = 1, **measures) -> Episode:
    path = {"xy": np.zeros((steps + 1, 2))}
    return Episode(seed, success, mode, path, np.zeros((steps, 2)), repeat, measures)


# Success


def test_the_success_rate_of_single_episodes_is_wilsons() -> None:
    assert success_rate([episode(seed < 7, None, seed) for seed in range(10)]) == wilson(7, 10)


def test_repeats_of_seeds_that_always_agree_count_as_few() -> None:
    alike = [episode(seed < 30, None, seed, repeat) for seed in range(50) for repeat in range(4)]
    rate, plain = success_rate(alike), wilson(30, 50)
    assert rate.value == 0.6
    assert rate.low == pytest.approx(plain.low, abs=0.01)
    assert rate.high == pytest.approx(plain.high, abs=0.01)


def test_measures_are_shares_or_means() -> None:
    episodes = [episode(True, None, seed, p1=float(seed < 7), score=0.1 * seed, length=2.0) for seed in range(10)]
    measures = mean_measures(episodes)
    assert list(measures) == ["p1", "score", "length"]
    assert measures["p1"] == wilson(7, 10)
    assert measures["score"].value == pytest.approx(0.45)
    assert 0.2 < (measures["score"].low or 0) < 0.35 < 0.55 < (measures["score"].high or 0) < 0.7
    assert measures["length"] == Metric(2)


def test_a_measure_counts_where_an_episode_has_it() -> None:
    episodes = [episode(True, None, 0, score=0.5), episode(True, None, 1), episode(True, None, 2, score=0.7)]
    assert mean_measures(episodes)["score"].value == pytest.approx(0.6)
    assert mean_measures([episode(True, None, 0, score=math.nan)]) == {"score": Metric(None)}
    assert mean_measures([episode(True, None)]) == {}


def test_time_to_success_is_of_successes_only() -> None:
    episodes = [episode(seed != 2, None, seed, steps=steps) for seed, steps in enumerate((10, 20, 90))]
    assert time_to_success(episodes, 0.1).value == pytest.approx(1.5)
    assert time_to_success([episode(False, None)], 0.1) == Metric(None)


# Modes


def test_counts_of_a_hand_made_evaluation() -> None:
    taken = [(True, "a"), (True, "a"), (False, "a"), (True, "c"), (False, None)]
    episodes = [episode(success, mode, seed) for seed, (success, mode) in enumerate(taken)]
    counts = count_modes(episodes, MODES)
    assert {label: (count.episodes, count.successes) for label, count in counts.items()} == {
        "a": (3, 2), "b": (0, 0), "c": (1, 1), "d": (0, 0), "none": (1, 0),
    }  # fmt: skip
    assert counts["a"].success_rate == wilson(2, 3)
    assert counts["b"].success_rate.value is None
    assert success_rate(episodes).value == pytest.approx(3 / 5)
    assert successes_by_mode(episodes) == effective_successes(episodes) == {"a": 2, "c": 1}
    assert mode_coverage(successes_by_mode(episodes), MODES) == 0.5
    assert mode_entropy(successes_by_mode(episodes), MODES) == pytest.approx(
        -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(4)
    )


def test_none_is_listed_only_where_it_occurs() -> None:
    assert list(count_modes([episode(True, "a")], MODES)) == list(MODES)


def test_entropy_is_zero_for_one_mode_and_one_for_all_alike() -> None:
    assert mode_entropy({"a": 9}, MODES) == 0
    assert mode_entropy(dict.fromkeys(MODES, 5), MODES) == pytest.approx(1)


def test_entropy_and_coverage_are_undefined_without_successes_or_modes() -> None:
    assert mode_entropy({}, MODES) is None
    assert mode_entropy({"a": 3}, ("a",)) is None
    assert mode_coverage({}, MODES) == 0
    assert mode_coverage({}, ()) is None
    assert behaviour_entropy({}, MODES) == behaviour_entropy({}, MODES, corrected=True) == Metric(None)
    assert mode_divergence({}, {"a": 1}, MODES) == mode_divergence({"a": 1}, {}, MODES) == Metric(None)
    assert behaviour_coverage({}, MODES) == Metric(0, 0, 1)
    assert behaviour_coverage({}, ()) == Metric(None)


@given(st.lists(st.integers(0, 100), min_size=4, max_size=4).filter(any))
def test_entropy_lies_between_zero_and_one_and_ignores_names(counts: list[int]) -> None:
    value = mode_entropy(dict(zip(MODES, counts, strict=True)), MODES)
    turned = mode_entropy(dict(zip(MODES, counts[1:] + counts[:1], strict=True)), MODES)
    assert value is not None
    assert -1e-12 <= value <= 1 + 1e-12
    assert turned == pytest.approx(value)


def test_millers_correction_by_hand() -> None:
    """Three modes met in 10 successes: 2 / (2 · 10) nats more."""
    counts = {"a": 5, "b": 3, "c": 2}
    plain, corrected = behaviour_entropy(counts, MODES), behaviour_entropy(counts, MODES, corrected=True)
    assert plain.value == mode_entropy(counts, MODES)
    assert corrected.value == pytest.approx((plain.value or 0) + 0.1 / math.log(4))
    assert behaviour_entropy(dict.fromkeys(MODES, 2), MODES, corrected=True).value == 1


@pytest.mark.parametrize("corrected", [False, True])
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=4, max_size=4).filter(any))
def test_intervals_of_entropy_hold_their_value(corrected: bool, counts: list[int]) -> None:
    metric = behaviour_entropy(dict(zip(MODES, counts, strict=True)), MODES, corrected)
    assert metric.value is not None
    assert metric.low is not None
    assert metric.high is not None
    assert -1e-9 <= metric.low <= metric.value <= metric.high <= 1 + 1e-9
    assert metric.low < metric.high


def test_divergence_from_the_demonstrations() -> None:
    equal = mode_divergence({"a": 30, "b": 30}, {"a": 2, "b": 2}, MODES)
    assert (equal.value, equal.low) == (0, 0)
    assert 0 < (equal.high or 0) < 0.1
    apart = mode_divergence({"a": 30}, {"b": 4}, MODES)
    assert apart.value == apart.high == pytest.approx(1)
    assert 0.5 < (apart.low or 0) < 1


def test_successes_of_one_start_that_take_one_mode_are_worth_one() -> None:
    alike = [episode(True, MODES[seed % 4], seed, repeat) for seed in range(40) for repeat in range(5)]
    assert sum(effective_successes(alike).values()) == pytest.approx(40, rel=0.1)
    mixed = [episode(True, MODES[repeat % 4], seed, repeat) for seed in range(40) for repeat in range(4)]
    assert sum(effective_successes(mixed).values()) == pytest.approx(160, rel=0.1)
    wide, narrow = behaviour_entropy(effective_successes(alike), MODES), behaviour_entropy({"a": 150, "b": 50}, MODES)
    assert wide.value == pytest.approx(1)
    assert narrow.low is not None


def test_the_entropy_of_starts_that_repeat_is_covered() -> None:
    """Each start has shares of its own; counted as independent, such episodes cover about 6 of 10."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(60):
        shares = rng.dirichlet(np.full(3, 0.1), 40)
        taken = [(seed, repeat, rng.choice(3, p=row)) for seed, row in enumerate(shares) for repeat in range(5)]
        episodes = [episode(True, MODES[mode], seed, repeat) for seed, repeat, mode in taken]
        covered.append((behaviour_entropy(effective_successes(episodes), MODES[:3]).high or 0) >= 1 - 1e-9)
    assert np.mean(covered) >= 0.92


def test_entropy_given_the_start_tells_deciding_from_being_told() -> None:
    told = [episode(True, MODES[seed % 4], seed, repeat) for seed in range(20) for repeat in range(8)]
    deciding = [episode(True, MODES[repeat % 4], seed, repeat) for seed in range(20) for repeat in range(8)]
    assert conditional_entropy(told, MODES).value == 0
    assert 0.05 < (conditional_entropy(told, MODES).high or 0) < 0.2
    assert (conditional_entropy(deciding, MODES).value or 0) > 0.95


def test_entropy_given_the_start_by_hand() -> None:
    """One seed with modes a, a, b: ⅔ (ψ(3) − ψ(2)) + ⅓ (ψ(3) − ψ(1)) = ⅔ · ½ + ⅓ · 3/2; another with a, a: 0. A seed
    with one success or none is left out."""
    episodes = [episode(True, mode, 1, repeat) for repeat, mode in enumerate("aab")]
    episodes += [episode(True, "a", 2, repeat) for repeat in range(2)]
    episodes += [episode(True, "b", 3), episode(False, "b", 3, 1), episode(False, None, 4)]
    assert conditional_entropy(episodes, MODES).value == pytest.approx((1 / 3 + 1 / 2) / math.log(4) / 2)


def test_entropy_given_the_start_is_nearly_unbiased_where_the_plain_one_is_not() -> None:
    rng = np.random.default_rng(0)
    taken = rng.choice(2, size=(200, 5))
    episodes = [
        episode(True, MODES[mode], seed, repeat) for seed, row in enumerate(taken) for repeat, mode in enumerate(row)
    ]
    metric = conditional_entropy(episodes, MODES[:2])
    assert metric.value == pytest.approx(0.98, abs=0.04)
    assert 0.9 < (metric.low or 0) < (metric.value or 0) <= (metric.high or 0) <= 1


def test_entropy_given_the_start_needs_repeats() -> None:
    assert conditional_entropy([episode(True, "a", seed) for seed in range(9)], MODES) == Metric(None)
    assert conditional_entropy([], MODES) == Metric(None)


def turning(sides: Sequence[str | None], seed: int = 0) -> Episode:
    """An episode whose plans say where they turn: the sign of their first number; None decides nothing."""
    value = {"left": -1.0, "right": 1.0, None: 0.0}
    plans = [Plan(2 * i, np.full((4, 1), value[side])) for i, side in enumerate(sides)]
    steps = 2 * len(sides)
    rows = {"row": np.repeat(np.arange(len(sides) + 1), 2)[: steps + 1] // 2}
    return Episode(seed, True, None, rows, np.zeros((steps, 1)), plans=plans)


def side_at_the_row(observation: Mapping[str, np.ndarray], actions: np.ndarray) -> tuple[str, str] | None:
    """Each row lasts two plans."""
    if actions[0, 0] == 0:
        return None
    return f"row {observation['row']}", "left" if actions[0, 0] < 0 else "right"


def test_commitment_counts_plans_that_keep_the_answer_to_the_same_question() -> None:
    kept = turning(["left", "left", "right", "right"])  # at the second row it may turn elsewhere
    changed = turning(["left", "right", "left", None], seed=1)
    assert commitment([kept], side_at_the_row).value == 1
    assert commitment([changed], side_at_the_row).value == 0
    both = commitment([kept, changed], side_at_the_row)
    assert both.value == pytest.approx(2 / 3)
    assert commitment([turning(["left", None, "left"])], side_at_the_row) == Metric(None)


def test_commitment_that_never_failed_still_has_an_interval() -> None:
    metric = commitment([turning(["left", "left", "right", "right"], seed) for seed in range(30)], side_at_the_row)
    assert metric == Metric(1, wilson(30, 30).low, 1)


# Movement, samples and time


def test_diversity_is_the_mean_distance_of_two_samples() -> None:
    samples = np.zeros((2, 3, 5, 2))
    samples[0, 1] = 1  # distances 1, 0, 1
    samples[1, :, :, 0] = np.array([0, 2, 4])[:, None]  # root mean squares of (2, 0), (2, 0), (4, 0)
    assert diversity(samples).value == pytest.approx((2 / 3 + 8 / 3 / math.sqrt(2)) / 2)
    assert diversity(np.zeros((3, 1, 5, 2))) == Metric(None)
    assert diversity(np.random.default_rng(0).normal(size=(5, 20, 16, 2))).value == pytest.approx(
        math.sqrt(2), rel=0.05
    )


def test_jerk_of_a_cubic_path_is_its_third_derivative() -> None:
    time = 0.1 * np.arange(20)
    path = np.stack([2 * time**3, time**2], axis=1)
    one = Episode(0, True, None, {"xy": path}, path[1:])
    short = dataclasses.replace(one, seed=1, observations={"xy": path[:3]}, actions=path[:2])
    assert jerk([one, short], lambda observations: observations["xy"], 0.1).value == pytest.approx(12)
    assert jerk([one, short], None, 0.1).value == pytest.approx(12)
    assert jerk([short], None, 0.1) == Metric(None)


def test_latency_has_intervals_where_there_are_times_enough() -> None:
    found = latency(np.arange(100.0).tolist())
    assert found["p50"] == Metric(49.5, 39, 60)
    assert found["p95"].value == pytest.approx(94.05)
    assert found["p95"].high == 99
    assert found["p99"].high is None
    assert found["p99"].low is not None


def test_percentiles_are_named() -> None:
    assert percentiles(range(101), (50, 95)) == {"p50": 50, "p95": 95}


# Everything


def evaluation(repeats: int = 2) -> list[Episode]:
    rng = np.random.default_rng(0)
    episodes = []
    for seed in range(30):
        for repeat in range(repeats):
            success = bool(rng.random() < 0.8)
            turned = turning(["left", "left", "right", "left"][: rng.integers(2, 5)], seed)
            measures = {"score": float(rng.random()), "p1": float(success)}
            mode = MODES[rng.integers(3)] if success else None
            actions = rng.normal(size=turned.actions.shape)
            episodes.append(Episode(seed, success, mode, turned.observations, actions, repeat, measures, turned.plans))
    return episodes


def test_the_scorecard_is_the_same_to_the_bit_in_any_order() -> None:
    episodes = evaluation()
    first = scorecard(episodes, MODES, {"a": 3, "b": 4}, 0.1, choice=side_at_the_row)
    order = np.random.default_rng(1).permutation(len(episodes))
    assert scorecard([episodes[i] for i in order], MODES, {"a": 3, "b": 4}, 0.1, choice=side_at_the_row) == first


def test_the_scorecard_is_json() -> None:
    card = scorecard(evaluation(), MODES, {"a": 3, "b": 4}, 0.1, choice=side_at_the_row).fields()
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert set(card["mode_entropy"]) == {"value", "low", "high"}
    assert set(card["modes"]) == {*MODES, "none"}
    metrics = [metric for name, metric in card.items() if name not in ("measures", "modes")]
    assert all(None not in metric.values() for metric in (*metrics, *card["measures"].values()))


def test_the_scorecard_of_failures_and_of_a_task_without_modes_says_what_is_undefined() -> None:
    failures = scorecard([episode(False, None, seed, steps=5) for seed in range(5)], MODES, {"a": 1}, 0.1)
    assert failures.metrics["success_rate"] == wilson(0, 5)
    for name in ("mode_entropy", "mode_entropy_corrected", "mode_divergence"):
        assert failures.metrics[name] == Metric(None)
    for name in ("time_to_success", "conditional_entropy", "commitment"):
        assert failures.metrics[name] == Metric(None)
    assert failures.metrics["mode_coverage"] == Metric(0, 0, 1)
    without = scorecard([episode(True, None, seed, steps=5) for seed in range(5)], (), {}, 0.1)
    for name in ("mode_coverage", "mode_entropy", "mode_divergence"):
        assert without.metrics[name] == Metric(None)
    assert list(without.modes) == ["none"]
    assert scorecard([], MODES, {}, 0.1).metrics["success_rate"] == Metric(None)


def test_each_metric_of_the_table_has_a_formula_or_is_measured_of_fresh_plans() -> None:
    of_results = [row.name for row in evaluated_metrics()]
    assert [name for name in of_results if name in FORMULAS] == list(FORMULAS)
    assert set(of_results) - set(FORMULAS) == {"diversity", "planning_latency_ms"}


def test_the_table_says_which_value_is_the_best() -> None:
    assert set(get_args(MetricName)) <= set(METRICS)
    assert [name for name in METRICS if lower_is_better(name)] == [
        "path_ratio", "smoothness", "collision",
        "mode_divergence", "jerk", "time_to_success", "planning_latency_ms", "validation_loss", "action_error",
        "action_error_best", "min_ade", "min_fde", "miss_rate", "brier_min_fde", "energy_score", "collision_rate",
        "mode_error", "log_score",
    ]  # fmt: skip
    assert lower_is_better("my_error")
    assert lower_is_better("my_loss")
    assert not lower_is_better("my_share")

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from diffusion_policy.metrics import (
    Episode,
    Metric,
    count_modes,
    mode_coverage,
    mode_entropy,
    percentiles,
    success_rate,
    successes_by_mode,
    wilson,
)

MODES = ("a", "b", "c", "d")


def episode(success: bool, mode: str | None) -> Episode:
    return Episode(0, success, mode, {}, np.zeros((1, 2)))


@given(st.integers(1, 500).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    successes, trials = counts
    reference = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    metric = wilson(successes, trials)
    assert metric.value == successes / trials
    assert metric.low == pytest.approx(reference.low, abs=1e-9)
    assert metric.high == pytest.approx(reference.high, abs=1e-9)


def test_nothing_is_known_without_trials() -> None:
    assert wilson(0, 0) == Metric(None, None, None)


def test_counts_of_a_hand_made_evaluation() -> None:
    episodes = [episode(True, "a"), episode(True, "a"), episode(False, "a"), episode(True, "c"), episode(False, None)]
    counts = count_modes(episodes, MODES)
    assert {label: (count.episodes, count.successes) for label, count in counts.items()} == {
        "a": (3, 2), "b": (0, 0), "c": (1, 1), "d": (0, 0), "none": (1, 0),
    }  # fmt: skip
    assert counts["a"].success_rate.value == pytest.approx(2 / 3)
    assert counts["b"].success_rate.value is None
    assert success_rate(episodes).value == pytest.approx(3 / 5)
    assert successes_by_mode(episodes) == {"a": 2, "c": 1}
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


@given(st.lists(st.integers(0, 100), min_size=4, max_size=4).filter(any))
def test_entropy_lies_between_zero_and_one_and_ignores_names(counts: list[int]) -> None:
    value = mode_entropy(dict(zip(MODES, counts, strict=True)), MODES)
    turned = mode_entropy(dict(zip(MODES, counts[1:] + counts[:1], strict=True)), MODES)
    assert value is not None
    assert -1e-12 <= value <= 1 + 1e-12
    assert turned == pytest.approx(value)


def test_percentiles_are_named() -> None:
    assert percentiles(range(101), (50, 95)) == {"p50": 50, "p95": 95}

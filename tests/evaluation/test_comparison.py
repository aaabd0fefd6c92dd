import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import binomtest

from diffusion_policy.evaluation.comparison import Outcomes, compare, paired_interval, sign_flip_test


def outcomes(successes, first: int = 0, scores=None) -> Outcomes:
    """One episode a seed, or a list of repeats a seed."""
    return [
        {
            "seed": first + i,
            "repeat": repeat,
            "success": bool(success),
            "mode": None,
            "steps": 3,
            "measures": {} if scores is None else {"score": float(scores[i])},
        }
        for i, repeats in enumerate(successes)
        for repeat, success in enumerate(np.atleast_1d(repeats))
    ]


def table(both: int, only_a: int, only_b: int, neither: int) -> tuple[Outcomes, Outcomes]:
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return outcomes(a), outcomes(b)


def test_counts_of_a_hand_made_comparison() -> None:
    result = compare(*table(3, 1, 2, 4))
    assert (result.episodes, result.both, result.only_a, result.only_b, result.neither) == (10, 3, 1, 2, 4)
    assert result.only_a_seeds == ((3, 0),)
    assert result.only_b_seeds == ((4, 0), (5, 0))
    assert result.success_difference.value == pytest.approx(0.1)
    assert result.score_difference is None
    assert json.loads(json.dumps(dataclasses.asdict(result)))["only_b_seeds"] == [[4, 0], [5, 0]]


@pytest.mark.parametrize("only_a, only_b", [(3, 9), (0, 5), (4, 4), (1, 0), (20, 45), (0, 0)])
def test_the_test_is_mcnemars_where_each_seed_has_one_episode(only_a: int, only_b: int) -> None:
    exact = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
    assert compare(*table(10, only_a, only_b, 7)).p_value == pytest.approx(exact)


def test_repeats_of_one_seed_count_as_one() -> None:
    """Ten repeats of one seed cannot show what one seed cannot; six seeds can: 2 / 2^6."""
    assert compare(outcomes([[0] * 10]), outcomes([[1] * 10])).p_value == 1
    assert compare(outcomes([[0] * 10] * 6), outcomes([[1] * 10] * 6)).p_value == pytest.approx(2 / 2**6)
    assert sign_flip_test(np.array([3, 1])) == pytest.approx(2 / 4)
    assert sign_flip_test(np.array([3, -1])) == 1


@pytest.mark.parametrize("repeats", [1, 4])
def test_equal_policies_are_rarely_told_apart_and_their_difference_is_covered(repeats: int) -> None:
    rng = np.random.default_rng(0)
    rejected, covered = [], []
    for _ in range(200):
        rates = rng.beta(2, 1, (2, 40, 1))
        a, b = rng.random((2, 40, repeats)) < rates
        result = compare(outcomes(a), outcomes(b))
        rejected.append(result.p_value < 0.05)
        covered.append((result.success_difference.low or 0) <= 0 <= (result.success_difference.high or 0))
    assert np.mean(rejected) <= 0.05
    assert np.mean(covered) >= 0.93


def test_the_interval_of_paired_shares_is_that_of_the_score_test() -> None:
    """Without discordant pairs ±z² / (n + z²); else its ends' score statistics are ±z, and A and B change places."""
    z = 1.959964
    assert paired_interval(0, 0, 100) == pytest.approx((-(z**2) / (100 + z**2), z**2 / (100 + z**2)), abs=1e-5)
    low, high = paired_interval(12, 5, 60)
    assert (-high, -low) == pytest.approx(paired_interval(5, 12, 60))
    assert low < -7 / 60 < high
    assert paired_interval(10, 0, 10)[0] == -1
    assert paired_interval(0, 10, 10)[1] == 1
    wald = 1.96 * (500 + 300 - 200**2 / 10_000) ** 0.5 / 10_000  # of many pairs
    assert paired_interval(300, 500, 10_000) == pytest.approx((0.02 - wald, 0.02 + wald), abs=1e-4)


def test_paired_differences_of_shares_are_covered() -> None:
    rng = np.random.default_rng(0)
    both, only_a, only_b = rng.multinomial(50, (0.6, 0.05, 0.2, 0.15), 500).T[:3]
    intervals = [paired_interval(a, b, 50) for a, b in zip(only_a, only_b, strict=True)]
    assert len(both) == 500
    assert 0.93 <= np.mean([low <= 0.15 <= high for low, high in intervals]) <= 0.98


def test_scores_are_compared_pair_by_pair() -> None:
    """The seeds' own scores, which vary far more than the difference, cancel."""
    rng = np.random.default_rng(0)
    hard = rng.random(100)
    result = compare(
        outcomes(np.ones(100), scores=hard), outcomes(np.ones(100), scores=hard + rng.normal(0.02, 0.02, 100))
    )
    assert result.score_difference is not None
    assert result.score_difference.value == pytest.approx(0.02, abs=0.006)
    assert 0.01 < (result.score_difference.low or 0) < 0.02 < (result.score_difference.high or 0) < 0.03


def test_episodes_of_one_side_are_left_out_and_counted() -> None:
    result = compare(outcomes(np.ones(10)), outcomes(np.ones(10), first=4))
    assert (result.episodes, result.left_out_a, result.left_out_b) == (6, 4, 4)


def test_nothing_in_common_is_an_error_that_names_both() -> None:
    with pytest.raises(
        ValueError, match=r"^no episode is in both evaluations: A has seeds 0 to 4, B has seeds 7 to 9$"
    ):
        compare(outcomes(np.ones(5)), outcomes(np.ones(3), first=7))
    with pytest.raises(ValueError, match=r"A has no episodes, B has seeds 0 to 1 in 3 repeats"):
        compare([], outcomes(np.ones((2, 3))))


def test_a_real_difference_is_said_to_be_real() -> None:
    result = compare(*table(50, 5, 25, 20))
    assert result.more_episodes == 0
    assert result.sentence.startswith(
        "The difference is real: B succeeds in 20.0 percentage points more of 100 episodes than A (p < 0.001, "
    )
    assert "A succeeds in 20.0" in compare(*table(50, 25, 5, 20)).sentence


def test_a_chance_difference_comes_with_the_episodes_that_would_settle_it() -> None:
    """10 and 18 of 100 discordant: (1.96 √0.28 + 0.84 √(0.28 − 0.08²))² / 0.08² = 341.03 pairs."""
    result = compare(*table(50, 10, 18, 22))
    assert result.more_episodes == 242
    assert "may be chance: B succeeds in 8.0 percentage points more" in result.sentence
    assert "about 242 more episodes would show it with a probability of 80 %" in result.sentence


def test_the_promised_power_is_kept() -> None:
    promised = compare(*table(50, 10, 18, 22))
    assert promised.more_episodes is not None
    rng = np.random.default_rng(0)
    draws = rng.multinomial(100 + promised.more_episodes, (0.1, 0.18, 0.72), 500)
    real = [bool(binomtest(a, a + b).pvalue < 0.05) for a, b, _ in draws]
    assert np.mean(real) == pytest.approx(0.8, abs=0.05)


def test_more_repeats_of_alike_seeds_need_more_episodes() -> None:
    a, b = ([0] * 3 + [1] * 5 + [1] * 12, [1] * 3 + [0] * 5 + [1] * 12)
    single = compare(outcomes(a), outcomes(b)).more_episodes
    repeated = compare(outcomes([[x] * 4 for x in a]), outcomes([[x] * 4 for x in b])).more_episodes
    assert single is not None
    assert repeated is not None
    assert repeated > 3 * single


def test_no_number_of_episodes_helps_where_no_difference_is_seen() -> None:
    for counts, words in (((30, 0, 0, 20), "the same of 50 episodes"), ((30, 4, 4, 12), "equally many of 50 episodes")):
        result = compare(*table(*counts))
        assert result.more_episodes is None
        assert result.p_value == 1
        assert words in result.sentence
        assert "no number of further episodes will tell them apart" in result.sentence
        assert (result.success_difference.low or 0) < 0 < (result.success_difference.high or 0)


def test_scores_that_are_no_numbers_are_not_compared() -> None:
    a, b = outcomes([1, 0], scores=[0.5, 0.5]), outcomes([1, 0], scores=[0.5, 0.5])
    assert compare(a, b).score_difference is not None
    a[0]["measures"]["score"] = -1.7e308
    b[0]["measures"]["score"] = 1.7e308
    assert compare(a, b).score_difference is not None
    a[0]["measures"]["score"] = None
    assert compare(a, b).score_difference is None

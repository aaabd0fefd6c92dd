import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion_policy.diffusion.schedules import (
    SCHEDULES,
    SPACINGS,
    Schedule,
    choose_levels,
    constant,
    cosine,
    flow,
    linear,
    make_schedule,
    sigmoid,
)

VARIANCE_PRESERVING = [name for name in SCHEDULES if name != "flow"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("levels", [2, 5, 16, 100, 1000])
def test_signal_decreases_from_level_to_level(name: str, levels: int) -> None:
    schedule = SCHEDULES[name](levels)
    assert len(schedule) == len(schedule.sigma) == levels
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    assert (schedule.alpha.diff() < 0).all()
    assert (schedule.log_snr.diff() < 0).all()


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("levels", [5, 100, 1000])
def test_variance_is_preserved(name: str, levels: int) -> None:
    schedule = SCHEDULES[name](levels)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(levels, dtype=torch.float64))


@pytest.mark.parametrize("levels", [16, 100, 1000])
def test_the_last_level_is_noise_for_any_number_of_levels(levels: int) -> None:
    for make in SCHEDULES.values():
        assert make(levels).alpha[-1] < 0.02


def test_flow_is_a_straight_line_that_ends_without_signal() -> None:
    schedule = flow(4)
    assert schedule.sigma.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert schedule.alpha.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert schedule.log_snr[-1] == -math.inf
    assert schedule.ends_silent
    assert not cosine(4).ends_silent


def test_log_snr_is_that_of_alpha_and_sigma() -> None:
    schedule = linear(10)
    torch.testing.assert_close(schedule.log_snr.exp(), schedule.alpha**2 / schedule.sigma**2)


@pytest.mark.parametrize(
    "schedule, reference",
    [
        (cosine(100), DDIMScheduler(100, beta_schedule="squaredcos_cap_v2")),
        (linear(1000), DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02)),
        (linear(50, 1e-3, 0.1), DDIMScheduler(50, beta_start=1e-3, beta_end=0.1)),
        (sigmoid(1000), DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="sigmoid")),
        (constant(50, 0.1), DDPMScheduler(50, beta_start=0.1, beta_end=0.1)),
    ],
)
def test_schedules_equal_diffusers(schedule: Schedule, reference) -> None:
    # its tables are float32, and a product of 1000 of those is off by some 1e-5
    torch.testing.assert_close((schedule.alpha**2).float(), reference.alphas_cumprod, rtol=3e-5, atol=1e-7)


def test_constant_beta_gives_the_powers_of_what_remains() -> None:
    schedule = constant(10, 0.1)
    power = schedule.alpha[[0, 4, 9]] ** 2
    torch.testing.assert_close(power, torch.tensor([0.9, 0.59049, 0.3486784401], dtype=torch.float64))
    assert [round(float(x), 3) for x in schedule.alpha[[0, 4, 9]]] == [0.949, 0.768, 0.590]  # 0.59049 ** 0.5 = 0.76843
    assert [round(float(x), 3) for x in schedule.sigma[[0, 4, 9]]] == [0.316, 0.640, 0.807]
    power = constant(10, 0.01).alpha[[0, 4, 9]] ** 2
    torch.testing.assert_close(power, torch.tensor([0.99, 0.9509900499, 0.9043820750], dtype=torch.float64))


def test_five_steps_of_noise_by_hand() -> None:
    schedule = constant(10, 0.1)
    x5 = schedule.alpha[4] * 2.0 + schedule.sigma[4] * 0.3
    assert float(x5) == pytest.approx(1.729, abs=0.001)


@pytest.mark.parametrize(
    "alpha, sigma, message",
    [
        ([0.5, 0.9], [0.8, 0.4], "signal must decrease from level to level; alpha goes from 0.5 to 0.9 at level 1"),
        ([0.9, 0.9], [0.4, 0.5], "must decrease"),
        ([0.9, math.nan], [0.4, 0.5], "must be finite"),
        ([0.9, 0.5], [0.4], r"\(K,\) both; got \(2,\) and \(1,\)"),
        ([], [], r"\(K,\) both"),
        ([0.9, -0.1], [0.4, 0.9], "alpha must be at least 0 and its sigma above 0"),
        ([1.0, 0.5], [0.0, 0.8], "alpha must be at least 0 and its sigma above 0"),
        ([0.9, 0.8], [0.5, 0.1], "signal-to-noise ratio, alpha / sigma, must decrease"),
    ],
)
def test_what_is_no_schedule_is_refused(alpha: list, sigma: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))


def test_schedules_are_made_by_name_with_their_numbers() -> None:
    assert torch.equal(make_schedule("linear", 50, (1e-3, 0.1)).alpha, linear(50, 1e-3, 0.1).alpha)
    assert torch.equal(make_schedule("cosine", 50).alpha, cosine(50).alpha)
    with pytest.raises(ValueError, match="unknown schedule 'cubic'; choose from cosine, linear, sigmoid"):
        make_schedule("cubic", 10)
    with pytest.raises(ValueError, match="the schedule constant takes the options beta; got 2 numbers"):
        make_schedule("constant", 10, (0.1, 0.2))
    for name, options, got in (("linear", (0.0, 0.1), "0"), ("sigmoid", (0.1, 5.0), "1"), ("constant", (-1.0,), "-1")):
        with pytest.raises(ValueError, match=f"every beta must be above 0 and below 1; got {got}"):
            make_schedule(name, 10, options)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "even"])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_levels_decrease_without_repeating(spacing: str, count: int) -> None:
    for steps in range(1, count + 1):
        levels = choose_levels(cosine(count), steps, spacing)
        assert len(levels) == steps
        assert all(a > b for a, b in pairwise(levels))
        assert 0 <= levels[-1] <= levels[0] < count
        assert levels[0] == count - 1 or spacing == "leading"
        assert levels[-1] == 0 or spacing == "trailing" or (steps == 1 and spacing == "even")


@given(name=st.sampled_from(list(SCHEDULES)), count=st.integers(2, 60), data=st.data())
def test_every_spacing_gives_as_many_distinct_levels_as_asked(name: str, count: int, data) -> None:
    schedule = SCHEDULES[name](count)
    steps = data.draw(st.integers(1, count - schedule.ends_silent))
    spacing = data.draw(st.sampled_from(SPACINGS))
    levels = choose_levels(schedule, steps, spacing, with_signal=True)
    assert len(levels) == steps
    assert all(a > b for a, b in pairwise(levels))
    assert schedule.alpha[levels[0]] > 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_jump_leaves_out_the_least_noised_levels(spacing: str) -> None:
    schedule = cosine(100)
    levels = choose_levels(schedule, 4, spacing, jump_from=0.6)
    assert len({*levels}) == 4
    assert min(levels) >= 60
    assert levels == [
        60 + level for level in choose_levels(Schedule(schedule.alpha[60:], schedule.sigma[60:]), 4, spacing)
    ]
    with pytest.raises(ValueError, match=r"1 to the 40 noise levels from 0\.6 of them on; got 41"):
        choose_levels(schedule, 41, spacing, jump_from=0.6)


def test_levels_evenly_spaced_in_log_snr() -> None:
    schedule = linear(1000)
    levels = choose_levels(schedule, 10, "log-snr")
    assert levels[0] == 999
    assert levels[-1] == 0
    gaps = schedule.log_snr[levels].diff()
    assert (gaps / gaps.mean() - 1).abs().max() < 0.1
    levels = choose_levels(cosine(100), 16, "log-snr")  # log-SNR falls from -8 to -15 over its last level
    assert len(set(levels)) == 16
    assert levels[0] == 99
    assert levels[-1] == 0
    assert choose_levels(cosine(100), 100, "log-snr") == list(range(99, -1, -1))


def test_a_level_without_signal_is_left_out_where_it_cannot_be_used() -> None:
    assert choose_levels(flow(10), 5)[0] == 9
    assert choose_levels(flow(10), 5, with_signal=True)[0] == 8
    assert choose_levels(flow(10), 3, "log-snr")[0] == 8
    with pytest.raises(ValueError, match="from 1 to the 9 noise levels that hold signal; got 10"):
        choose_levels(flow(10), 10, with_signal=True)


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"sampling steps must be from 1 to the 100 noise levels; got {steps}"):
        choose_levels(cosine(100), steps)


def test_an_unknown_spacing_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="unknown spacing 'odd'; choose from trailing, leading, even, log-snr"):
        choose_levels(cosine(100), 5, "odd")

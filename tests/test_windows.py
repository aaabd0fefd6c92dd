import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_policy.datasets.windows import Windows, split_episodes

ENDS = np.array([4, 5, 12])
DATA = {"state": np.arange(24, dtype=np.float64).reshape(12, 2), "action": np.arange(12, dtype=np.float64)[:, None]}


def window_by_hand(now: int, observation_horizon: int, prediction_horizon: int) -> tuple[list[int], list[int]]:
    """Rows of the observations and of the actions of one window."""
    episode = int(np.searchsorted(ENDS, now, side="right"))
    first, last = [0, *ENDS][episode], ENDS[episode] - 1
    clip = lambda row: min(max(row, first), last)  # noqa: E731
    start = now - observation_horizon + 1
    observed = [clip(start + i) for i in range(observation_horizon)]
    return observed, [clip(start + i) for i in range(prediction_horizon)]


@given(st.integers(1, 4), st.integers(1, 9))
def test_windows_equal_those_cut_by_hand(observation_horizon: int, prediction_horizon: int) -> None:
    windows = Windows(DATA, ENDS, [0, 1, 2], observation_horizon, prediction_horizon)
    assert len(windows) == 12
    batch = windows.gather(torch.arange(12))
    for now in range(12):
        observed, predicted = window_by_hand(now, observation_horizon, prediction_horizon)
        np.testing.assert_array_equal(batch.observations["state"][now], DATA["state"][observed])
        np.testing.assert_array_equal(batch.actions[now], DATA["action"][predicted])


def test_only_the_chosen_episodes_are_seen() -> None:
    windows = Windows(DATA, ENDS, [0, 2], 2, 4)
    assert len(windows) == 11
    assert sorted(windows.rows()["action"][:, 0]) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert 4 not in windows.gather(torch.arange(11)).actions


def test_each_pass_sees_every_window_once_in_a_new_order() -> None:
    windows = Windows(DATA, ENDS, [0, 1, 2], 1, 1)
    batches = windows.batches(4, seed=0)
    passes = [torch.cat([next(batches).actions.flatten() for _ in range(3)]).tolist() for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12))
    assert passes[0] != passes[1]


def test_the_seed_fixes_the_order() -> None:
    windows = Windows(DATA, ENDS, [0, 1, 2], 1, 1)
    a, b, c = (windows.batches(5, seed) for seed in (1, 1, 2))
    first = [[batch.actions.tolist() for batch in itertools.islice(batches, 6)] for batches in (a, b, c)]
    assert first[0] == first[1] != first[2]


def test_fewer_windows_than_a_batch_still_give_batches() -> None:
    batches = Windows(DATA, ENDS, [1], 2, 4).batches(256, seed=0)
    assert next(batches).actions.shape == (1, 4, 1)


@given(st.integers(2, 300), st.floats(0.01, 0.5), st.integers(0, 5))
def test_the_split_is_disjoint_complete_and_fixed_by_the_seed(count: int, share: float, seed: int) -> None:
    training, validation = split_episodes(count, share, seed)
    assert sorted([*training, *validation]) == list(range(count))
    assert len(validation) == max(1, round(count * share))
    np.testing.assert_array_equal(split_episodes(count, share, seed)[0], training)


def test_nothing_is_held_out_without_a_share() -> None:
    training, validation = split_episodes(3, 0, 0)
    assert len(training) == 3
    assert len(validation) == 0


def test_one_episode_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="cannot hold out 5% of 1 episodes"):
        split_episodes(1, 0.05, 0)


def test_windows_carry_the_mode_of_their_episode() -> None:
    windows = Windows(DATA, ENDS, [0, 2], 2, 4, modes=np.array([1, 0, -1]))
    assert windows.gather(torch.tensor([0, 3, 4, 10])).modes.tolist() == [1, 1, -1, -1]
    assert Windows(DATA, ENDS, [0, 2], 2, 4).gather(torch.tensor([0])).modes is None

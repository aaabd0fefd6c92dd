import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.streaming import (
    StreamedWindows,
    episodes_within,
    hold_windows,
    load_windows,
    memory_needed,
)
from diffusion_policy.datasets.windows import Shard, Windows, _fits, split_episodes

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
    windows = Windows(DATA, ENDS, [0, 2], 2, 4, labels=np.array([1, 0, -1]))
    assert windows.gather(torch.tensor([0, 3, 4, 10])).labels.tolist() == [1, 1, -1, -1]
    assert Windows(DATA, ENDS, [0, 2], 2, 4).gather(torch.tensor([0])).labels is None


def test_each_number_is_held_as_exactly_as_it_is_stored() -> None:
    for dtype, held in {"f2": "f4", "u1": "f4", "i2": "f4", "?": "f4", "i4": "f8", "i8": "f8", "f8": "f8"}.items():
        data = {"state": (np.arange(12) % 2).astype(dtype), "action": DATA["action"].astype("f4")}
        batch = Windows(data, ENDS, [0, 1, 2], 2, 4).gather(np.arange(12))
        assert batch.observations["state"].numpy().dtype == held
        assert batch.observations["state"].shape == (12, 2, 1)  # a number is a row
        assert batch.actions.dtype == torch.float32


@pytest.mark.parametrize(
    "data, ends, episodes, message",
    [
        ({"state": np.full((12, 2), np.nan)}, ENDS, [0], "state has NaN or infinity in 12 rows, first in row 0"),
        ({"state": np.array(["a"] * 12)}, ENDS, [0], "rows must be real numbers"),
        ({"state": np.zeros((11, 2))}, ENDS, [0], "episode ends must rise"),
        ({}, [4, 4, 12], [0], "episode ends must rise"),
        ({}, [], [0], "episode ends must rise"),
        ({}, ENDS, [], r"windows need some of the 3 episodes, from 0 on; got \[\]"),
        ({}, ENDS, [3], "windows need some of the 3 episodes"),
        ({"action": None}, ENDS, [0], "windows need `action` and at least one observation; got state"),
    ],
)
def test_what_cannot_be_cut_into_windows_is_refused_in_a_line(data: dict, ends, episodes, message: str) -> None:
    data = {key: rows for key, rows in (DATA | data).items() if rows is not None}
    with pytest.raises(ValueError, match=message):
        Windows(data, np.array(ends), episodes, 2, 4)


def test_data_lie_on_a_gpu_where_they_leave_room_for_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.zeros(100, np.float32), np.zeros(50, np.float32)]  # 600 bytes
    for free, fits in ((1199, False), (1200, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**6))
        assert _fits(arrays, torch.device("cuda")) == fits
        assert _fits(arrays, torch.device("cpu"))


@pytest.mark.gpu
def test_batches_are_the_same_wherever_the_data_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = np.array([1, 0, -1])
    batches = [Windows(DATA, ENDS, [0, 1, 2], 2, 4, labels=modes).gather(np.arange(12))]
    for share, place in ((0.5, "cuda"), (0.0, "cpu")):
        monkeypatch.setattr("diffusion_policy.datasets.windows.DEVICE_SHARE", share)
        windows = Windows(DATA, ENDS, [0, 1, 2], 2, 4, labels=modes, device="cuda")
        assert windows._data["state"].device.type == place
        batches.append(windows.gather(np.arange(12)))
        for mine, held in zip(batches[-1][:3], batches[0][:3], strict=True):
            torch.testing.assert_close(mine, held, rtol=0, atol=0, check_device=False)
        assert batches[-1].actions.device.type == "cuda"


# Streamed from a store


def make_store(path: Path, lengths: list[int], width: int = 3) -> EpisodeStore:
    """Rows that say which row they are; chunks of 16 rows."""
    rows = np.arange(sum(lengths))
    group = zarr.create_group(path)
    state = np.repeat(rows[:, None], width, axis=1).astype(np.float32)
    group.create_array("data/state", data=state, chunks=(16, width))
    group.create_array("data/action", data=rows[:, None].astype(np.float64), chunks=(50, 1))
    group.create_array("meta/episode_ends", data=np.cumsum(lengths))
    return EpisodeStore.open(path)


KEYS = {"state": "state", "action": "action"}
LENGTHS = [3, 40, 1, 1, 200, 16, 33, 90, 7]


@settings(max_examples=15)
@given(
    st.integers(1, 5),
    st.integers(5, 20),
    st.sampled_from([1, 500, 2000, 10**6]),
    st.sampled_from([[0, 1, 2, 3, 4, 5, 6, 7, 8], [1, 4, 8], [2], [0, 7]]),
    st.integers(1, 64),
)
def test_a_stream_shows_every_window_once_in_a_pass_as_memory_does(
    tmp_path_factory, observation_horizon: int, prediction_horizon: int, pool: int, episodes: list[int], size: int
) -> None:
    store = make_store(tmp_path_factory.mktemp("stream") / "s.zarr", LENGTHS)
    horizons = observation_horizon, prediction_horizon
    modes = np.arange(9) % 4 - 1
    held = hold_windows(store, KEYS, episodes, *horizons, labels=modes)
    streamed = StreamedWindows(store, KEYS, episodes, *horizons, labels=modes, pool_bytes=pool)
    assert len(streamed) == len(held)
    size = min(size, len(held))
    batches = list(itertools.islice(streamed.batches(size, seed=5), len(held) // size))
    seen = torch.cat([batch.observations["state"][:, -1, 0] for batch in batches]).long()
    everything = held.gather(np.arange(len(held)))
    by_row = {int(row): i for i, row in enumerate(everything.observations["state"][:, -1, 0])}
    indices = torch.tensor([by_row[int(row)] for row in seen])
    assert len(set(indices.tolist())) == len(seen) == len(held) // size * size
    torch.testing.assert_close(torch.cat([batch.actions for batch in batches]), everything.actions[indices])
    states = torch.cat([batch.observations["state"] for batch in batches])
    torch.testing.assert_close(states, everything.observations["state"][indices])
    assert torch.equal(torch.cat([batch.labels for batch in batches]), everything.labels[indices])


@pytest.mark.parametrize("pool", [None, 800])
@pytest.mark.parametrize("first_step", [1, 7, 11, 12, 13, 40])
def test_the_order_goes_on_from_any_step(tmp_path: Path, pool: int | None, first_step: int) -> None:
    store = make_store(tmp_path / "s.zarr", LENGTHS)
    windows = (
        StreamedWindows(store, KEYS, range(9), 2, 8, pool_bytes=pool)
        if pool
        else hold_windows(store, KEYS, range(9), 2, 8)
    )
    whole = list(itertools.islice(windows.batches(32, seed=3), first_step + 14))
    rest = list(itertools.islice(windows.batches(32, seed=3, first_step=first_step), 14))
    for a, b in zip(whole[first_step:], rest, strict=True):
        assert torch.equal(a.actions, b.actions)
        assert torch.equal(a.observations["state"], b.observations["state"])


@pytest.mark.parametrize("pool", [None, 800])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_shares_of_every_batch_make_it_whole(tmp_path: Path, pool: int | None, parts: int) -> None:
    store = make_store(tmp_path / "s.zarr", LENGTHS)
    windows = (
        StreamedWindows(store, KEYS, range(9), 2, 8, pool_bytes=pool)
        if pool
        else hold_windows(store, KEYS, range(9), 2, 8)
    )
    whole = itertools.islice(windows.batches(32, seed=3, first_step=2), 14)
    shares = [itertools.islice(windows.batches(32, 3, 2, Shard(which, parts)), 14) for which in range(parts)]
    for batch, *divided in zip(whole, *shares, strict=True):
        assert torch.equal(batch.actions, torch.cat([part.actions for part in divided]))
        assert torch.equal(batch.observations["state"], torch.cat([part.observations["state"] for part in divided]))
        np.testing.assert_array_equal(batch.rows, np.concatenate([part.rows for part in divided]))
        assert max(len(part.actions) for part in divided) - min(len(part.actions) for part in divided) <= 1


@pytest.mark.parametrize("pool", [None, 800])
def test_a_window_says_which_row_of_the_store_is_now(tmp_path: Path, pool: int | None) -> None:
    store = make_store(tmp_path / "s.zarr", LENGTHS)
    few = [1, 4, 8]
    windows = StreamedWindows(store, KEYS, few, 2, 8, pool_bytes=pool) if pool else hold_windows(store, KEYS, few, 2, 8)
    batch = next(windows.batches(20, seed=0))
    expected = np.stack([store.read_rows("state", row, row + 1)[0] for row in batch.rows])
    np.testing.assert_array_equal(batch.observations["state"][:, -1], expected)


def test_a_stream_holds_numbers_as_exactly_as_memory_does(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s.zarr")
    rows = 5.4e6 + np.linspace(0, 1, 300)
    group.create_array("data/state", data=rows, chunks=(16,))  # of which a step is one number
    group.create_array("data/action", data=rows[:, None].astype(np.float32), chunks=(50, 1))
    group.create_array("meta/episode_ends", data=np.array([100, 300]))
    store = EpisodeStore.open(tmp_path / "s.zarr")
    streamed = StreamedWindows(store, KEYS, [0, 1], 1, 8, pool_bytes=2000)
    held = hold_windows(store, KEYS, [0, 1], 1, 8)
    seen = torch.cat([batch.observations["state"] for batch in itertools.islice(streamed.batches(10, 0), 30)])
    np.testing.assert_array_equal(np.sort(seen.flatten()), rows)
    np.testing.assert_array_equal(held.rows()["state"][:, 0], rows)
    assert streamed.shapes == held.shapes == {"state": (1, 1), "action": (8, 1)}
    assert memory_needed(store, KEYS, [0]) == 100 * (8 + 4 + 40)


def test_a_stream_is_shuffled_differently_in_each_pass_and_by_each_seed(tmp_path: Path) -> None:
    windows = StreamedWindows(make_store(tmp_path / "s.zarr", LENGTHS), KEYS, range(9), 1, 8, pool_bytes=1500)
    per_pass = len(windows) // 16

    def rows(seed: int, first: int) -> list[float]:
        batches = itertools.islice(windows.batches(16, seed, first), per_pass)
        return torch.cat([batch.actions[:, 0, 0] for batch in batches]).tolist()

    first, second, other = rows(0, 0), rows(0, per_pass), rows(1, 0)
    assert first != second
    assert first != other
    assert first != sorted(first)


def test_a_stream_reads_only_the_pool_and_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s.zarr", [100] * 50)
    read: list[int] = []
    real = store.read_rows
    monkeypatch.setattr(
        store, "read_rows", lambda key, start, stop: read.append(stop - start) or real(key, start, stop)
    )
    windows = StreamedWindows(store, KEYS, range(50), 2, 8, pool_bytes=20_000)
    batches = windows.batches(8, seed=0)
    next(batches)
    batches.close()  # waits for what is being read
    assert sum(read) * (4 * 3 + 4 + 32) / 2 < 3 * 20_000  # both keys are counted, margins included
    assert max(read) < 200


def test_windows_are_held_in_memory_while_they_fit(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", LENGTHS)
    needed = memory_needed(store, KEYS, range(9))
    assert needed == sum(LENGTHS) * (3 * 4 + 8 + 40)  # float32 and float64
    for spared, kind in ((0, Windows), (1, StreamedWindows)):
        memory = needed - spared
        made = load_windows(store, KEYS, range(9), 2, 8, device="cpu", labels=None, memory_bytes=memory)
        assert isinstance(made, kind)
    np.testing.assert_array_equal(episodes_within(store, KEYS, [4, 1, 7], 60 * 245), [4, 1])
    np.testing.assert_array_equal(episodes_within(store, KEYS, [4, 1, 7], 1), [4])


def test_a_pass_over_a_damaged_stream_says_where(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", [100] * 50)
    zarr.open_group(tmp_path / "s.zarr", mode="r+")["data/state"][1234, 1] = np.nan
    windows = StreamedWindows(store, KEYS, range(50), 2, 8, pool_bytes=20_000)
    with pytest.raises(StoreError, match=r"data/state has NaN or infinity in 1 rows, first in episode 12 \(row 1234\)"):
        for _ in itertools.islice(windows.batches(50, seed=0), 100):
            pass


def test_at_most_so_many_episodes_are_trained_on() -> None:
    training, validation = split_episodes(100, 0.1, 0, most=20)
    everything, held_out = split_episodes(100, 0.1, 0)
    assert len(training) == 20
    assert set(training) < set(everything)
    np.testing.assert_array_equal(validation, held_out)

from pathlib import Path

import numpy as np
import pytest

from diffusion_policy.datasets.combine import merge, split
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import validate


def make(path: Path, seeds: range, modes: list[str], **attributes) -> Path:
    with EpisodeStore.create(path, {"control_frequency": 10, **attributes}, modes) as store:
        for seed in seeds:
            data = {key: np.full((seed + 2, 2), seed, np.float32) for key in ("state", "action")}
            store.append([Demonstration(data, seed, modes[seed % len(modes)], True)])
    return path


def test_stores_are_joined_one_after_the_other_with_the_modes_of_all(tmp_path: Path) -> None:
    first = make(tmp_path / "a.zarr", range(3), ["left", "right"], noise=0.4, collection={"episodes": 3, "seed": 0})
    second = make(tmp_path / "b.zarr", range(3, 5), ["right", "up"], noise=0.2)
    assert merge([first, second], tmp_path / "all.zarr") == (5, ())
    store = EpisodeStore.open(tmp_path / "all.zarr")
    assert store.modes == ("left", "right", "up")
    assert [(episode.seed, episode.mode) for episode in store.episodes()] == [
        (0, "left"), (1, "right"), (2, "left"), (3, "up"), (4, "right"),
    ]  # fmt: skip
    assert all((episode.data["state"] == episode.seed).all() for episode in store.episodes())
    assert store.attributes["noise"] is None
    assert "collection" not in store.attributes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"control_frequency": 20}, "has the control frequency 20; .* has 10"),
        ({"action_key": "state"}, "action key state"),
    ],
)
def test_stores_that_differ_are_not_joined(tmp_path: Path, change: dict, message: str) -> None:
    first, second = make(tmp_path / "a.zarr", range(2), ["a"]), make(tmp_path / "b.zarr", range(2), ["a"], **change)
    with pytest.raises(StoreError, match=message):
        merge([first, second], tmp_path / "all.zarr")
    assert not (tmp_path / "all.zarr").exists()


ENVIRONMENT = {"id": "a/B-v0", "arguments": {"rows": 1}}


def like(path: Path, dtype: str, final: bool, environment: dict, seed: int = 0, **attributes) -> Path:
    """A store of one episode, whose observations have a type, and may be known after the last action."""
    with EpisodeStore.create(path, {"environment": environment, **attributes}, ["a"]) as store:
        data = {"state": np.full((20, 2), 0.1, dtype), "action": np.zeros((20, 2), np.float32)}
        store.append([Demonstration(data, seed, "a", True, {"state": np.ones(2, dtype)} if final else None)])
    return path


def test_what_was_collected_recorded_and_rolled_out_is_joined(tmp_path: Path) -> None:
    signals = {"success": "won"}
    stores = [
        like(tmp_path / "a.zarr", "f4", False, ENVIRONMENT, noise=0.4, collection={"episodes": 1, "seed": 0}),
        like(tmp_path / "b.zarr", "f8", True, ENVIRONMENT | {"wrappers": [], "signals": signals}, 1),
        like(tmp_path / "c.zarr", "f4", True, ENVIRONMENT, 2),
    ]
    remarks = ("final observations of state are left out: not all stores know them",)
    assert merge(stores, tmp_path / "all.zarr") == (3, remarks)
    store = EpisodeStore.open(tmp_path / "all.zarr")
    assert store.dtype("state") == np.float64
    assert store.dtype("action") == np.float32
    assert [episode.data["state"][0, 0] for episode in store.episodes()] == [np.float32(0.1), 0.1, np.float32(0.1)]
    assert store.finals() == {}
    assert store.attributes["environment"] == ENVIRONMENT | {"signals": signals}
    assert store.attributes["noise"] is None
    assert "collection" not in store.attributes
    assert validate(tmp_path / "all.zarr") == []
    assert merge(stores[1:], tmp_path / "known.zarr") == (2, ())
    assert EpisodeStore.open(tmp_path / "known.zarr").finals()["state"].dtype == np.float64


def test_signals_that_differ_are_left_out_and_said(tmp_path: Path) -> None:
    stores = [
        like(tmp_path / f"{name}.zarr", "f4", False, ENVIRONMENT | {"signals": {"success": name}}) for name in "ab"
    ]
    assert merge(stores, tmp_path / "all.zarr").remarks == (
        "the signals of success and modes are left out: the stores differ in them",
    )
    assert EpisodeStore.open(tmp_path / "all.zarr").attributes["environment"] == ENVIRONMENT


@pytest.mark.parametrize(
    "environment, dtype, message",
    [
        ({"id": "a/C-v0", "arguments": {"rows": 1}}, "f4", "has the environment a/C-v0; .* has a/B-v0"),
        ({"id": "a/B-v0", "arguments": {"rows": 2}}, "f4", "has the arguments {'rows': 2}; .* has {'rows': 1}"),
        (ENVIRONMENT | {"wrappers": [{"entry_point": "m:W", "kwargs": {}}]}, "f4", "has the wrappers "),
        (ENVIRONMENT, "i8", "data/state is float32 in .*, int64 in .*; these types have none in common"),
    ],
)
def test_what_truly_differs_is_named(tmp_path: Path, environment: dict, dtype: str, message: str) -> None:
    stores = [
        like(tmp_path / "a.zarr", "f4", False, ENVIRONMENT),
        like(tmp_path / "b.zarr", dtype, False, environment),
    ]
    with pytest.raises(StoreError, match=message):
        merge(stores, tmp_path / "all.zarr")


def test_a_split_is_disjoint_complete_and_fixed_by_its_seed(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.zarr", range(10), ["a", "b"])
    parts = []
    for name in ("x", "y"):
        targets = tmp_path / f"{name}1.zarr", tmp_path / f"{name}2.zarr"
        assert split(whole, targets, 0.7, seed=3) == (7, 3)
        parts.append([[episode.seed for episode in EpisodeStore.open(target).episodes()] for target in targets])
    assert parts[0] == parts[1]
    assert sorted(parts[0][0] + parts[0][1]) == list(range(10))
    assert parts[0][0] == sorted(parts[0][0])


def test_a_split_overwrites_nothing_and_leaves_nothing_empty(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.zarr", range(4), ["a"])
    with pytest.raises(StoreError, match="already exists"):
        split(whole, (tmp_path / "new.zarr", whole), 0.5, 0)
    with pytest.raises(StoreError, match=r"a share of 0\.01 of 4 episodes leaves one of the two stores empty"):
        split(whole, (tmp_path / "new.zarr", tmp_path / "other.zarr"), 0.01, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.zarr"]

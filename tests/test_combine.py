from pathlib import Path

import numpy as np
import pytest

from diffusion_policy.datasets.combine import merge, split
from diffusion_policy.datasets.store import Demonstration, EpisodeStore, StoreError


def make(path: Path, seeds: range, modes: list[str], **attributes) -> Path:
    with EpisodeStore.create(path, {"control_frequency": 10, **attributes}, modes) as store:
        for seed in seeds:
            data = {key: np.full((seed + 2, 2), seed, np.float32) for key in ("state", "action")}
            store.append([Demonstration(data, seed, modes[seed % len(modes)], True)])
    return path


def test_stores_are_joined_one_after_the_other_with_the_modes_of_all(tmp_path: Path) -> None:
    first = make(tmp_path / "a.zarr", range(3), ["left", "right"], noise=0.4, collection={"episodes": 3, "seed": 0})
    second = make(tmp_path / "b.zarr", range(3, 5), ["right", "up"], noise=0.2)
    assert merge([first, second], tmp_path / "all.zarr") == 5
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

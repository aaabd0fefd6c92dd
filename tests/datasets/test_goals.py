"""What an episode came to becomes its goal."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from diffusion_policy.cli import main
from diffusion_policy.datasets.goals import add_goals
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore

ENDS = np.array([4, 9])
STATE = np.arange(27, dtype=np.float32).reshape(9, 3)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A store that knows no observation beyond its last step."""
    group = zarr.open_group(tmp_path / "plain.zarr", mode="w")
    group.create_array("data/state", data=STATE)
    group.create_array("data/action", data=STATE[:, :2] + 1)
    group.create_array("meta/episode_ends", data=ENDS)
    return tmp_path / "plain.zarr"


def test_a_goal_is_the_last_observation_at_all_steps(plain: Path, tmp_path: Path) -> None:
    made = add_goals(plain, tmp_path / "aimed.zarr", {"goal": ("state", (2, 0)), "whole": ("state", ())})
    assert made.episodes == 2
    store = EpisodeStore.open(tmp_path / "aimed.zarr")
    first, second = store.episodes([0, 1], ("state", "goal", "whole", "action"))
    np.testing.assert_array_equal(first.data["goal"], np.tile([11, 9], (4, 1)))
    np.testing.assert_array_equal(second.data["whole"], np.tile([24, 25, 26], (5, 1)))
    np.testing.assert_array_equal(second.data["state"], STATE[4:])


def test_where_the_last_observation_is_kept_the_goal_is_of_it(plain: Path, tmp_path: Path) -> None:
    ends = np.array([[50, 51, 52], [60, 61, 62]], np.float32)
    zarr.open_group(plain, mode="a").create_array("meta/episode_final_state", data=ends)
    add_goals(plain, tmp_path / "aimed.zarr", {"end": ("state", ())})
    store = EpisodeStore.open(tmp_path / "aimed.zarr")
    np.testing.assert_array_equal(store.finals()["end"], ends)
    np.testing.assert_array_equal(store.read("end"), np.repeat(ends, [4, 5], axis=0))


@pytest.mark.parametrize(
    ("goals", "said"),
    [
        ({"state": ("state", ())}, "has a key 'state' already"),
        ({"action": ("state", ())}, "has a key 'action' already"),
        ({"goal": ("place", ())}, "a goal is of an observation, state; got 'place'"),
        ({"goal": ("state", (1, 3))}, r"state has the shape \(3,\) a step; got the columns \[1, 3\]"),
    ],
)
def test_goals_that_cannot_be_are_said(plain: Path, tmp_path: Path, goals: dict, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        add_goals(plain, tmp_path / "aimed.zarr", goals)
    assert not (tmp_path / "aimed.zarr").exists()


def test_a_policy_is_trained_for_goals_of_a_dataset_without(plain: Path, tmp_path: Path, capsys) -> None:
    aimed, told = str(tmp_path / "aimed.zarr"), "goal=state:0,1"
    assert main(["dataset", "goals", str(plain), "--output", aimed, "--goal", told]) == 0
    assert "2 episodes" in capsys.readouterr().err
    small = "--widths 8 --level-dim 16 --groups 4 --prediction-horizon 4 --action-horizon 2 --steps 2 --batch-size 4"
    small += " --validation-share 0 --device cpu"
    words = ["train", "--dataset", aimed, "--output", str(tmp_path / "run"), "--goal", "goal", "--hindsight", told]
    assert main([*words, *small.split(), "--hindsight-share", "1"]) == 0
    assert main(["dataset", "goals", str(plain), "--output", str(tmp_path / "x.zarr"), "--goal", "state"]) == 2
    assert "is told as goal=state or goal=state:2,3,4; got 'state'" in " ".join(capsys.readouterr().err.split())

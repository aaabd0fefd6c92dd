from pathlib import Path

import numpy as np
import pytest
import zarr

from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import Finding, validate


def make(path: Path) -> Path:
    """Four episodes of 20, 30, 8000, 40 steps; the arrays have two chunks."""
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, {"observation_keys": ["state"]}, ["a", "b"]) as store:
        for seed, length in enumerate((20, 30, 20_000, 40)):
            data = {"state": rng.normal(size=(length, 3)), "action": rng.normal(size=(length, 2))}
            store.append([Demonstration(data, seed, "a", True)])
    return path


def serious(path: Path) -> list[Finding]:
    return [finding for finding in validate(path) if finding.serious]


def test_a_good_store_has_no_findings(tmp_path: Path) -> None:
    assert validate(make(tmp_path / "store.zarr")) == []


def test_every_problem_is_found_in_one_pass(tmp_path: Path) -> None:
    path = make(tmp_path / "store.zarr")
    group = zarr.open_group(path, mode="r+")
    group["data/state"][[7, 8, 25], [0, 1, 2]] = np.nan
    group["data/action"][20_060, 0] = np.inf
    group["meta/episode_mode"][2] = 7
    group["meta/episode_seed"][3] = 0
    (path / "data" / "state" / "c.1.0").unlink()
    chunk = path / "data" / "action" / "c.0.0"
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 4
    chunk.write_bytes(damaged)
    found = [(finding.path, finding.episode, finding.row) for finding in serious(path)]
    assert found == [
        ("data/action", 0, 0),  # the chunk
        ("data/action", 3, 20_060),
        ("data/state", 2, 16_384),  # the missing chunk
        ("data/state", 0, 7),
        ("data/state", 1, 25),
        ("data/state", 2, 16_384),  # it reads as NaN
        ("data/state", 3, 20_050),
        ("meta", 2, None),
        ("meta/episode_mode", 2, None),
    ]
    texts = " | ".join(finding.what for finding in validate(path))
    assert "rows 0 to 16383 are damaged: Stored and computed checksum do not match" in texts
    assert "NaN or infinity in 2 rows of episode 0, first in row 7" in texts
    assert "chunk c.1.0 is missing (rows 16384 to 32767)" in texts
    assert "episode 2 has the mode 7; there are 2" in texts
    assert "1 seeds occur more than once, first 0" in texts


@pytest.mark.parametrize(
    "ends, episodes",
    [
        ([20, 50, 40, 20_090], [2]),
        ([30, 50, 20_050, 20_040], [3]),
        ([-7, 50, 51, 60], [0]),
    ],
)
def test_episodes_that_overlap_or_shrink_are_named(tmp_path: Path, ends: list[int], episodes: list[int]) -> None:
    path = make(tmp_path / "store.zarr")
    zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = ends
    found = [finding for finding in serious(path) if finding.path == "meta/episode_ends"]
    assert [finding.episode for finding in found] == episodes
    assert "would reach from row" in found[0].what


def test_episodes_without_rows_are_named(tmp_path: Path) -> None:
    path = make(tmp_path / "store.zarr")
    zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = [0, 20, 20, 20_090]
    found = [finding for finding in validate(path) if "has no rows" in finding.what]
    assert [(finding.episode, finding.serious) for finding in found] == [(0, False), (2, False)]
    assert "is left out; drop it with: dataset repair" in found[0].what


def test_rows_and_keys_that_are_missing_are_named(tmp_path: Path) -> None:
    path = make(tmp_path / "store.zarr")
    group = zarr.open_group(path, mode="r+")
    group["data/state"].resize((100, 3))
    group.attrs["action_key"] = "velocity"
    group.attrs["observation_keys"] = ["pose"]
    texts = [f"{finding.path} {finding.what}" for finding in serious(path)]
    assert texts == [
        "data/pose should hold an observation, but is not there; there are action",
        "data/velocity should hold the actions, but is not there; there are action",
        "data/state has 100 rows; meta/episode_ends needs 20090; it is left out",
    ]


def test_what_is_unprotected_uncommitted_or_short_is_a_note(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "v2.zarr", zarr_format=2)
    for key in ("state", "action"):
        group.create_array(f"data/{key}", data=np.zeros((50, 2), np.float32))
    group.create_array("meta/episode_ends", data=np.array([3, 40]))
    findings = validate(tmp_path / "v2.zarr")
    assert not any(finding.serious for finding in findings)
    texts = " | ".join(f"{finding.path}: {finding.what}" for finding in findings)
    assert "1 of 2 episodes have fewer than 16 steps, the shortest 3" in texts
    assert "data/action: has 10 rows beyond the last complete episode" in texts
    assert "data/action, data/state: no checksum protects the values" in texts


def test_arrays_of_objects_or_strangers_codecs_are_problems(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "store.zarr", zarr_format=2)
    group.create_array("data/action", data=np.zeros((50, 2), np.complex64))
    group.create_array("data/state", data=np.array(["a"] * 50))
    group.create_array("meta/episode_ends", data=np.array([20, 50]))
    texts = [finding.what for finding in serious(tmp_path / "store.zarr")]
    assert texts[0] == "must hold numbers; got complex64; it is left out"
    assert "must hold numbers; got" in texts[1]


def test_a_store_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no dataset at"):
        validate(tmp_path / "nothing.zarr")


def test_what_is_known_of_episodes_must_be_one_row_of_numbers(tmp_path: Path) -> None:
    path = make(tmp_path / "store.zarr")
    group = zarr.open_group(path, mode="r+")
    del group["meta/episode_mode"]
    group.create_array("meta/episode_mode", data=np.ones((4, 2), np.int64))
    (finding,) = serious(path)
    assert finding.path == "meta/episode_mode"
    assert "must be one row of whole numbers; got int64 of shape (4, 2)" in finding.what
    with pytest.raises(StoreError, match="must be one row of whole numbers"):
        list(EpisodeStore.open(path).episodes())


def test_a_store_that_has_lost_its_ends_says_what_is_left(tmp_path: Path) -> None:
    path = make(tmp_path / "store.zarr")
    (path / "meta" / "episode_ends" / "c.0").unlink()
    texts = [f"{finding.path} {finding.what}" for finding in validate(path)]
    assert texts[0] == "meta/episode_ends holds no episodes"
    assert "data/state has 20090 rows that belong to no episode" in texts

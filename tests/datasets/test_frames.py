"""Which frames show nothing, which repeat, and what `validate` says of a store of pictures."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr

from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.frames import Frames, Run
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import Finding, validate

LENGTHS = 30, 40, 25
"""Of the episodes."""


def moving(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A square on a textured floor (steps, 16, 16, 3), and where it is (steps, 2)."""
    rng = np.random.default_rng(seed)
    frames = np.broadcast_to(rng.integers(60, 90, (16, 16, 1), np.uint8), (steps, 16, 16, 3)).copy()
    xy = (np.abs((np.arange(steps)[:, None] + rng.integers(12, size=2)) % 24 - 12)).astype(int)
    for frame, (x, y) in zip(frames, xy, strict=True):
        frame[y : y + 4, x : x + 4] = 200, 30, 90
    return frames, xy.astype(np.float32)


def make(path: Path, change=lambda frames, xy: (frames, xy), **attributes) -> Path:
    """A store of three episodes; `change` gets all their frames and positions."""
    parts = [moving(length, seed) for seed, length in enumerate(LENGTHS)]
    frames, xy = change(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))
    edges = np.cumsum((0, *LENGTHS))
    with EpisodeStore.create(path, attributes, [], sync=False) as store:
        for seed, (start, stop) in enumerate(pairwise(edges)):
            data = {"camera": frames[start:stop], "position": xy[start:stop], "action": xy[start:stop] + 1}
            store.append([Demonstration(data, seed, None, True)])
    return path


def findings(path: Path) -> list[Finding]:
    return [finding for finding in validate(path) if finding.path == "data/camera"]


def test_a_good_camera_has_no_findings(tmp_path: Path) -> None:
    assert validate(make(tmp_path / "store.zarr")) == []


def test_frames_that_show_nothing_are_named_by_episode(tmp_path: Path) -> None:
    def darken(frames: np.ndarray, xy: np.ndarray):
        frames[[3, 5, 50]] = 0
        frames[50] += np.random.default_rng(0).integers(0, 9, (16, 16, 3), np.uint8)  # the noise of a dark sensor
        frames[51] = 255
        return frames, xy

    found = findings(make(tmp_path / "store.zarr", darken))
    assert [(one.serious, one.episode, one.row) for one in found] == [(True, 0, 3), (True, 1, 50)]
    assert found[0].what == "2 frames of episode 0 show nothing (one colour all over), first in row 3"


def test_a_camera_that_froze_is_named_where_the_state_moved(tmp_path: Path) -> None:
    def freeze(frames: np.ndarray, xy: np.ndarray):
        frames[10:22] = frames[10]  # moves on
        frames[35:40] = frames[35]  # shorter than a freeze
        frames[45:65], xy[45:65] = frames[45], xy[45]  # nothing moves
        return frames, xy

    (found,) = findings(make(tmp_path / "store.zarr", freeze))
    assert (found.serious, found.episode, found.row) == (True, 0, 10)
    assert found.what == "12 frames of episode 0 are frozen while position moves, the longest time rows 10 to 21"


def test_without_a_state_the_actions_say_whether_something_moves(tmp_path: Path) -> None:
    def freeze(frames: np.ndarray, xy: np.ndarray):
        frames[72:90] = frames[72]
        return frames, xy

    (found,) = findings(make(tmp_path / "store.zarr", freeze, observation_keys=["camera"]))
    assert found.what == "18 frames of episode 2 are frozen while action moves, the longest time rows 72 to 89"


def test_a_camera_that_was_off_is_dark_and_not_frozen_too(tmp_path: Path) -> None:
    found = findings(make(tmp_path / "store.zarr", lambda frames, xy: (0 * frames, xy)))
    assert [one.episode for one in found] == [0, 1, 2]
    assert {one.what.partition(" of ")[2] for one in found} == {
        f"episode {i} show nothing (one colour all over), first in row {row}" for i, row in enumerate((0, 30, 70))
    }


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x.astype(np.float32) / 255, None),
        (lambda x: x.astype(np.float32), None),
        (lambda x: x.astype(np.int16), None),
        (lambda x: x.astype(np.float32) / 127.5 - 1, "holds values from -0.764706 to 0.568627; floats of images"),
        (lambda x: x.astype(np.float64) * 2, "holds values from 60 to 400; floats of images lie from 0 to 1, or"),
        (lambda x: x.astype(np.int16) - 100, "holds values from -70 to 100; .* whole numbers from 0 on"),
    ],
)  # fmt: skip
def test_values_that_no_image_has_are_named(tmp_path: Path, change, said: str | None) -> None:
    found = findings(make(tmp_path / "store.zarr", lambda frames, xy: (change(frames), xy)))
    if said is None:
        assert found == []
    else:
        assert [one.serious for one in found] == [True]
        assert re.match(said, found[0].what)


def test_channels_that_come_first_are_named(tmp_path: Path) -> None:
    found = findings(make(tmp_path / "store.zarr", lambda frames, xy: (np.moveaxis(frames, -1, 1), xy)))
    assert [one.serious for one in found] == [True]
    assert found[0].what == (
        "rows of shape (3, 16, 16) have their channels first; images are (height, width, channels): turn them with "
        "numpy.moveaxis(rows, 1, -1), and write them anew"
    )


def test_damage_is_not_taken_for_darkness(tmp_path: Path) -> None:
    path = make(tmp_path / "store.zarr")
    file = path / "data" / "camera" / "c.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[40] ^= 4
    file.write_bytes(content)
    found = findings(path)
    assert len(found) == 1
    assert "are damaged" in found[0].what


def test_a_stranger_array_of_pictures_is_checked_too(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "v2.zarr", zarr_format=2)
    frames, xy = moving(50, 0)
    frames[20:24] = 7
    group.create_array("data/camera", data=frames.astype(np.float32), chunks=(9, 16, 16, 3))
    group.create_array("data/action", data=xy)
    group.create_array("meta/episode_ends", data=np.array([50]))
    (found,) = [one for one in validate(tmp_path / "v2.zarr") if one.serious]
    assert found.what == "4 frames of episode 0 show nothing (one colour all over), first in row 20"


@pytest.mark.parametrize("blocks", [[100], [1] * 100, [7, 30, 63]])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_is_measured_does_not_depend_on_the_blocks(blocks: list[int], channels: int) -> None:
    rows = np.random.default_rng(1).integers(0, 256, (100, 9, 12, channels), np.uint8)
    rows[40:55] = rows[40]
    rows[70] = 3
    frames, first = Frames(100, np.array([0, 50]), rows.dtype), 0
    for count in blocks:
        frames.add(first, rows[first : first + count])
        first += count
    frames.finish()
    np.testing.assert_allclose(frames.mean, rows.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_array_equal(frames.lowest, rows.min(axis=(0, 1, 2)))
    np.testing.assert_array_equal(frames.highest, rows.max(axis=(0, 1, 2)))
    assert np.flatnonzero(frames.blank).tolist() == [70]
    assert np.flatnonzero(frames.repeated).tolist() == [*range(41, 50), *range(51, 55)]
    assert list(frames.runs(np.array([50, 100]))) == [Run(0, 40, 50)]

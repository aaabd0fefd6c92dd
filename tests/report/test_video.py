import sys
from functools import partial
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from diffusion_policy.basics.files import WRITING
from diffusion_policy.envs.avoid import AvoidEnv
from diffusion_policy.report import video
from diffusion_policy.report.video import Filmer, FrameRecorder, Script, VideoError, tile, write_video


def film(length: int, shade: int) -> np.ndarray:
    return np.full((length, 32, 48, 3), shade, np.uint8)


def test_a_script_is_filmed_from_start_to_end(make_env: partial) -> None:
    actions = np.full((7, 2), [0.0, 0.01], np.float32)
    frames = FrameRecorder(make_env, every=3)(Script(0, actions))
    assert frames.shape == (4, 384, 480, 3)  # the start, steps 3 and 6, and the last
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50  # the arm has moved


def test_tiles_stand_side_by_side_and_the_shorter_holds_its_last_frame() -> None:
    tiled = tile([film(2, 10), film(4, 20), film(3, 30)], columns=2)
    assert tiled.shape == (4, 64, 96, 3)
    assert (tiled[3, :32, :48] == 10).all()
    assert (tiled[:, :32, 48:] == 20).all()
    assert (tiled[:, 32:, 48:] == 255).all()


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
def test_a_video_has_the_frames_that_were_written(tmp_path: Path, name: str) -> None:
    frames = np.concatenate([film(1, shade) for shade in (0, 60, 120, 180, 240)])
    write_video(tmp_path / name, frames, 10)
    with imageio.get_reader(tmp_path / name) as reader:
        read = [frame for frame in reader]  # noqa: C416  (its length is infinite)
    assert len(read) == 5
    np.testing.assert_allclose([frame.mean() for frame in read], [0, 60, 120, 180, 240], atol=6)


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a video is written as .mp4 or .gif; got .*video.avi"):
        write_video(tmp_path / "video.avi", film(1, 0), 10)


SHORT = Script(0, np.zeros((2, 2), np.float32))
SIZES = iter(range(8, 100))
GIVEN = [
    (lambda _: None, "render() must give an array (height, width, 3) of uint8; got NoneType"),
    (lambda _: [np.zeros((8, 8, 3), np.uint8)], "of uint8; got list"),
    (lambda _: np.zeros((8, 8), np.uint8), "of uint8; got one of (8, 8) and uint8"),
    (lambda _: np.zeros((0, 8, 3), np.uint8), "of uint8; got one of (0, 8, 3) and uint8"),
    (lambda _: np.zeros((8, 8, 4), np.uint8), "of uint8; got one of (8, 8, 4) and uint8"),
    (lambda _: np.zeros((8, 8, 3)), "of uint8; got one of (8, 8, 3) and float64"),
    (lambda _: np.zeros((8, next(SIZES), 3), np.uint8), "render() must give pictures of one size; got (8, 8, 3) and"),
    (lambda _: np.zeros((2, 10_000, 3), np.uint8), "a picture of 10000 x 2 is too large for a film"),
    (lambda _: np.zeros((2, 6_000, 3), np.uint8), "3 pictures of 6000 x 2 are too many for one film"),
    (lambda _: sys.exit("no display"), "SystemExit: no display"),
    (lambda _: np.zeros((1, 1, 3), np.uint8), ""),
]


@pytest.mark.parametrize("render, reason", GIVEN, ids=[reason[-30:] for _, reason in GIVEN])
def test_what_render_gives_is_a_film_or_a_reason(make_env: partial, monkeypatch, render, reason: str) -> None:
    monkeypatch.setattr(AvoidEnv, "render", render)
    monkeypatch.setattr(video, "MOST_PICTURE_BYTES", 50_000)
    monkeypatch.setattr(video, "MOST_FILM_BYTES", 100_000)
    said = Filmer(partial(make_env, disable_env_checker=True), 1, 30)(SHORT)
    assert isinstance(said, str)
    assert reason in said


def test_a_picture_that_is_drawn_into_again_is_copied(make_env: partial, monkeypatch) -> None:
    canvas = np.zeros((8, 8, 3), np.uint8)

    def draw(_: AvoidEnv) -> np.ndarray:
        canvas[:] += 50
        return canvas

    monkeypatch.setattr(AvoidEnv, "render", draw)
    assert FrameRecorder(make_env)(SHORT)[:, 0, 0, 0].tolist() == [50, 100, 150]


def test_films_of_different_sizes_are_no_tiles() -> None:
    with pytest.raises(VideoError, match="one size"):
        tile([film(2, 10), film(2, 10)[:, :16]], columns=2)


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def fill(path: Path, *_: object, **__: object) -> None:
        assert path.name.startswith(WRITING)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imageio, "mimwrite", fill)
    with pytest.raises(OSError, match="No space"):
        write_video(tmp_path / "a.mp4", film(2, 0), 10)
    assert list(tmp_path.iterdir()) == []

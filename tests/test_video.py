from functools import partial
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from diffusion_policy.video import Camera, Script, tile, write_video


def film(length: int, shade: int) -> np.ndarray:
    return np.full((length, 32, 48, 3), shade, np.uint8)


def test_a_script_is_filmed_from_start_to_end(make_env: partial) -> None:
    actions = np.full((7, 2), [0.0, 0.01], np.float32)
    frames = Camera(make_env, every=3)(Script(0, actions))
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

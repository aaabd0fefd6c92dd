"""Videos of episodes: replayed from their seeds and recorded actions, drawn, tiled and encoded.

An environment gives the same episode for the same seed and actions, so nothing needs to be filmed while a policy is
measured. What somebody else's `render` gives is looked at before it is believed.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw

from diffusion_policy.basics.files import WRITING
from diffusion_policy.basics.text import error_line

PLAN_COLOR = (0, 90, 200, 130)
MOST_PICTURE_BYTES, MOST_FILM_BYTES = 2**26, 2**29
"""Of one picture, and of all of one film."""

Pixels = Callable[[np.ndarray], np.ndarray]
"""Paths (N, points, 2) in an environment's plane → the same in the columns and rows of its pictures."""


class VideoError(ValueError):
    """A film cannot be made."""


class Script(NamedTuple):
    """An episode to film."""

    seed: int
    actions: np.ndarray
    """Raw, (steps, A)."""
    plans: Mapping[int, np.ndarray] = {}
    """Paths to draw into the picture from some steps on, each until the next, (N, points, 2) in the plane of the
    environment's `pixels`."""


class FrameRecorder:
    """Films one script a call, in an environment that it keeps."""

    def __init__(
        self,
        make_env: Callable[..., gymnasium.Env],
        every: int = 1,
        pixels_of: Callable[[gymnasium.Env], Pixels | None] = lambda _: None,
    ) -> None:
        """`every`: film each n-th step only, and the last; `pixels_of`: where an environment says how plans are drawn
        into its pictures."""
        self._env = make_env(render_mode="rgb_array")
        self._every = every
        self._pixels = pixels_of(self._env)

    def __call__(self, script: Script) -> np.ndarray:
        """The frames, (frames, height, width, 3) uint8. Raises VideoError where the environment gives no pictures, or
        more of them than memory should hold."""
        self._env.reset(seed=script.seed)
        plans = script.plans.get(0)
        frames = [self._picture(plans)]
        count = 1 + math.ceil(len(script.actions) / self._every)
        if count * frames[0].nbytes > MOST_FILM_BYTES:
            raise VideoError(
                f"{count} pictures of {frames[0].shape[1]} x {frames[0].shape[0]} are too many for one film; it holds "
                f"{MOST_FILM_BYTES // 2**20} MB"
            )
        for i, action in enumerate(script.actions, start=1):
            self._env.step(action)
            plans = script.plans.get(i, plans)
            if i % self._every == 0 or i == len(script.actions):
                frames.append(self._picture(plans))
        _require_one_size(frames)
        return np.stack(frames)

    def _picture(self, plans: np.ndarray | None) -> np.ndarray:
        """What is seen now, with the plans drawn in."""
        frame = check_picture(self._env.render())
        if plans is None or self._pixels is None:
            return frame
        picture = Image.fromarray(frame)
        pen = ImageDraw.Draw(picture, "RGBA")
        for path in self._pixels(plans):
            pen.line([(float(column), float(row)) for column, row in path], fill=PLAN_COLOR, width=2)
        return np.asarray(picture)


class Filmer:
    """Films one script a call as an MP4; where that cannot be done it says why, so that one film costs no other."""

    def __init__(self, make_env: Callable[..., gymnasium.Env], every: int, frames_per_second: float) -> None:
        """`frames_per_second`: steps that the environment takes in a second."""
        self._make_env = make_env
        self._every = every
        self._rate = frames_per_second / every
        self._recorder: FrameRecorder | None = None

    def __call__(self, script: Script) -> bytes | str:
        """The MP4, or what went wrong."""
        try:
            self._recorder = self._recorder or FrameRecorder(self._make_env, self._every)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "film.mp4"
                write_video(path, self._recorder(script), self._rate)
                return path.read_bytes()
        except (Exception, SystemExit) as error:
            self._recorder = None  # what has failed may be broken
            return str(error) if isinstance(error, VideoError) else error_line(error)


def check_picture(frame: Any) -> np.ndarray:
    """What `render` gave, (height, width, 3) uint8; raises VideoError for anything else."""
    if not isinstance(frame, np.ndarray):
        raise VideoError(f"render() must give an array (height, width, 3) of uint8; got {type(frame).__name__}")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise VideoError(
            f"render() must give an array (height, width, 3) of uint8; got one of {frame.shape} and {frame.dtype}"
        )
    if frame.nbytes > MOST_PICTURE_BYTES:
        raise VideoError(f"a picture of {frame.shape[1]} x {frame.shape[0]} is too large for a film")
    return frame.copy()  # some environments draw into the same array again


def tile(films: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Films side by side in rows of `columns`; the shorter ones end in a still, missing tiles are white. Raises
    VideoError where their pictures are not of one size."""
    _require_one_size([film[0] for film in films])
    length = max(len(film) for film in films)
    held = [np.concatenate([film, np.repeat(film[-1:], length - len(film), axis=0)]) for film in films]
    columns = min(columns, len(held))
    held += [np.full_like(held[0], 255)] * (-len(held) % columns)
    rows = [np.concatenate(held[i : i + columns], axis=2) for i in range(0, len(held), columns)]
    return np.concatenate(rows, axis=1)


def write_video(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    """Encode (frames, height, width, 3) uint8 as H.264 (.mp4) or .gif, whole or not at all; raises ValueError for other
    endings."""
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"a video is written as .mp4 or .gif; got {path}")
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        if path.suffix == ".gif":
            imageio.mimwrite(temporary, list(frames), duration=1000 / frames_per_second, loop=0)
        else:
            # yuv420p is what every browser plays; it needs even sizes
            height, width = (size - size % 2 for size in frames.shape[1:3])
            options = {"fps": frames_per_second, "macro_block_size": 2, "pixelformat": "yuv420p", "quality": 6}
            imageio.mimwrite(temporary, list(frames[:, :height, :width]), format="FFMPEG", **options)  # pyright: ignore
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _require_one_size(pictures: Sequence[np.ndarray]) -> None:
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        raise VideoError(f"render() must give pictures of one size; got {' and '.join(map(str, sorted(sizes)[:3]))}")

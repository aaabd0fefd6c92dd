"""Videos of episodes: replayed from their seeds and recorded actions, drawn, tiled and encoded.

An environment gives the same episode for the same seed and actions, so nothing needs to be filmed while a policy is
measured.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw

PLAN_COLOR = (0, 90, 200, 130)


class Script(NamedTuple):
    """An episode to film."""

    seed: int
    actions: np.ndarray
    """Raw, (steps, A)."""
    plans: Mapping[int, np.ndarray] = {}
    """Paths to draw into the picture from some steps on, each until the next, (N, points, 2) in the plane of the
    environment's `pixels`."""


class Camera:
    """Films one script a call, in an environment that it keeps."""

    def __init__(self, make_env: Callable[..., gymnasium.Env], every: int = 1) -> None:
        """`every`: film each n-th step only, and the last."""
        self._env = make_env(render_mode="rgb_array")
        self._every = every

    def __call__(self, script: Script) -> np.ndarray:
        """The frames, (frames, height, width, 3) uint8."""
        self._env.reset(seed=script.seed)
        plans = script.plans.get(0)
        frames = [self._picture(plans)]
        for i, action in enumerate(script.actions, start=1):
            self._env.step(action)
            plans = script.plans.get(i, plans)
            if i % self._every == 0 or i == len(script.actions):
                frames.append(self._picture(plans))
        return np.stack(frames)

    def _picture(self, plans: np.ndarray | None) -> np.ndarray:
        """What is seen now, with the plans drawn in."""
        frame: Any = self._env.render()
        task: Any = self._env.unwrapped
        if plans is None or not hasattr(task, "pixels"):
            return frame
        picture = Image.fromarray(frame)
        pen = ImageDraw.Draw(picture, "RGBA")
        for path in task.pixels(plans):
            pen.line([(float(column), float(row)) for column, row in path], fill=PLAN_COLOR, width=2)
        return np.asarray(picture)


def tile(films: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Films side by side in rows of `columns`; the shorter ones end in a still, missing tiles are white."""
    length = max(len(film) for film in films)
    held = [np.concatenate([film, np.repeat(film[-1:], length - len(film), axis=0)]) for film in films]
    columns = min(columns, len(held))
    held += [np.full_like(held[0], 255)] * (-len(held) % columns)
    rows = [np.concatenate(held[i : i + columns], axis=2) for i in range(0, len(held), columns)]
    return np.concatenate(rows, axis=1)


def write_video(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    """Encode (frames, height, width, 3) uint8 as H.264 (.mp4) or .gif; raises ValueError for other endings."""
    if path.suffix == ".gif":
        imageio.mimwrite(path, list(frames), duration=1000 / frames_per_second, loop=0)
    elif path.suffix == ".mp4":
        # yuv420p is what every browser plays; it needs even sizes
        height, width = (size - size % 2 for size in frames.shape[1:3])
        options = {"fps": frames_per_second, "macro_block_size": 2, "pixelformat": "yuv420p", "quality": 6}
        imageio.mimwrite(path, list(frames[:, :height, :width]), format="FFMPEG", **options)  # pyright: ignore
    else:
        raise ValueError(f"a video is written as .mp4 or .gif; got {path}")

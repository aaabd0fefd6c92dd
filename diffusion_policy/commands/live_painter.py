"""Pictures of a simulation, drawn by a second process that repeats it: drawing takes most of a control step.

A seed, its actions and its pushes repeat an episode, so the picture is the same. Knows environments that render. Knows
no policy.
"""

import contextlib
import io
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium
import imageio.v3
import numpy as np

from diffusion_policy.envs.protocols import Push, as_pushable

JPEG_QUALITY = 85
Make = Callable[..., gymnasium.Env]


class Picture(NamedTuple):
    """What the simulation looks like."""

    jpeg: bytes
    width: int
    height: int


def step_env(env: gymnasium.Env, action: np.ndarray, push: Push | None) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
    """A control step in which a person may push a body, as the simulation and all that draw it take it."""
    pushable = None if push is None else as_pushable(env)
    if push is not None and pushable is not None:
        pushable.push(push)
    return env.step(action)


def paint(env: gymnasium.Env, share: float) -> Picture:
    """A picture of this share of the usual width and height, where the environment can draw smaller ones."""
    getattr(env.unwrapped, "draw_smaller", lambda _: None)(share)
    pixels, out = np.asarray(env.render()), io.BytesIO()
    imageio.v3.imwrite(out, pixels, extension=".jpg", quality=JPEG_QUALITY)
    return Picture(out.getvalue(), pixels.shape[1], pixels.shape[0])


class Painter:
    """Repeats an episode in another process; a picture is asked for, and taken later."""

    def __init__(self, make_env: Make) -> None:
        """`make_env`: picklable; takes `render_mode`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_repeat, args=(make_env, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def reset(self, seed: int) -> None:
        """Begin the episode of a seed."""
        self._tell("reset", seed)

    def step(self, action: np.ndarray, push: Push | None = None) -> None:
        """Take a step, as the environment takes it."""
        self._tell("step", (action, push))

    def ask(self, share: float) -> None:
        """Have a picture drawn of how it is now."""
        self._tell("paint", share)

    def _tell(self, name: str, value: object) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `take` says
            self._pipe.send((name, value))

    def take(self) -> Picture:
        """The picture that was asked for. Raises EOFError where the process has ended."""
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(2)
        self._process.kill()


def _repeat(make_env: Make, pipe: Connection) -> None:
    """What the process does."""
    env = make_env(render_mode="rgb_array")
    do: dict[str, Callable[[Any], object]] = {
        "reset": lambda seed: env.reset(seed=seed),
        "step": lambda taken: step_env(env, *taken),
        "paint": lambda share: pipe.send(paint(env, share)),
    }
    try:
        while True:
            name, value = pipe.recv()
            do[name](value)
    except (EOFError, OSError, KeyboardInterrupt):  # the other end is gone
        env.close()

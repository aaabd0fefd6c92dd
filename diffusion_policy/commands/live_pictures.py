"""The frames of a live session: pictures that are drawn meanwhile, with the state, the paths and what the policy saw as
they were then.

Knows environments that render. Asks no policy.
"""

from collections import deque
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.commands.live_fan import Paths
from diffusion_policy.commands.live_painter import Make, Painter, Picture, paint
from diffusion_policy.commands.live_sights import LiveSight
from diffusion_policy.config import ConfigError
from diffusion_policy.envs.protocols import Push, as_pictured, repeats_by_seed

PAINTERS = 2
"""Processes that draw, one picture each."""


class Frame(NamedTuple):
    """What is to be seen after a step."""

    state: dict[str, Any]
    picture: bytes
    """JPEG."""
    sights: tuple[LiveSight, ...] = ()
    """What the plan that is followed was made from."""


class _Asked(NamedTuple):
    """A look that is not taken yet."""

    drawn: Painter | Picture
    share: float
    state: dict[str, Any]
    paths: Paths
    sights: tuple[LiveSight, ...]


class Pictures:
    """Draws an environment, by processes that repeat it where its seeds repeat an episode."""

    def __init__(self, env: gymnasium.Env, make_env: Make, env_id: str, seed: int) -> None:
        """`make_env` makes such environments. Raises ConfigError for one without pictures."""
        if "rgb_array" not in (env.metadata.get("render_modes") or ()):
            raise ConfigError(f"{env_id} makes no pictures (render mode rgb_array), so it cannot be watched")
        self._env, self._plane = env, as_pictured(env)
        number = PAINTERS if repeats_by_seed(make_env, seed) else 0
        self._painters = deque(Painter(make_env) for _ in range(number))
        self._asked: deque[_Asked] = deque()
        self.size = np.ones(2)
        """Of the last picture, width and height [px]."""

    @property
    def ahead(self) -> int:
        """Pictures that are being drawn while others are asked for."""
        return len(self._painters)

    def begin(self, seed: int) -> None:
        """Hear that the environment begins the episode of a seed."""
        for painter in self._painters:
            painter.reset(seed)

    def step(self, action: np.ndarray, push: Push | None) -> None:
        """Hear that the environment takes a step, in which a person may push a body."""
        for painter in self._painters:
            painter.step(action, push)

    def look(
        self, share: float, state: dict[str, Any], paths: Paths, sights: tuple[LiveSight, ...] = ()
    ) -> Frame | None:
        """The frame of `ahead` looks ago; None where there were not so many. `share`: see `paint`."""
        drawn: Painter | Picture = self._painters[0] if self._painters else paint(self._env, share)
        if isinstance(drawn, Painter):
            drawn.ask(share)
            self._painters.rotate(-1)
        self._asked.append(_Asked(drawn, share, state, paths, sights))
        return self._take() if len(self._asked) > self.ahead else None

    def _take(self) -> Frame:
        drawn, share, state, paths, sights = self._asked.popleft()
        try:
            picture = drawn if isinstance(drawn, Picture) else drawn.take()
        except (EOFError, OSError):
            picture, share = self._draw_here(), 1.0
        self.size = np.array([picture.width, picture.height])
        getattr(self._env.unwrapped, "draw_smaller", lambda _: None)(share)
        state |= {
            "size": [picture.width, picture.height],
            "plan": self._pixels(paths.plan),
            "fan": [self._pixels(path) for path in paths.fan],
            "denoising": [self._pixels(path) for path in paths.denoising],
        }
        return Frame(state, picture.jpeg, sights)

    def _draw_here(self) -> Picture:
        """Draw in this process from now on: one that draws has ended, for want of memory, say."""
        self.close()
        self._painters.clear()
        self._asked.clear()
        return paint(self._env, 1.0)

    def _pixels(self, path: np.ndarray | None) -> list[list[float]]:
        """Where a path in the plane lies in the last picture [px]."""
        return [] if path is None or self._plane is None else np.round(self._plane.pixels(path), 1).tolist()

    def close(self) -> None:
        """End the processes that draw."""
        for painter in self._painters:
            painter.close()

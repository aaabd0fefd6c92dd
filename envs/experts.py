"""Scripted experts: feedback controllers, one mode at a time, that recover from disturbance."""

from collections.abc import Mapping

import numpy as np

from diffusion_policy.envs.avoid import FINISH_Y, ROWS, START_XY, modes
from diffusion_policy.envs.block_push_expert import BlockPushExpert
from diffusion_policy.envs.intersection import IntersectionExpert
from diffusion_policy.envs.maze_expert import MazeExpert
from diffusion_policy.envs.panda_reach_expert import PandaReachExpert

GATE_X = (
    {"left": 0.42, "right": 0.58},
    {"left": 0.35, "middle": 0.5, "right": 0.65},
    {"leftmost": 0.295, "left": 0.425, "right": 0.575, "rightmost": 0.705},
)
"""Where the expert passes each row [m]: about the middle of the gate."""


class AvoidExpert:
    """Steers the commanded position of Avoid along a smooth path through the gates of one mode, at constant speed.

    Pure pursuit (Coulter 1992): it aims at the point that lies `lookahead` further along the path than the nearest
    one. It keeps no state, so a disturbance of any size only changes where it aims from.
    """

    def __init__(self, mode: str, speed: float = 0.01, lookahead: float = 0.02, straight: float = 0.045) -> None:
        """`speed`: [m] a control step; `lookahead`: along the path [m]; `straight`: the path holds a gate's x for
        this long before and behind its row [m]."""
        gates = mode.split("-")
        if not 1 <= len(gates) <= len(ROWS) or mode not in modes(len(gates)):
            raise ValueError(f"unknown mode {mode!r}; Avoid has modes such as {', '.join(modes(min(len(gates), 2)))}")
        self._speed = speed
        ys, xs = [START_XY[1] - 0.1], [GATE_X[0][gates[0]]]
        for row, places, gate in zip(ROWS, GATE_X, gates, strict=False):
            ys += [row.y - straight, row.y + straight]
            xs += [places[gate]] * 2
        ys, xs = [*ys, FINISH_Y + 0.1], [*xs, xs[-1]]
        dense_y = np.linspace(ys[0], ys[-1], 400)
        knot, share = np.divmod(np.interp(dense_y, ys, np.arange(len(ys))), 1)  # where each y lies between two knots
        eased = knot + share**2 * (3 - 2 * share)  # smoothstep: the path is straight at each knot
        self._path = np.stack([np.interp(eased, np.arange(len(xs)), xs), dense_y], axis=-1)  # (400, 2)
        steps = np.linalg.norm(np.diff(self._path, axis=0), axis=-1)
        self._length = np.concatenate([[0], np.cumsum(steps)])  # (400,) along the path up to each point
        self._lookahead = lookahead

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next change of the commanded position, (2,) [m]."""
        xy = observation["desired_xy"]
        nearest = np.argmin(np.linalg.norm(self._path - xy, axis=-1))
        ahead = min(np.searchsorted(self._length, self._length[nearest] + self._lookahead), len(self._path) - 1)
        direction = self._path[ahead] - xy
        return (self._speed * direction / np.linalg.norm(direction)).astype(np.float32)


EXPERTS = {
    "diffusion_policy/Avoid-v0": AvoidExpert,
    "diffusion_policy/BlockPush-v0": BlockPushExpert,
    "diffusion_policy/Maze-v0": MazeExpert,
    "diffusion_policy/Intersection-v0": IntersectionExpert,
    "diffusion_policy/PandaReach-v0": PandaReachExpert,
}
"""The expert of each environment id: called with a mode's label."""

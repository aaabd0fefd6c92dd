"""Avoid: a Panda steers a rod between rows of cylinders to a finish line, by any of several ways.

The geometry, the control rate and the mode code follow D3IL's Avoiding task (Jia et al. 2024, arXiv 2402.14606), built
anew on PyBullet. A mode is the sequence of gates passed, one a row: rows = 1, 2, 3 gives 2, 6, 24 modes.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.envs.cameras import IMAGE, WRIST_IMAGE, ImageOptions, Mount, Viewpoint
from diffusion_policy.envs.robots import arm_cameras, panda_with_rod
from diffusion_policy.envs.scene import Place, Scene
from diffusion_policy.envs.simulation import Simulation
from diffusion_policy.envs.task import Advance, TaskEnv, at_height, float_box, path_of_changes, rendering


class Row(NamedTuple):
    """Cylinders side by side [m]; one gate left of the first, one between each two, one right of the last."""

    y: float
    centers_x: tuple[float, ...]
    radius: float
    gates: tuple[str, ...]


ROWS = (
    Row(-0.10, (0.5,), 0.03, ("left", "right")),
    Row(0.08, (0.425, 0.575), 0.025, ("left", "middle", "right")),
    Row(0.26, (0.35, 0.5, 0.65), 0.025, ("leftmost", "left", "right", "rightmost")),
)
FINISH_Y = 0.35
"""The rod's axis beyond this line is success [m]."""
START_XY = (0.525, -0.28)
"""Where the published protocol starts [m]."""
START_RANGE = 0.02
"""Each coordinate of the start is drawn within this distance of START_XY [m], unless `fixed_start`."""
WORKSPACE = ((0.28, 0.72), (-0.35, 0.40))
"""The commanded position is clipped to these x and y ranges [m]."""
MAX_ACTION = 0.02
"""Largest change of the commanded position in one control step, per axis [m]."""
ROD_RADIUS = 0.01
ROD_LENGTH = 0.2
TOOL_Z = 0.12
"""Height of the rod's centre [m]: the rod ends 2 cm above the table."""
FOLLOWED = 0.82
"""Share of the way to the commanded position that the rod goes in one control step (fitted to the expert's episodes;
1 mm off after 7 steps)."""
CYLINDER_HEIGHT = 0.16
CONTROL_PERIOD = 0.035
"""[s]"""
SUBSTEPS = 7
"""Physics steps in a control step: the rod moves less than 3 mm in one, far less than any radius."""

TILE = 0.025
"""Half the width of the tile that marks a wanted gate [m]."""

VIEW = Viewpoint(target=(0.5, 0.03, 0.05), distance=0.95, yaw=90, pitch=-48)
CAMERA = Viewpoint(target=(0.46, 0.025, 0.09), distance=1.8, yaw=90, pitch=-52, field=27)
"""Of the observed image: all of the workspace, the rod before the arm."""
WRIST = Mount(eye=(0.11, 0.0, -0.13), target=(-0.01, 0.0, 0.10), up=(-1.0, 0.0, 0.0), field=80)
"""Of the image from the wrist: the rod in the middle, what stands left and right of it."""


def modes(rows: int) -> tuple[str, ...]:
    """Every mode's label, the gates of the first `rows` rows joined by hyphens: `left-middle`."""
    return tuple("-".join(gates) for gates in itertools.product(*(row.gates for row in ROWS[:rows])))


class Passage(NamedTuple):
    """Which gate of the last row an episode wants, and which it has passed."""

    wanted: str | None = None
    """None: any will do."""
    passed: str | None = None
    """In its last crossing towards the finish."""
    xy: np.ndarray | None = None
    """Where the rod was last [m]."""

    def after(self, row: Row, xy: np.ndarray) -> "Passage":
        """What it is once the rod has come to a place (2,) [m]."""
        if self.wanted is None:
            return self
        gate = None if self.xy is None else _gate(row, np.array([self.xy, xy], np.float64))
        return Passage(self.wanted, gate or self.passed, xy)

    @property
    def is_right(self) -> bool:
        """Whether the wanted gate is the one that was passed."""
        return self.wanted in (None, self.passed)


class AvoidEnv(TaskEnv):
    """Observation: `desired_xy`, the commanded, and `actual_xy`, the measured position of the rod (each (2,), [m]).
    Action: change of the commanded position, (2,) [m]. Reward: 1 at success, else 0. The episode ends at success
    (beyond the finish line) or at any contact between rod and cylinder. Where they are asked for, `image` and
    `wrist_image` are observed as well.

    With a goal, each episode wants a gate of the last row, one-hot in the observation `goal` and a green tile on the
    table: only who finishes through that gate succeeds. It is drawn by the seed, or given:
    `reset(options={"goal": "left"})`.
    """

    metadata = rendering(CONTROL_PERIOD)
    _simulation: Simulation

    def __init__(
        self,
        rows: int = 2,
        fixed_start: bool = False,
        render_mode: str | None = None,
        *,
        goal: bool = False,
        image_size: int | None = 0,
        wrist_image: bool = False,
        image_renderer: str = "tiny",
    ) -> None:
        """`rows`: how many rows of cylinders stand, 1 to 3; `fixed_start`: always start at START_XY; `goal`: whether
        each episode wants a gate; of the images, see `ImageOptions`."""
        images = ImageOptions.checked(image_size, wrist_image, image_renderer)
        if rows not in (1, 2, 3):
            raise ValueError(f"rows must be 1, 2 or 3; got {rows!r}")
        super().__init__(render_mode)
        self.rows = rows
        self.fixed_start = fixed_start
        self.modes = modes(rows)
        low, high = np.array(WORKSPACE, dtype=np.float32).T
        margin = np.float32(0.1)  # the arm may swing past a command
        spaces: dict[str, gymnasium.Space] = {
            "desired_xy": float_box(low, high),
            "actual_xy": float_box(low - margin, high + margin),
        }
        self.goal = bool(goal)
        gates = len(ROWS[rows - 1].gates)
        if self.goal:
            spaces["goal"] = float_box(np.zeros(gates), np.ones(gates))
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = float_box([-MAX_ACTION] * 2, [MAX_ACTION] * 2)

        self._simulation = Simulation(CONTROL_PERIOD / SUBSTEPS, VIEW, window=self._window, renderer=images.renderer)
        self._cylinders = self._build_scene()
        self._arm = panda_with_rod(self._simulation, ROD_RADIUS, ROD_LENGTH, coarse=images.size > 0)
        self._look_through(arm_cameras(self._simulation, self._arm, CAMERA, WRIST, images), images.size)
        self._pristine = self._simulation.save()
        self._desired_xy = np.array(START_XY)
        self._passage = Passage()

    def _build_scene(self) -> list[str]:
        simulation = self._simulation
        (x_low, x_high), (y_low, y_high) = WORKSPACE
        x, y = (x_low + x_high) / 2, (y_low + y_high) / 2
        half_x, half_y = (x_high - x_low) / 2, (y_high - y_low) / 2
        simulation.add_picture_box("table", (half_x + 0.1, half_y + 0.05, 0.01), (x, y, -0.01), (0.93, 0.93, 0.9, 1))
        simulation.add_picture_box("finish", (half_x + 0.1, 0.004, 0.001), (x, FINISH_Y, 0.001), (0.1, 0.6, 0.3, 1))
        if self.goal:
            simulation.add_picture_box("wanted", (TILE, TILE, 0.001), (x, y, 0.001), (0.35, 0.75, 0.45, 1))
        names = []
        for i, row in enumerate(ROWS[: self.rows]):
            for j, center_x in enumerate(row.centers_x):
                names.append(f"cylinder {i}.{j}")
                position = (center_x, row.y, CYLINDER_HEIGHT / 2)
                simulation.add_cylinder(names[-1], row.radius, CYLINDER_HEIGHT, position, (0.8, 0.25, 0.2, 1))
        return names

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Put the rod at rest at its start. Raises ValueError for a goal that is no gate of the last row, or of an
        environment without goals."""
        super().reset(seed=seed)
        offset = np.zeros(2) if self.fixed_start else self.np_random.uniform(-START_RANGE, START_RANGE, 2)
        self._desired_xy = np.array(START_XY) + offset
        self._simulation.restore(self._pristine)  # so that no trace of the last episode is left
        self._arm.reset((*self._desired_xy, TOOL_Z))
        self._passage = Passage(self._choose_goal(options or {}))
        self._place_tile()
        return self._observation(), {"is_success": False, "collision": False}

    def _choose_goal(self, options: Mapping[str, Any]) -> str | None:
        """The wanted gate; None without goals."""
        gates = self._last_row.gates
        if not self.goal:
            if "goal" in options:
                raise ValueError("there are no goals; make the environment with goal=True to give one to reset")
            return None
        if "goal" not in options:
            return gates[self.np_random.integers(len(gates))]
        if options["goal"] not in gates:
            raise ValueError(f"a goal is a gate of the last row, {', '.join(gates)}; got {options['goal']!r:.60}")
        return options["goal"]

    @property
    def _last_row(self) -> Row:
        return ROWS[self.rows - 1]

    def _place_tile(self) -> None:
        if self._passage.wanted is not None:
            x = gate_x(self._last_row, self._passage.wanted)
            self._simulation.place("wanted", (x, self._last_row.y, 0.001), 0)

    def _advance(self, action: np.ndarray) -> Advance:
        """Move the commanded position by `action`, (2,) [m]."""
        bounds = np.array(WORKSPACE).T
        self._desired_xy = np.clip(self._desired_xy + np.clip(action, -MAX_ACTION, MAX_ACTION), *bounds)
        self._arm.move_to((*self._desired_xy, TOOL_Z))
        collision = self._simulate()
        observation = self._observation()
        self._passage = self._passage.after(self._last_row, observation["actual_xy"])
        finished = bool(observation["actual_xy"][1] > FINISH_Y) and not collision
        success = finished and self._passage.is_right
        info = {"is_success": success, "collision": collision}
        return Advance(observation, float(success), finished or collision, info)

    def _simulate(self) -> bool:
        """Simulate one control period, or until the rod touches a cylinder; returns whether it did."""
        for _ in range(SUBSTEPS):
            self._simulation.step()
            if any(self._arm.touches(name) for name in self._cylinders):
                return True
        return False

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "desired_xy": self._desired_xy.astype(np.float32),
            "actual_xy": self._arm.tool_position[:2].astype(np.float32),
            **self._goal_observed(),
            **self._images(),
        }

    def _goal_observed(self) -> dict[str, np.ndarray]:
        if self._passage.wanted is None:
            return {}
        return {"goal": np.array([gate == self._passage.wanted for gate in self._last_row.gates], np.float32)}

    def save_state(self) -> tuple[int, np.ndarray, Passage]:
        """Keep the full state in memory, the commanded position included; returns a handle for `restore_state`."""
        return self._simulation.save(), self._desired_xy.copy(), self._passage

    def restore_state(self, state: tuple[int, np.ndarray, Passage]) -> None:
        """Go on from a saved state, as often as wanted."""
        handle, desired_xy, self._passage = state
        self._simulation.restore(handle)
        self._desired_xy = desired_xy.copy()
        self._place_tile()

    # What a trajectory means, without a simulator

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """The gates that an episode passed, from its `actual_xy` (steps, 2) [m]; None unless it passed every row.

        Where a row was crossed more than once, its last crossing towards the finish counts.
        """
        xy = np.asarray(observations["actual_xy"], dtype=np.float64)
        gates = [_gate(row, xy) for row in ROWS[: self.rows]]
        return None if None in gates else "-".join(gate for gate in gates if gate is not None)

    def modes_that_solve(self, observation: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """The modes that lead through the gate that the episode wants which observes this; all without goals."""
        if not self.goal:
            return self.modes
        wanted = self._last_row.gates[int(np.argmax(observation["goal"]))]
        return tuple(mode for mode in self.modes if mode.split("-")[-1] == wanted)

    def places(self, observation: Mapping[str, np.ndarray]) -> tuple[Place, ...]:
        """The tile in the gate that the episode wants which observes this."""
        if not self.goal:
            return ()
        x, y = gate_x(self._last_row, self._last_row.gates[int(np.argmax(observation["goal"]))]), self._last_row.y
        corners = ((x - TILE, y - TILE), (x + TILE, y - TILE), (x + TILE, y + TILE), (x - TILE, y + TILE))
        return ((corners, "lightgreen"),)

    def path(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where an episode went in the plane of `scene`, (steps, 2) [m]."""
        return np.asarray(observations["actual_xy"])

    def planned_path(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """Where actions (..., steps, 2) would lead the commanded position from one observation on,
        (..., steps + 1, 2) [m]."""
        return path_of_changes(observation["desired_xy"], actions)

    def roll_forward(self, observations: Mapping[str, np.ndarray], actions: np.ndarray) -> dict[str, np.ndarray]:
        """What is expected to be observed, {key: (B, To, ...)}, once actions (B, d, 2) have followed these. Raises
        ValueError for images."""
        unforeseen = [key for key in (IMAGE, WRIST_IMAGE) if key in observations]
        if unforeseen:
            raise ValueError(f"what a camera will see cannot be foreseen; the policy observes {unforeseen[0]}")
        low, high = np.array(WORKSPACE).T
        desired, actual = (list(np.moveaxis(observations[key], 1, 0)) for key in ("desired_xy", "actual_xy"))
        for action in np.moveaxis(np.clip(actions, -MAX_ACTION, MAX_ACTION), 1, 0):
            desired.append(np.clip(desired[-1] + action, low, high))
            actual.append(actual[-1] + FOLLOWED * (desired[-1] - actual[-1]))
        observed = observations["desired_xy"].shape[1]
        moved = {"desired_xy": np.stack(desired[-observed:], 1), "actual_xy": np.stack(actual[-observed:], 1)}
        return {**observations, **moved}

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Where points (..., 2) [m] at the rod's tip lie in the picture of `render`, (..., 2) [px]: column, row."""
        return self._simulation.pixels(at_height(xy, TOOL_Z - ROD_LENGTH / 2))

    def choice(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> tuple[str, str] | None:
        """Which row comes next and the gate through which planned actions (steps, 2) cross it, or towards which they
        lead if they end before it: ("row 2", "left"). None beyond the last row."""
        path = self.planned_path(observation, actions)
        ahead = [(i, row) for i, row in enumerate(ROWS[: self.rows], start=1) if row.y > path[0, 1]]
        if not ahead:
            return None
        number, row = ahead[0]
        return f"row {number}", _gate(row, path) or row.gates[int(np.searchsorted(row.centers_x, path[-1, 0]))]

    @property
    def scene(self) -> Scene:
        """The cylinders and the finish line from above."""
        circles = tuple((x, row.y, row.radius) for row in ROWS[: self.rows] for x in row.centers_x)
        return Scene(*WORKSPACE, circles, FINISH_Y)


def gate_x(row: Row, gate: str) -> float:
    """The middle of a gate [m]."""
    edges = (WORKSPACE[0][0], *row.centers_x, WORKSPACE[0][1])
    number = row.gates.index(gate)
    return (edges[number] + edges[number + 1]) / 2


def _gate(row: Row, xy: np.ndarray) -> str | None:
    """The gate through which a path (steps, 2) [m] last crossed a row upwards."""
    below, above = xy[:-1], xy[1:]
    crossings = np.flatnonzero((below[:, 1] < row.y) & (above[:, 1] >= row.y))
    if len(crossings) == 0:
        return None
    (x0, y0), (x1, y1) = below[crossings[-1]], above[crossings[-1]]
    x = x0 + (x1 - x0) * (row.y - y0) / (y1 - y0)
    return row.gates[int(np.searchsorted(row.centers_x, x))]

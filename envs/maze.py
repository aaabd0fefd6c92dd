"""Maze: a disc slides through a room with blocks to a goal, by any of several ways.

A mode is the homotopy class of the travelled path relative to the blocks (see `maze_map`), so the modes that exist for
a start and a goal are known and counted. Built on PyBullet: the disc has a mass and a controller of bounded speed and
force, walls and obstacles are solid.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.envs import maze_map, maze_paths
from diffusion_policy.envs.cameras import IMAGE, ImageOptions, Viewpoint
from diffusion_policy.envs.disc import MAX_SPEED, Disc, predict_disc
from diffusion_policy.envs.maze_draws import MOST_OBSTACLES, OBSTACLE_RADII, Episode, draw_episode
from diffusion_policy.envs.maze_expert import PERIOD
from diffusion_policy.envs.maze_map import BLOCKS, DISC_RADIUS, MODES, NO_OBSTACLES, ROOM
from diffusion_policy.envs.protocols import Verdict
from diffusion_policy.envs.scene import Place, Scene
from diffusion_policy.envs.simulation import Simulation
from diffusion_policy.envs.task import (
    Advance,
    TaskEnv,
    at_height,
    checked_count,
    circle,
    float_box,
    path_through,
    rendering,
)
from diffusion_policy.envs.travelled import Travelled

CONTROL_PERIOD = PERIOD
"""[s]"""
SUBSTEPS = 10
"""Physics steps in a control step: the disc moves less than 1.5 cm in one."""
EPISODE_STEPS = 200
"""Control steps after which Gymnasium's time limit ends an episode."""
GOAL_RADIUS = 0.1
"""Success is the disc's centre this near to the goal [m] ..."""
GOAL_SPEED = 0.1
"""... and no faster than this [m/s]."""
HEIGHT = 0.1
"""Of walls, obstacles and the disc [m]."""
WALL = 0.05
"""Half the thickness of the room's walls [m]."""

VIEW = Viewpoint(target=(0.0, 0.0, 0.0), distance=4.8, yaw=0, pitch=-89.9, width=480, height=480, field=48)
WORKSPACE = ((-ROOM, ROOM), (-ROOM, ROOM))
"""Where the disc can be: x and y ranges [m]."""
CAMERA = VIEW
"""Of the observed image: the room from above."""
_UNDERGROUND = -1.0
"""Where obstacles are that do not stand in the maze [m]."""


class Saved(NamedTuple):
    """A state that can be returned to."""

    physics: int
    episode: Episode
    shortest: float
    travelled: Travelled


class MazeEnv(TaskEnv):
    """Observation: `position` (2,) [m] and `velocity` (2,) [m/s] of the disc's centre, `goal` (2,) [m]; with obstacles
    `obstacles` (k, 3), x, y and radius [m], zeros for none; `image` where it is asked for. Action: the wanted position,
    (2,) [m], absolute, so that a planned path is executed as it is. Reward: 1 at success, else 0. The episode ends at
    success (at rest at the goal) or where the disc touches a wall, block or obstacle.

    `info["measures"]`: `smoothness`, the mean squared acceleration over the steps [m^2/s^4]; `collision`, whether
    something was touched; at success `path_ratio`, the length of the path to the goal over the shortest of all ways.

    The seed draws start, goal and obstacles; `reset(options={"start": (x, y), "goal": (x, y), "obstacles": rows})`
    gives any of them.
    """

    metadata = rendering(CONTROL_PERIOD)
    modes = MODES
    _simulation: Simulation

    def __init__(
        self,
        obstacles: int = 0,
        render_mode: str | None = None,
        *,
        image_size: int | None = 0,
        image_renderer: str = "tiny",
    ) -> None:
        """`obstacles`: so many stand in the corridors of each episode; of the images, see `ImageOptions`."""
        images = ImageOptions.checked(image_size, renderer=image_renderer)
        self.obstacles = checked_count("obstacles", obstacles, MOST_OBSTACLES)
        super().__init__(render_mode)
        room, fast = np.full(2, ROOM), np.full(2, 2 * MAX_SPEED)
        spaces: dict[str, gymnasium.Space] = {
            "position": float_box(-room, room),
            "velocity": float_box(-fast, fast),
            "goal": float_box(-room, room),
        }
        if self.obstacles:
            low, high = (-ROOM, -ROOM, 0.0), (ROOM, ROOM, max(OBSTACLE_RADII))
            spaces["obstacles"] = float_box([low] * self.obstacles, [high] * self.obstacles)
        self.pose_keys = ("position", "goal", *(("obstacles",) if self.obstacles else ()))
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = float_box(-room, room)

        self._simulation = Simulation(CONTROL_PERIOD / SUBSTEPS, VIEW, window=self._window, renderer=images.renderer)
        self._build_scene()
        self._disc = Disc(self._simulation, DISC_RADIUS, HEIGHT)
        cameras = {IMAGE: lambda: self._simulation.photograph(CAMERA, images.size)} if images.size else {}
        self._look_through(cameras, images.size)
        self._pristine = self._simulation.save()
        self._begin(Episode(np.zeros(2), np.zeros(2), np.zeros((self.obstacles, 3))))

    def _build_scene(self) -> None:
        simulation, z = self._simulation, HEIGHT / 2
        simulation.add_picture_box("floor", (ROOM + 0.1, ROOM + 0.1, 0.01), (0, 0, -0.011), (0.93, 0.93, 0.9, 1))
        walls = {block.name: (block.center, block.half) for block in BLOCKS}
        for side in (-1, 1):
            walls |= {
                f"wall x {side}": ((side * (ROOM + WALL), 0.0), (WALL, ROOM + 2 * WALL)),
                f"wall y {side}": ((0.0, side * (ROOM + WALL)), (ROOM + 2 * WALL, WALL)),
            }
        for name, (center, half) in walls.items():
            simulation.add_box(
                name,
                half_extents=(*half, z),
                mass=0,
                friction=0.5,
                rolling_friction=0,
                position=(*center, z),
                color=(0.55, 0.57, 0.6, 1),
            )
        simulation.add_cylinder("goal", GOAL_RADIUS, 0.002, (0, 0, 0.001), (0.35, 0.75, 0.45, 1), solid=False)
        for slot in range(self.obstacles):
            for radius in OBSTACLE_RADII:
                color = (0.8, 0.25, 0.2, 1)
                simulation.add_cylinder(f"obstacle {slot} {radius}", radius, HEIGHT, (0, 0, _UNDERGROUND), color)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Put the disc at rest at its start. Raises ValueError for a start, a goal or obstacles that cannot be."""
        super().reset(seed=seed)
        self._begin(draw_episode(self.np_random, self.obstacles, options or {}))
        return self._observation(), self._info(success=False)

    def _begin(self, episode: Episode) -> None:
        self._simulation.restore(self._pristine)  # so that no trace of the last episode is left
        self._disc.put(episode.start)
        self._stand(episode)
        self._shortest = maze_paths.shortest_length(*episode)
        self._travelled = Travelled(episode.start, np.zeros(2))

    def _stand(self, episode: Episode) -> None:
        """Put goal and obstacles where they are in an episode."""
        self._episode = episode
        self._simulation.place("goal", (*episode.goal, 0.001), 0)
        for slot, (x, y, wanted) in enumerate(episode.obstacles):
            for radius in OBSTACLE_RADII:
                z = HEIGHT / 2 if abs(radius - wanted) < 1e-6 else _UNDERGROUND
                self._simulation.place(f"obstacle {slot} {radius}", (x, y, z), 0)

    def _advance(self, action: np.ndarray) -> Advance:
        """Lead the disc towards `action`, (2,) [m]; what lies outside of the room is moved to its wall."""
        touched = self._simulate(np.clip(action, -ROOM, ROOM))
        position = self._disc.position
        self._travelled = self._travelled.after(position, touched, CONTROL_PERIOD)
        near = np.linalg.norm(position - self._episode.goal) <= GOAL_RADIUS
        slow = np.linalg.norm(self._disc.velocity) <= GOAL_SPEED
        success = bool(near and slow) and not self._travelled.touched
        return Advance(self._observation(), float(success), success or touched, self._info(success))

    def _simulate(self, wanted: np.ndarray) -> bool:
        """Simulate one control period, or until the disc touches something; returns whether it did."""
        for _ in range(SUBSTEPS):
            self._disc.push(wanted)
            self._simulation.step()
            if self._disc.touches_anything():
                return True
        return False

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "position": np.clip(self._disc.position, -ROOM, ROOM).astype(np.float32),
            "velocity": np.clip(self._disc.velocity, -2 * MAX_SPEED, 2 * MAX_SPEED).astype(np.float32),
            "goal": self._episode.goal.astype(np.float32),
            **({"obstacles": self._episode.obstacles.astype(np.float32)} if self.obstacles else {}),
            **self._images(),
        }

    def _info(self, success: bool) -> dict[str, Any]:
        gone = self._travelled
        measures = {"smoothness": gone.smoothness, "collision": float(gone.touched)}
        if success:
            left = float(np.linalg.norm(self._episode.goal - gone.at))
            measures["path_ratio"] = (gone.length + left) / max(self._shortest, GOAL_RADIUS)
        return {"is_success": success, "measures": measures}

    def save_state(self) -> Saved:
        """The full state of the episode, for `restore_state` of this environment."""
        return Saved(self._simulation.save(), self._episode, self._shortest, self._travelled)

    def restore_state(self, saved: Saved) -> None:
        """Return to a saved state; what follows is what followed then."""
        self._disc.put_away()
        self._stand(saved.episode)
        self._simulation.restore(saved.physics)
        self._shortest, self._travelled = saved.shortest, saved.travelled

    def pose(self, observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Stand as `position`, `goal` and obstacles of an observation say, at rest, to be looked at."""
        start, goal = (np.asarray(observation[key], np.float64) for key in ("position", "goal"))
        self._begin(Episode(start, goal, _obstacles_in(observation)))
        return self._observation()

    # What a trajectory means, without a simulator

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """The class of an episode's path, from `position` (steps, 2) and `goal` [m]; None where it did not come to the
        goal, or where its class is not among `modes`."""
        path, goal = np.asarray(observations["position"], np.float64), np.asarray(observations["goal"], np.float64)[-1]
        if np.linalg.norm(path[-1] - goal) > GOAL_RADIUS + 1e-6:
            return None
        label = maze_map.class_of(np.concatenate([path, goal[None]]))
        return label if label in MODES else None

    def classes(self, start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray = NO_OBSTACLES) -> tuple[str, ...]:
        """The modes that exist for a start and a goal (2,) [m], the shortest first, see `maze_paths.classes`."""
        return maze_paths.classes(start, goal, obstacles)

    def modes_that_solve(self, observation: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """The modes that exist from what is observed."""
        return self.classes(observation["position"], observation["goal"], _obstacles_in(observation))

    def still_action(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The action (2,) [m] that leads nowhere: the position that is observed."""
        return np.asarray(observation["position"])

    def judge(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> list[Verdict]:
        """What comes of plans (N, steps, 2) [m] that are followed exactly."""
        paths = self.planned_path(observation, actions)
        goal, obstacles = np.asarray(observation["goal"], np.float64), _obstacles_in(observation)
        shortest = maze_paths.shortest_length(np.asarray(paths[0, 0], np.float64), goal, obstacles)
        gaps = maze_map.clearance(paths, obstacles)
        verdicts = []
        for path, gap in zip(np.asarray(paths, np.float64), gaps, strict=True):
            valid = bool(gap > 0) and float(np.linalg.norm(path[-1] - goal)) <= GOAL_RADIUS
            whole = np.concatenate([path, goal[None]])
            length = float(np.linalg.norm(np.diff(whole, axis=0), axis=-1).sum())
            verdicts.append(Verdict(valid, maze_map.class_of(whole), length / max(shortest, GOAL_RADIUS)))
        return verdicts

    def path(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where an episode went in the plane of `scene`, (steps, 2) [m]."""
        return np.asarray(observations["position"])

    def planned_path(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """From the disc through the wanted positions `actions` (..., steps, 2), (..., steps + 1, 2) [m]."""
        return path_through(observation["position"], actions)

    def roll_forward(self, observations: Mapping[str, np.ndarray], actions: np.ndarray) -> dict[str, np.ndarray]:
        """What is expected to be observed, {key: (B, To, ...)}, once actions (B, d, 2) have followed these and nothing
        was in the way. Raises ValueError for images."""
        if IMAGE in observations:
            raise ValueError(f"what a camera will see cannot be foreseen; the policy observes {IMAGE}")
        ahead = {key: np.asarray(rows, np.float64) for key, rows in observations.items()}
        for action in np.moveaxis(np.clip(actions, -ROOM, ROOM), 1, 0):
            now = predict_disc(
                ahead["position"][:, -1], ahead["velocity"][:, -1], action, CONTROL_PERIOD / SUBSTEPS, SUBSTEPS
            )
            rows = {key: kept[:, -1] for key, kept in ahead.items()} | {"position": now[0], "velocity": now[1]}
            ahead = {key: np.concatenate([kept[:, 1:], rows[key][:, None]], axis=1) for key, kept in ahead.items()}
        return {key: rows.astype(observations[key].dtype) for key, rows in ahead.items()}

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Where points (..., 2) [m] of the floor lie in the picture of `render`, (..., 2) [px]: column, row."""
        return self._simulation.pixels(at_height(np.asarray(xy), 0.0))

    @property
    def barriers(self) -> tuple[np.ndarray, np.ndarray, float]:
        """The blocks (5, 4), the room (4,) and the radius of the disc, see `protocols.Obstructed` [m]."""
        blocks = np.array([(*block.center, *block.half) for block in BLOCKS])
        return blocks, np.array([0.0, 0.0, ROOM, ROOM]), DISC_RADIUS

    @property
    def scene(self) -> Scene:
        """The room with its blocks from above; goals and obstacles differ from episode to episode."""
        return Scene(*WORKSPACE, places=tuple(_rectangle(block) for block in BLOCKS))

    def places(self, observation: Mapping[str, np.ndarray]) -> tuple[Place, ...]:
        """The goal and the obstacles of the episode that observes this."""
        discs = [(x, y, radius) for x, y, radius in _obstacles_in(observation).tolist() if radius > 0]
        x, y = np.asarray(observation["goal"], np.float64).tolist()
        return (circle(x, y, GOAL_RADIUS, "lightgreen"), *(circle(*disc, "indianred") for disc in discs))


def _obstacles_in(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """x, y, radius, (k, 3) [m]."""
    return np.asarray(observation.get("obstacles", NO_OBSTACLES), np.float64)


def _rectangle(block: maze_map.Block) -> Place:
    (x, y), (half_x, half_y) = block.center, block.half
    return tuple((x + i * half_x, y + j * half_y) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))), "lightgray"

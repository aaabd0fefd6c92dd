"""The Panda before its gate in PyBullet: what stands there, how joints are driven, what is touched.

Knows the arm and the scene. Knows no task.
"""

import numpy as np

from diffusion_policy.envs.panda_model import least_gaps
from diffusion_policy.envs.panda_scene import ARRAY, BOXES, NO_OBSTACLES, OBSTACLE_RADII
from diffusion_policy.envs.robots import load_panda
from diffusion_policy.envs.simulation import Simulation

TORQUES = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)
"""At most, as in the Panda's data sheet [N m]."""
GAIN = 0.1
"""A joint wants to go this share of what lacks in one physics step ..."""
MAX_SPEED = 2.0
"""... but no faster than this [rad/s]."""
_JOINTS = range(7)
_UPRIGHT = np.array([0.0, -0.8, 0.0, -0.8, 0.0, 1.5, 0.0])
_UNDERGROUND = -1.0
"""Where balls are that are not there [m]."""
_LINKS = ((4, (-1, 0)), (5, (-1, 0, 1, 2)), (6, (-1, 0, 1, 2)), (8, (-1, 0, 1, 2)), (9, (-1, 0, 1, 2)))
"""Links that could touch each other, as PyBullet counts them: forearm, wrist, hand, finger, and those before."""
_GREEN, _RED, _GRAY = (0.35, 0.75, 0.45, 0.7), (0.8, 0.25, 0.2, 1.0), (0.55, 0.57, 0.6, 1.0)


def predict_joints(
    joints: np.ndarray, wanted: np.ndarray, time_step: float, substeps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Joint angles and speeds (..., 7) [rad], [rad/s] after so many physics steps [s] towards wanted angles, where
    nothing is in the way."""
    change = np.zeros_like(joints)
    for _ in range(substeps):
        change = np.clip(GAIN * (wanted - joints), -MAX_SPEED * time_step, MAX_SPEED * time_step)
        joints = joints + change
    return joints, change / time_step


class PandaWorld:
    """The arm, the table, the gate, and places for balls."""

    def __init__(self, simulation: Simulation, slots: int, *, coarse: bool = False) -> None:
        """`slots`: so many balls can be there at once; `coarse`: the arm is drawn of fewer faces."""
        self._simulation, self._slots = simulation, slots
        simulation.add_table((0.55, 0.65, 0.01), (0.4, 0.0), 0.5, (0.93, 0.93, 0.9, 1))
        for box in BOXES:
            simulation.add_box(
                box.name,
                half_extents=box.half,
                mass=0,
                friction=0.5,
                rolling_friction=0,
                position=box.center,
                color=_GRAY,
            )
        simulation.add_ball("goal", 0.025, (0, 0, _UNDERGROUND), _GREEN, solid=False)
        for slot in range(slots):
            for radius in OBSTACLE_RADII:
                simulation.add_ball(f"ball {slot} {radius}", radius, (0, 0, _UNDERGROUND), _RED)
        load_panda(simulation, coarse=coarse)
        self._things = ["table", *(box.name for box in BOXES)]

    def stand(self, obstacles: np.ndarray, goal_tool: np.ndarray | None = None) -> None:
        """Put balls (k, 4: x, y, z, radius; 0 for none) and the mark of the goal (3,) where they are [m]."""
        self._things = ["table", *(box.name for box in BOXES)]
        for slot in range(self._slots):
            row = obstacles[slot] if slot < len(obstacles) else np.zeros(4)
            for radius in OBSTACLE_RADII:
                name, is_there = f"ball {slot} {radius}", abs(radius - row[3]) < 1e-6
                self._simulation.place(name, row[:3].tolist() if is_there else (0, 0, _UNDERGROUND), 0)
                self._things += [name] if is_there else []
        if goal_tool is not None:
            self._simulation.place("goal", goal_tool.tolist(), 0)

    def put(self, joints: np.ndarray) -> None:
        """Put the arm at joint angles (7,) [rad], at rest, without physics."""
        self._simulation.set_joints("arm", _JOINTS, joints.tolist())

    def drive(self, wanted: np.ndarray) -> None:
        """Drive the joints to angles (7,) [rad] in the next physics steps."""
        self._simulation.drive_joints_at(
            "arm", _JOINTS, wanted.tolist(), TORQUES, gain=GAIN, speeds=[MAX_SPEED] * len(_JOINTS)
        )

    def forget(self) -> None:
        """Put the arm where it touches nothing, and let the physics forget what it touched."""
        self.put(_UPRIGHT)
        self._simulation.step()

    @property
    def joints(self) -> np.ndarray:
        """(7,) [rad]"""
        return np.array(self._simulation.joint_angles("arm", _JOINTS))

    @property
    def velocities(self) -> np.ndarray:
        """(7,) [rad/s]"""
        return np.array(self._simulation.joint_speeds("arm", _JOINTS))

    def was_touched(self) -> bool:
        """Whether the arm touched something else in the last physics step."""
        return self._simulation.touches("arm")

    def touches_itself(self) -> bool:
        """Whether hand, wrist or forearm touch the links before them."""
        if least_gaps(self.joints, np.zeros((0, 6)), NO_OBSTACLES)[0] > 0:
            return False
        return any(self._simulation.links_touch("arm", link, other) for link, others in _LINKS for other in others)

    def is_free(self, joints: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
        """Whether the arm at joint angles (n, 7) [rad] touches nothing among balls (k, 4) [m], (n,). It is put there,
        so this is for a world in which nothing moves."""
        free = least_gaps(joints, ARRAY, obstacles) > 0  # what covers the links touches nothing
        self.stand(obstacles)
        for number in np.flatnonzero(~free):
            self.put(joints[number])
            touched = any(self._simulation.is_near("arm", thing, link=1) for thing in self._things)
            free[number] = not touched and not self.touches_itself()
        return free

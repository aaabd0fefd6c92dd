"""A disc that slides in a plane, and the controller that drives it: position in, bounded speed and force inside.

Knows joints and the law of the controller. Knows no task.
"""

import tempfile
from pathlib import Path

import numpy as np

from diffusion_policy.envs.simulation import Simulation

MASS = 1.0
"""[kg]"""
RATE = 10.0
"""Of the controller [1/s]: the disc comes to a place like a spring of this frequency without overshoot."""
MAX_SPEED = 1.5
"""The controller wants no more [m/s]."""
MAX_FORCE = 15.0
"""The controller pushes with no more [N]."""
_AXES = (0, 1)
_FAR = (0.0, 30.0)
_LIMIT = 40.0


def driving_force(position: np.ndarray, velocity: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The force (..., 2) [N] that leads a disc at a position, with a velocity, to a wanted position (..., 2) each [m],
    [m/s].

    A speed in proportion to what lacks, then a force in proportion to the speed that lacks, each bounded; within the
    bounds, x'' = RATE^2 (wanted - x) - 2 RATE x'.
    """
    speed = _bounded(RATE / 2 * (wanted - position), MAX_SPEED)
    return _bounded(2 * RATE * MASS * (speed - velocity), MAX_FORCE)


def predict_disc(
    position: np.ndarray, velocity: np.ndarray, wanted: np.ndarray, time_step: float, substeps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity (..., 2) after one control period of physics steps [s] towards a wanted position, where
    nothing is in the way."""
    for _ in range(substeps):
        velocity = velocity + time_step / MASS * driving_force(position, velocity, wanted)
        position = position + time_step * velocity
    return position, velocity


def _bounded(vectors: np.ndarray, most: float) -> np.ndarray:
    """Vectors (..., 2), those longer than `most` shortened to it."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors * np.minimum(1, most / np.maximum(length, 1e-12))


class Disc:
    """An upright cylinder on two sliding joints, along x and y."""

    def __init__(self, simulation: Simulation, radius: float, height: float) -> None:
        """It stands on the ground [m]."""
        self._simulation = simulation
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "disc.urdf"
            path.write_text(_urdf(radius, height))
            simulation.load_urdf("disc", path)
        simulation.drive_joints("disc", _AXES, (0, 0), (0, 0), gain=0)  # else their motors brake
        self.put((0.0, 0.0))

    def put(self, position: tuple[float, float] | np.ndarray) -> None:
        """Put it at a position (2,) [m], at rest, without physics."""
        self._simulation.set_joints("disc", _AXES, [float(x) for x in position])

    def put_away(self) -> None:
        """Put it where it touches nothing, and let the physics forget what it touched."""
        self.put(_FAR)
        self._simulation.step()

    def push(self, wanted: np.ndarray) -> None:
        """Drive it to a position (2,) [m] in the next physics step."""
        force = driving_force(self.position, self.velocity, wanted)
        self._simulation.push_joints("disc", _AXES, force.tolist())

    @property
    def position(self) -> np.ndarray:
        """(2,) [m]"""
        return np.array(self._simulation.joint_angles("disc", _AXES))

    @property
    def velocity(self) -> np.ndarray:
        """(2,) [m/s]"""
        return np.array(self._simulation.joint_speeds("disc", _AXES))

    def touches_anything(self) -> bool:
        """Whether it touched a body in the last physics step."""
        return self._simulation.touches("disc", 1)


def _urdf(radius: float, height: float) -> str:
    def inertia(mass: float) -> str:
        return f'<inertial><mass value="{mass}"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial>'

    def joint(parent: str, child: str, axis: str) -> str:
        return (
            f'<joint name="{child}_joint" type="prismatic"><parent link="{parent}"/><child link="{child}"/>'
            f'<axis xyz="{axis}"/><limit lower="-{_LIMIT}" upper="{_LIMIT}" effort="1000" velocity="1000"/></joint>'
        )

    shape = (
        f'<origin xyz="0 0 {height / 2}"/><geometry><cylinder radius="{radius}" length="{height}"/></geometry>'
        '<material name="disc"><color rgba="0.15 0.35 0.75 1"/></material>'
    )
    return f"""
<robot name="disc">
  <link name="ground">{inertia(1.0)}</link>
  <link name="slider">{inertia(1e-6)}</link>
  <link name="disc">{inertia(MASS)}<visual>{shape}</visual><collision>{shape.split("<material")[0]}</collision></link>
  {joint("ground", "slider", "1 0 0")}
  {joint("slider", "disc", "0 1 0")}
</robot>
"""

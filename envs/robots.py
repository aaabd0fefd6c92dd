"""Arms from pybullet_data: the end effector's position in, joint control inside.

Knows joints and inverse kinematics. Knows no task.
"""

import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion_policy.envs.simulation import DATA_PATH, Simulation

POINTING_DOWN = (1.0, 0.0, 0.0, 0.0)
"""Orientation of the tool, an xyzw quaternion: its axis along -z."""


class Arm:
    """An arm that keeps its tool pointing down and follows positions of it.

    `move_to` sets the joint motors' targets; the simulation's steps then move the arm.
    """

    def __init__(
        self,
        simulation: Simulation,
        urdf: Path,
        tool_link: str,
        rest_angles: Sequence[float],
        torques: Sequence[float],
        gain: float = 0.3,
    ) -> None:
        """`rest_angles` [rad] and `torques` [N m] have one number a joint, in the order of the file."""
        links = simulation.load_urdf("arm", urdf)
        self._simulation = simulation
        self._joints = range(len(rest_angles))
        self._rest_angles = rest_angles
        self._torques = torques
        self._gain = gain
        self.tool = links.index(tool_link)

    @property
    def tool_position(self) -> np.ndarray:
        """Where the tool is, (3,) [m]."""
        return self._simulation.link_position("arm", self.tool)

    def touches(self, body: str) -> bool:
        """Whether the tool touched a body in the last physics step."""
        return self._simulation.touches("arm", self.tool, body)

    def reset(self, position: Sequence[float], tolerance: float = 1e-4, iterations: int = 500) -> None:
        """Put the tool at a position [m], at rest, without physics; raises ValueError when out of reach."""
        self._simulation.set_joints("arm", self._joints, self._rest_angles)
        for _ in range(iterations):  # each round starts from the last angles and comes nearer
            self._simulation.set_joints("arm", self._joints, self._solve(position))
            if np.abs(self.tool_position - position).max() < tolerance:
                self.move_to(position)
                return
        raise ValueError(f"the arm cannot reach {tuple(position)}; it came as near as {tuple(self.tool_position)}")

    def move_to(self, position: Sequence[float]) -> None:
        """Drive the joints towards the angles that bring the tool to a position [m]."""
        self._simulation.drive_joints("arm", self._joints, self._solve(position), self._torques, self._gain)

    def _solve(self, position: Sequence[float]) -> tuple[float, ...]:
        return self._simulation.inverse_kinematics("arm", self.tool, position, POINTING_DOWN)[: len(self._joints)]


def panda_with_rod(simulation: Simulation, radius: float, length: float) -> Arm:
    """Franka Panda whose gripper is replaced by a rod along the hand's axis [m]; the tool is the rod's centre."""
    folder = DATA_PATH / "franka_panda"
    tree = ElementTree.parse(folder / "panda.urdf")
    robot = tree.getroot()
    gripper = {"panda_leftfinger", "panda_rightfinger", "panda_grasptarget"}
    for element in list(robot):
        child = element.find("child")
        if element.get("name") in gripper or (child is not None and child.get("link") in gripper):
            robot.remove(element)
    for mesh in robot.iter("mesh"):  # absolute, since the changed file lies elsewhere
        mesh.set("filename", mesh.get("filename", "").replace("package://", f"{folder}/"))
    robot.extend(ElementTree.fromstring(_ROD.format(radius=radius, length=length, offset=0.06 + length / 2)))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "panda_with_rod.urdf"
        tree.write(path)
        return Arm(
            simulation,
            path,
            tool_link="rod",
            rest_angles=(0.0, -0.3, 0.0, -2.2, 0.0, 2.0, 0.785),
            torques=(87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0),  # the Panda's data sheet, as in its URDF
        )


_ROD = """
<robot>
  <link name="rod">
    <inertial><mass value="0.05"/><inertia ixx="1e-4" iyy="1e-4" izz="1e-4" ixy="0" ixz="0" iyz="0"/></inertial>
    <visual>
      <geometry><cylinder radius="{radius}" length="{length}"/></geometry>
      <material name="rod"><color rgba="0.15 0.15 0.17 1"/></material>
    </visual>
    <collision><geometry><cylinder radius="{radius}" length="{length}"/></geometry></collision>
  </link>
  <joint name="rod_joint" type="fixed">
    <parent link="panda_hand"/><child link="rod"/><origin xyz="0 0 {offset}"/>
  </joint>
</robot>
"""

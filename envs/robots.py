"""Arms from pybullet_data: the end effector's position in, joint control inside.

Knows joints and inverse kinematics. Knows no task.
"""

import math
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from diffusion_policy.envs.cameras import IMAGE, WRIST_IMAGE, ImageOptions, Mount, Mounted, Viewpoint
from diffusion_policy.envs.simulation import DATA_PATH, Simulation

POINTING_DOWN = (1.0, 0.0, 0.0, 0.0)
"""Orientation of the tool, an xyzw quaternion: its axis along -z."""


_SLACK = 0.02
"""A gliding joint may exceed its even speed by this much [rad/s], to make up for what it lags behind."""


class Arm:
    """An arm that keeps its tool pointing down and follows positions of it.

    `move_to` sets the joint motors' targets; the simulation's steps then move the arm.
    """

    def __init__(
        self,
        simulation: Simulation,
        urdf: Path,
        tool_link: str,
        *,
        rest_angles: Sequence[float],
        torques: Sequence[float],
        gain: float = 0.3,
        inverse: Callable[[Sequence[float]], Sequence[float]] | None = None,
    ) -> None:
        """`rest_angles` [rad] and `torques` [N m] have one number a joint, in the order of the file; `inverse` is the
        arm's inverse kinematics in closed form (position [m] -> angles): without it, the simulation iterates."""
        links = simulation.load_urdf("arm", urdf)
        self._simulation = simulation
        self._joints = range(len(rest_angles))
        self._rest_angles = rest_angles
        self._torques = torques
        self._gain = gain
        self._inverse = inverse
        self.tool = links.index(tool_link)

    @property
    def tool_position(self) -> np.ndarray:
        """Where the tool is, (3,) [m]."""
        return self._simulation.link_position("arm", self.tool)

    def mounted(self, mount: Mount) -> Mounted:
        """A camera that moves with the tool."""
        return Mounted("arm", self.tool, mount)

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

    def glide_to(self, position: Sequence[float], duration: float) -> None:
        """Like `move_to`, at even speeds that bring the tool there in `duration` [s]: nothing is hit by a jerk. To be
        called before each `step`."""
        angles = self._solve(position)
        present = self._simulation.joint_angles("arm", self._joints)
        speeds = [abs(goal - angle) / duration + _SLACK for goal, angle in zip(angles, present, strict=True)]
        self._simulation.drive_joints_at("arm", self._joints, angles, self._torques, gain=self._gain, speeds=speeds)
        self._simulation.carry_weight("arm", self._joints, present)

    def _solve(self, position: Sequence[float]) -> Sequence[float]:
        if self._inverse is not None:
            return self._inverse(position)
        return self._simulation.inverse_kinematics("arm", self.tool, position, POINTING_DOWN)[: len(self._joints)]


def panda_with_rod(simulation: Simulation, radius: float, length: float, *, coarse: bool = False) -> Arm:
    """Franka Panda whose gripper is replaced by a rod along the hand's axis [m]; the tool is the rod's centre;
    `coarse`: see `_look_coarse`."""
    folder = DATA_PATH / "franka_panda"
    robot = ElementTree.parse(folder / "panda.urdf").getroot()
    gripper = {"panda_leftfinger", "panda_rightfinger", "panda_grasptarget"}
    for element in list(robot):
        child = element.find("child")
        if element.get("name") in gripper or (child is not None and child.get("link") in gripper):
            robot.remove(element)
    if coarse:
        _look_coarse(robot)
    robot.extend(_rod("panda_hand", radius, length, offset=0.06 + length / 2, middle=0))
    with tempfile.TemporaryDirectory() as temporary:
        return Arm(
            simulation,
            _write(robot, folder, Path(temporary)),
            tool_link="rod",
            rest_angles=(0.0, -0.3, 0.0, -2.2, 0.0, 2.0, 0.785),
            torques=(87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0),  # the Panda's data sheet, as in its URDF
        )


def load_panda(simulation: Simulation, *, coarse: bool = False) -> None:
    """Franka Panda with its gripper closed, as the body `arm`: its joints are the first seven; `coarse`: see
    `_look_coarse`."""
    folder = DATA_PATH / "franka_panda"
    robot = ElementTree.parse(folder / "panda.urdf").getroot()
    for joint in robot.iter("joint"):
        if joint.get("type") == "prismatic":
            joint.set("type", "fixed")
    if coarse:
        _look_coarse(robot)
    with tempfile.TemporaryDirectory() as temporary:
        simulation.load_urdf("arm", _write(robot, folder, Path(temporary)))


def xarm_with_rod(simulation: Simulation, radius: float, length: float, above: float, *, coarse: bool = False) -> Arm:
    """UFACTORY xArm6 with a rod along its flange's axis [m]; the tool is the point so far `above` the rod's lower end;
    `coarse`: see `_look_coarse`.

    Only the rod can be touched: the links never come near a table on which the arm stands.
    """
    folder = DATA_PATH / "xarm"
    robot = ElementTree.parse(folder / "xarm6_robot_white.urdf").getroot()
    for element in list(robot):
        if element.get("name") in ("world", "world_joint"):  # so that joint i has index i; the base is fixed anyway
            robot.remove(element)
    for joint in robot.iter("joint"):
        if joint.get("type") == "revolute":  # `xarm_angles` keeps to the limits; to simulate them takes time
            joint.set("type", "continuous")
    if coarse:
        _look_coarse(robot)
    for link in robot.iter("link"):
        for collision in link.findall("collision"):
            link.remove(collision)
    offset = length - above  # from the flange to the tool
    robot.extend(_rod("link6", radius, length, offset, middle=above - length / 2))
    with tempfile.TemporaryDirectory() as temporary:
        return Arm(
            simulation,
            _write(robot, folder, Path(temporary)),
            tool_link="rod",
            rest_angles=(0.0,) * 6,
            torques=(1200.0,) * 6,  # 5 * 240, as in the published block pushing
            gain=1.0,  # `glide_to` bounds the speeds
            inverse=lambda position: xarm_angles(position, offset),
        )


def xarm_angles(position: Sequence[float], tool_offset: float) -> tuple[float, ...]:
    """The xArm6's joint angles (6,) [rad] that bring a point `tool_offset` below its flange to a position [m], pointing
    down, elbow up. Out of reach, the arm stretches towards it. The lengths are those of its URDF.
    """
    x, y, z = position
    upper, forearm = math.hypot(0.0535, 0.2845), math.hypot(0.0775, 0.3425)
    upper_at_zero, forearm_at_zero = math.atan2(0.0535, 0.2845), math.atan2(0.0775, -0.3425)  # from the vertical
    out, up = math.hypot(x, y) - 0.076, z + tool_offset + 0.097 - 0.267  # the wrist, seen from the shoulder
    distance = min(max(math.hypot(out, up), forearm - upper + 1e-3), forearm + upper - 1e-3)
    shoulder = math.acos((upper**2 + distance**2 - forearm**2) / (2 * upper * distance))  # the law of cosines
    elbow = math.acos((upper**2 + forearm**2 - distance**2) / (2 * upper * forearm))
    upper_angle = math.atan2(out, up) - shoulder
    forearm_angle = upper_angle + math.pi - elbow
    base, lean = math.atan2(y, x), upper_angle - upper_at_zero
    bend = forearm_angle - forearm_at_zero - lean
    return base, lean, bend, 0.0, -lean - bend, base


def _look_coarse(robot: ElementTree.Element) -> None:
    """Draw the links as their hulls, of some hundred faces instead of ten thousand each, in an eighth of the time."""
    for link in robot.iter("link"):
        seen, touched = link.find("visual/geometry/mesh"), link.find("collision/geometry/mesh")
        if seen is not None and touched is not None:
            seen.set("filename", touched.get("filename", ""))


def _write(robot: ElementTree.Element, folder: Path, destination: Path) -> Path:
    """Write a changed URDF elsewhere: its meshes still come from their `folder`."""
    for mesh in robot.iter("mesh"):
        mesh.set("filename", mesh.get("filename", "").replace("package://", f"{folder}/"))
    path = destination / "arm_with_rod.urdf"
    ElementTree.ElementTree(robot).write(path)
    return path


def _rod(parent: str, radius: float, length: float, offset: float, middle: float) -> ElementTree.Element:
    """A link `rod`, `offset` along the parent's axis; the rod's middle lies `middle` along it from there [m]."""
    shape = f'<origin xyz="0 0 {middle}"/><geometry><cylinder radius="{radius}" length="{length}"/></geometry>'
    return ElementTree.fromstring(f"""
<robot>
  <link name="rod">
    <inertial><mass value="0.05"/><inertia ixx="1e-4" iyy="1e-4" izz="1e-4" ixy="0" ixz="0" iyz="0"/></inertial>
    <visual>{shape}<material name="rod"><color rgba="0.15 0.15 0.17 1"/></material></visual>
    <collision>{shape}</collision>
  </link>
  <joint name="rod_joint" type="fixed">
    <parent link="{parent}"/><child link="rod"/><origin xyz="0 0 {offset}"/>
  </joint>
</robot>
""")


def arm_cameras(
    simulation: Simulation, arm: Arm, view: Viewpoint, mount: Mount, images: ImageOptions
) -> dict[str, Callable[[], np.ndarray]]:
    """By key what gives the images that a task with an arm observes: a camera that stands, and one on the wrist."""
    if not images.size:
        return {}
    cameras = {IMAGE: lambda: simulation.photograph(view, images.size)}
    if images.wrist:
        cameras[WRIST_IMAGE] = lambda: simulation.photograph(arm.mounted(mount), images.size)
    return cameras

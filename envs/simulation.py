"""PyBullet behind body names: the only file that imports it.

Knows bodies, joints, contacts, cameras and saved states. Knows no robot and no task.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from diffusion_policy.envs import egl
from diffusion_policy.envs.cameras import Mounted, Renderer, Viewpoint
from diffusion_policy.envs.quiet import silence

with silence():
    import pybullet
    import pybullet_data
    from pybullet_utils.bullet_client import BulletClient

DATA_PATH = Path(pybullet_data.getDataPath())
"""Where PyBullet's own robot models lie."""


class _Client(BulletClient):
    """A client that can be collected where Ctrl-C came before it was connected, without a traceback."""

    _client = -1


Color = tuple[float, float, float, float]


NEAR, FAR = 0.02, 5.0
"""What is nearer to the eye of a camera on a link, or farther from any eye, is not drawn [m]."""
LIGHT = (0.6, -0.8, 2.0)
"""The direction from which light comes."""


class Simulation:
    """One PyBullet world with a fixed time step, seen from one viewpoint."""

    def __init__(
        self,
        time_step: float,
        view: Viewpoint,
        *,
        window: bool = False,
        precision: float = 1e-7,
        renderer: Renderer = "tiny",
    ) -> None:
        """`time_step` is one physics step [s]; `window` opens one, which needs a display; the solver stops once the
        squares of what velocities lack are below `precision` [m^2/s^2] (the default is PyBullet's); `renderer`: what
        draws the images of `photograph`. Raises ValueError for EGL where it cannot be had."""
        plugin = egl.find_plugin() if renderer == "egl" else None
        with silence():
            self._client = _Client(pybullet.GUI if window else pybullet.DIRECT)
            if plugin:
                self._client.loadPlugin(plugin, "_eglRendererPlugin")  # it draws only what is added from now on
                egl.hold(self._client)
        if window:
            self._client.configureDebugVisualizer(pybullet.COV_ENABLE_GUI, 0)
        self._view = view
        self._renderer = pybullet.ER_BULLET_HARDWARE_OPENGL if plugin else pybullet.ER_TINY_RENDERER
        self._cold = plugin is not None
        self.picture_share = 1.0
        """Of the view's width and height that `render` draws; less is faster."""
        self._client.resetDebugVisualizerCamera(view.distance, view.yaw, view.pitch, view.target)  # of the window
        self._client.setTimeStep(time_step)
        self._time_step, self._steps_a_call = time_step, 1
        self._client.setPhysicsEngineParameter(solverResidualThreshold=precision)
        self._client.setGravity(0, 0, -9.81)
        self._bodies: dict[str, int] = {}
        self._movable: list[str] = []
        self._connected = True

    # Building the scene

    def add_cylinder(
        self, name: str, radius: float, height: float, position: Sequence[float], color: Color, solid: bool = True
    ) -> None:
        """Add a static upright cylinder, its centre at `position` [m]; one that is not solid is never touched."""
        client = self._client
        shape = pybullet.GEOM_CYLINDER
        collision = client.createCollisionShape(shape, radius=radius, height=height) if solid else -1
        visual = client.createVisualShape(pybullet.GEOM_CYLINDER, radius=radius, length=height, rgbaColor=color)
        self._bodies[name] = client.createMultiBody(0, collision, visual, position)

    def add_ball(self, name: str, radius: float, position: Sequence[float], color: Color, solid: bool = True) -> None:
        """Add a static ball, its centre at `position` [m]; one that is not solid is never touched."""
        collision = self._client.createCollisionShape(pybullet.GEOM_SPHERE, radius=radius) if solid else -1
        visual = self._client.createVisualShape(pybullet.GEOM_SPHERE, radius=radius, rgbaColor=color)
        self._bodies[name] = self._client.createMultiBody(0, collision, visual, position)

    def add_picture_box(
        self, name: str, half_extents: Sequence[float], position: Sequence[float], color: Color
    ) -> None:
        """Add a box [m] that is seen but never touched: a table top, a line on it."""
        visual = self._client.createVisualShape(pybullet.GEOM_BOX, halfExtents=half_extents, rgbaColor=color)
        self._bodies[name] = self._client.createMultiBody(0, -1, visual, position)

    def add_table(
        self, half_extents: Sequence[float], center: tuple[float, float], friction: float, color: Color
    ) -> None:
        """Add a table whose top lies at height 0: a box [m] to the eye, an endless plane to the touch."""
        client = self._client
        collision = client.createCollisionShape(pybullet.GEOM_PLANE)  # contacts with a plane are the cheapest
        visual = client.createVisualShape(
            pybullet.GEOM_BOX,
            halfExtents=half_extents,
            rgbaColor=color,
            visualFramePosition=(*center, -half_extents[2]),
        )
        self._bodies["table"] = client.createMultiBody(0, collision, visual)
        client.changeDynamics(self._bodies["table"], -1, lateralFriction=friction)

    def add_box(
        self,
        name: str,
        *,
        half_extents: Sequence[float],
        mass: float,
        friction: float,
        rolling_friction: float,
        position: Sequence[float],
        color: Color,
    ) -> None:
        """Add a box [m] of a mass [kg] that is touched and moves, unless its mass is 0; its centre is at `position`
        [m]."""
        client = self._client
        collision = client.createCollisionShape(pybullet.GEOM_BOX, halfExtents=half_extents)
        visual = client.createVisualShape(pybullet.GEOM_BOX, halfExtents=half_extents, rgbaColor=color)
        body = client.createMultiBody(mass, collision, visual, position)
        client.changeDynamics(body, -1, lateralFriction=friction, rollingFriction=rolling_friction)
        self._bodies[name] = body
        if mass:
            self._movable.append(name)

    def load_urdf(self, name: str, path: Path) -> list[str]:
        """Load a robot with its base fixed at the origin; returns its link names, in order of their indices."""
        with silence():
            body = self._client.loadURDF(str(path), useFixedBase=True)
        self._bodies[name] = body
        return [self._client.getJointInfo(body, i)[12].decode() for i in range(self._client.getNumJoints(body))]

    # Moving

    def step(self, steps: int = 1) -> None:
        """Advance the physics by time steps: many in one call are cheaper, and equal to as many calls."""
        if steps != self._steps_a_call:
            self._client.setPhysicsEngineParameter(fixedTimeStep=steps * self._time_step, numSubSteps=steps)
            self._steps_a_call = steps
        self._client.stepSimulation()

    def place(self, name: str, position: Sequence[float], yaw: float) -> None:
        """Put a body at a pose ([m], [rad] about the vertical), at rest, without physics."""
        orientation = (0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2))
        self._client.resetBasePositionAndOrientation(self._bodies[name], position, orientation)

    def set_joints(self, name: str, joints: Sequence[int], angles: Sequence[float]) -> None:
        """Put joints at angles [rad], at rest, without physics."""
        for joint, angle in zip(joints, angles, strict=True):
            self._client.resetJointState(self._bodies[name], joint, angle)

    def joint_angles(self, name: str, joints: Sequence[int]) -> tuple[float, ...]:
        """Angles of joints [rad]."""
        return tuple(state[0] for state in self._client.getJointStates(self._bodies[name], joints))

    def joint_speeds(self, name: str, joints: Sequence[int]) -> tuple[float, ...]:
        """Speeds of joints [rad/s], of sliding ones [m/s]."""
        return tuple(state[1] for state in self._client.getJointStates(self._bodies[name], joints))

    def push_joints(self, name: str, joints: Sequence[int], forces: Sequence[float]) -> None:
        """Let forces [N m], [N] act on joints in the next physics step."""
        self._client.setJointMotorControlArray(self._bodies[name], joints, pybullet.TORQUE_CONTROL, forces=forces)

    def drive_joints(
        self, name: str, joints: Sequence[int], angles: Sequence[float], forces: Sequence[float], gain: float
    ) -> None:
        """Set position targets [rad] for the joints' motors, each with its largest torque [N m]."""
        self._client.setJointMotorControlArray(
            self._bodies[name],
            joints,
            pybullet.POSITION_CONTROL,
            targetPositions=angles,
            forces=forces,
            positionGains=[gain] * len(joints),
        )

    def drive_joints_at(
        self,
        name: str,
        joints: Sequence[int],
        angles: Sequence[float],
        forces: Sequence[float],
        *,
        gain: float,
        speeds: Sequence[float],
    ) -> None:
        """Like `drive_joints`, each joint no faster than its speed [rad/s]."""
        body = self._bodies[name]
        for joint, angle, force, speed in zip(joints, angles, forces, speeds, strict=True):
            self._client.setJointMotorControl2(
                body,
                joint,
                pybullet.POSITION_CONTROL,
                targetPosition=angle,
                force=force,
                positionGain=gain,
                maxVelocity=speed,
            )

    def carry_weight(self, name: str, joints: Sequence[int], angles: Sequence[float]) -> None:
        """Let the joints, all that the body has, at their present angles [rad], carry its weight in the next `step`, so
        that their motors need not: the solver is done sooner."""
        still = [0.0] * len(angles)
        torques = self._client.calculateInverseDynamics(self._bodies[name], list(angles), still, still)
        self._client.setJointMotorControlArray(self._bodies[name], joints, pybullet.TORQUE_CONTROL, forces=torques)

    @contextlib.contextmanager
    def holding(self, name: str, point: Sequence[float], force: float) -> Iterator[Callable[[Sequence[float]], None]]:
        """Hold a body at a point of its own frame [m] with at most a force [N]; gives what leads that point to a
        position [m], to be called before each `step`."""
        ball = pybullet.JOINT_POINT2POINT
        joint = self._client.createConstraint(self._bodies[name], -1, -1, -1, ball, (0, 0, 0), point, (0, 0, 0))
        try:
            yield lambda position: self._client.changeConstraint(joint, jointChildPivot=position, maxForce=force)
        finally:
            self._client.removeConstraint(joint)

    def inverse_kinematics(
        self, name: str, link: int, position: Sequence[float], orientation: Sequence[float]
    ) -> tuple[float, ...]:
        """Joint angles [rad] that bring a link to a pose ([m], xyzw quaternion), starting from the present ones."""
        return self._client.calculateInverseKinematics(self._bodies[name], link, position, orientation)

    # Reading

    def link_position(self, name: str, link: int) -> np.ndarray:
        """Position of a link's frame in the world, (3,) [m]."""
        return np.array(self._client.getLinkState(self._bodies[name], link, computeForwardKinematics=True)[4])

    def position_and_yaw(self, name: str) -> tuple[float, float, float]:
        """Where a body is and how it is turned about the vertical: x, y [m], yaw [rad]."""
        (x, y, _), (qx, qy, qz, qw) = self._client.getBasePositionAndOrientation(self._bodies[name])
        return x, y, math.atan2(2 * (qw * qz + qx * qy), 1 - 2 * (qy * qy + qz * qz))

    def touches(self, name: str, link: int | None = None, other: str | None = None) -> bool:
        """Whether a link, None for any, touched another body, None for any, in the last step."""
        bodies = (self._bodies[name], -1 if other is None else self._bodies[other])
        contacts = self._client.getContactPoints(*bodies, *(() if link is None else (link,)))
        return any(contact[8] <= 0 for contact in contacts)  # contact[8]: distance, positive while only near

    def is_near(self, name: str, other: str, link: int = -1, distance: float = 0.0) -> bool:
        """Whether a body, from a link on (-1: its base), is so near to another one [m] as they stand now; no step is
        needed."""
        found = self._client.getClosestPoints(self._bodies[name], self._bodies[other], distance)
        return any(point[3] >= link and point[8] <= distance for point in found)

    def links_touch(self, name: str, link: int, other: int) -> bool:
        """Whether two links of a body, as it stands now, touch each other; -1 is its base."""
        body = self._bodies[name]
        return any(point[8] <= 0 for point in self._client.getClosestPoints(body, body, 0.0, link, other))

    def render(self) -> np.ndarray:
        """A picture of the scene, (height, width, 3) uint8, drawn on the CPU."""
        return self._draw(*self._matrices(), *self._picture_size, pybullet.ER_TINY_RENDERER)

    def photograph(self, camera: Viewpoint | Mounted, size: int) -> np.ndarray:
        """A square image (size, size, 3) uint8 of what a camera sees."""
        if isinstance(camera, Viewpoint):
            eye, near = self._eye(camera), 0.1
        else:
            eye, near = self._eye_on_link(camera), NEAR
        field = camera.field if isinstance(camera, Viewpoint) else camera.mount.field
        projection = self._client.computeProjectionMatrixFOV(field, 1.0, near, FAR)
        if self._cold:
            self._cold = False
            with silence():  # OpenGL's first two images are other ones, and it prints what draws
                for _ in range(2):
                    self._draw(eye, projection, size, size, self._renderer)
        return self._draw(eye, projection, size, size, self._renderer)

    def _draw(
        self, eye: Sequence[float], projection: Sequence[float], width: int, height: int, renderer: int
    ) -> np.ndarray:
        """Without shadows, and without saying which pixel is whose: both take time."""
        flags = pybullet.ER_NO_SEGMENTATION_MASK
        _, _, rgba, _, _ = self._client.getCameraImage(
            width, height, eye, projection, renderer=renderer, lightDirection=LIGHT, shadow=0, flags=flags
        )
        return np.asarray(rgba, dtype=np.uint8).reshape(height, width, 4)[..., :3]

    def _eye_on_link(self, camera: Mounted) -> tuple[float, ...]:
        """The matrix of a camera on a link."""
        state = self._client.getLinkState(self._bodies[camera.body], camera.link, computeForwardKinematics=True)
        turned = np.array(self._client.getMatrixFromQuaternion(state[5])).reshape(3, 3)
        eye, target = (turned @ point + state[4] for point in (camera.mount.eye, camera.mount.target))
        return self._client.computeViewMatrix(eye.tolist(), target.tolist(), (turned @ camera.mount.up).tolist())

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Where points (..., 3) [m] lie in a picture of `render`, (..., 2) [px]: column, row."""
        view, projection = (np.array(matrix).reshape(4, 4).T for matrix in self._matrices())
        homogeneous = np.concatenate([points, np.ones((*points.shape[:-1], 1))], axis=-1)
        clip = homogeneous @ (projection @ view).T
        xy = clip[..., :2] / clip[..., 3:]  # -1..1, y up
        return (xy * [1, -1] + 1) / 2 * self._picture_size

    def seen_at(self, xy: np.ndarray, height: float) -> np.ndarray:
        """The point (2,) at a height [m] that is seen where a point (2,) of the ground is [m]."""
        view = np.array(self._matrices()[0]).reshape(4, 4).T
        eye = np.linalg.inv(view)[:3, 3]
        return xy + (eye[:2] - xy) * (height / eye[2])

    @property
    def _picture_size(self) -> tuple[int, int]:
        """Width and height [px]."""
        return round(self._view.width * self.picture_share), round(self._view.height * self.picture_share)

    def _matrices(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        view = self._view
        return self._eye(view), self._client.computeProjectionMatrixFOV(view.field, view.width / view.height, 0.1, FAR)

    def _eye(self, view: Viewpoint) -> tuple[float, ...]:
        return self._client.computeViewMatrixFromYawPitchRoll(
            view.target, view.distance, view.yaw, view.pitch, roll=0, upAxisIndex=2
        )

    # States

    def save(self) -> int:
        """Keep the full physical state in memory; returns a handle for `restore`."""
        return self._client.saveState()

    def restore(self, state: int) -> None:
        """Return to a saved state, contacts and solver caches included.

        PyBullet keeps contacts of boxes that the saved state knows nothing of, whence the same state would continue in
        two ways; a step with the boxes in the air ends them.
        """
        if self._movable:
            for i, name in enumerate(self._movable):
                self.place(name, (0, 0, 10 + i), 0)
            self.step()
        self._client.restoreState(state)

    def close(self) -> None:
        """Disconnect; may be called twice."""
        if self._connected:
            self._connected = False
            with silence(), contextlib.suppress(pybullet.error):  # the user may have closed the window
                if not egl.release(self._client):
                    self._client.disconnect()

"""An environment in a robot's place, and what Avoid foresees."""

import numpy as np

from diffusion_policy import envs
from diffusion_policy.envs.protocols import as_foreseeing
from diffusion_policy.envs.simulated_robot import SimulatedRobot


def test_avoid_foresees_where_actions_lead() -> None:
    """The commanded position exactly, the measured one within some mm, under commands that jump, also too far."""
    env = envs.make("diffusion_policy/Avoid-v0", rows=1)
    foreseeing = as_foreseeing(env)
    assert foreseeing is not None
    rng = np.random.default_rng(0)
    first, _ = env.reset(seed=0)
    second = env.step(np.array([0.0, 0.01], np.float32))[0]
    observed = {key: np.stack([first[key], second[key]])[None] for key in first}
    actions = rng.uniform([-0.03, -0.005], [0.0, 0.012], (7, 2)).astype(np.float32)
    found = foreseeing.roll_forward(observed, actions[None])
    steps = [env.step(action)[0] for action in actions]
    for key, most in (("desired_xy", 1e-6), ("actual_xy", 0.005)):
        assert found[key].shape == (1, 2, 2)
        np.testing.assert_allclose(found[key][0], [step[key] for step in steps[-2:]], rtol=0, atol=most)
    unchanged = foreseeing.roll_forward(observed, actions[None, :0])
    np.testing.assert_array_equal(unchanged["actual_xy"], observed["actual_xy"])


def test_a_simulated_robot_is_an_episode() -> None:
    robot = SimulatedRobot("diffusion_policy/Avoid-v0", {"rows": 1, "max_episode_steps": 3}, seed=5)
    assert robot.success is None
    assert robot.roll_forward is not None
    first = robot.observe()
    assert first is not None
    assert robot.observe() is first  # nothing moves between two steps
    for _ in range(3):
        assert robot.observe() is not None
        robot.act(np.array([0.0, 0.01]))
    assert robot.observe() is None
    assert robot.success is False
    robot.stop()
    assert SimulatedRobot("Pendulum-v1").roll_forward is None

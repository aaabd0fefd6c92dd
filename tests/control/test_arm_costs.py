"""The clearance of an arm: kinematics against numpy's, closed forms, gradients, and how --cost finds it."""

import numpy as np
import pytest
import torch

from diffusion_policy import envs
from diffusion_policy.commands.costs import find_cost
from diffusion_policy.control.arm_costs import ArmBarriers, arm_clearance, ball_centers, forward_kinematics
from diffusion_policy.control.costs import COSTS, PLACE
from diffusion_policy.envs.panda_model import BALLS, LIMITS, MOVING, ORIGINS, least_gaps, link_positions
from diffusion_policy.envs.panda_scene import ARRAY, NO_OBSTACLES

RNG = np.random.default_rng(0)
PANDA = ArmBarriers(*(torch.from_numpy(part) for part in (ORIGINS, BALLS[MOVING:], ARRAY)), 0.05)
JOINTS = RNG.uniform(*LIMITS.T, (2, 5, 7))
BALL = {"obstacles": torch.tensor([[[[0.4, 0.1, 0.5, 0.08], [0, 0, 0, 0]]]]).double()}


def test_links_are_where_the_arm_has_them() -> None:
    _, at = forward_kinematics(PANDA.origins, torch.from_numpy(JOINTS))
    np.testing.assert_allclose(at[..., 1:, :], link_positions(JOINTS), atol=1e-9)  # those are the simulator's
    single = forward_kinematics(PANDA.origins, torch.from_numpy(JOINTS).float())[1]
    np.testing.assert_allclose(single, at, atol=1e-5)


def test_it_costs_what_comes_within_the_margin() -> None:
    free, blocked = np.array([(0.6, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8), (0.0, 0.4, 0.0, -1.9, 0.0, 2.3, 0.8)])
    assert least_gaps(free, ARRAY, NO_OBSTACLES)[0] > PANDA.margin
    stays = torch.from_numpy(np.stack([np.stack([free] * 3), np.stack([blocked] * 3)]))
    costs = arm_clearance(PANDA, {PLACE: stays}, {})
    assert costs[0] == 0
    assert costs[1] > 0.5
    center = ball_centers(PANDA, torch.from_numpy(free))[-1].tolist()  # of the fingertips
    ball = {"obstacles": torch.tensor([[[[*center, 0.04]]]]).double()}
    assert arm_clearance(PANDA, {PLACE: stays[:1]}, ball)[0] > 5 * (0.04 + PANDA.margin)
    jump = torch.from_numpy(np.stack([free, free * (-1, 1, 1, 1, 1, 1, 1)]))[None]
    assert arm_clearance(PANDA, {PLACE: jump}, {})[0] > 0.1  # what lies between


def test_gradients_are_those_of_finite_differences() -> None:
    path = torch.from_numpy(JOINTS[:, :3]).requires_grad_()
    (slope,) = torch.autograd.grad(arm_clearance(PANDA, {PLACE: path}, BALL).sum(), path)
    for _ in range(5):
        change = torch.from_numpy(1e-6 * RNG.standard_normal(path.shape))
        with torch.no_grad():
            up, down = (arm_clearance(PANDA, {PLACE: path + sign * change}, BALL).sum() for sign in (1, -1))
        assert float((slope * change).sum()) == pytest.approx(float(up - down) / 2, rel=1e-3, abs=1e-9)


def test_going_down_the_gradient_frees_the_arm() -> None:
    joints = torch.tensor([[(0.0, 0.4, 0.0, -1.9, 0.0, 2.3, 0.8)] * 2]).double().requires_grad_()
    before = arm_clearance(PANDA, {PLACE: joints}, BALL)
    for _ in range(80):
        (slope,) = torch.autograd.grad(arm_clearance(PANDA, {PLACE: joints}, BALL).sum(), joints)
        joints = (joints - 0.02 * slope / slope.norm().clamp(min=1e-9)).detach().requires_grad_()
    assert arm_clearance(PANDA, {PLACE: joints}, BALL) < 0.2 * before


def test_the_goal_of_an_arm_is_all_of_its_joints() -> None:
    joints = torch.from_numpy(JOINTS)
    cost = COSTS["goal"]({PLACE: joints}, {"goal": joints[:, -1:] + 0.1})
    assert cost.tolist() == pytest.approx([0.07, 0.07])


def test_clearance_is_that_of_the_arm_where_the_environment_has_one() -> None:
    env = envs.make("diffusion_policy/PandaReach-v0")
    found = find_cost("clearance=2", env, {"joints"}, 0.05)
    paths = {PLACE: torch.from_numpy(JOINTS)}
    torch.testing.assert_close(found.cost(paths, {}), arm_clearance(PANDA, paths, {}))
    assert found.weight == 2
    env.close()

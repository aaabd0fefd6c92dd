"""PandaReach: the arm as numbers, physics, starts, goals, obstacles, modes, the expert."""

from collections.abc import Iterator
from functools import cache

import gymnasium
import numpy as np
import pytest

from diffusion_policy import envs
from diffusion_policy.datasets.collect import Demonstrator
from diffusion_policy.envs import panda_model, panda_reach_expert
from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.joint_planner import line
from diffusion_policy.envs.panda_model import LIMITS, least_gaps, tool_positions
from diffusion_policy.envs.panda_reach import GOAL_ANGLE, PandaReachEnv
from diffusion_policy.envs.panda_reach_draws import AROUND_ENDS, FREE, NO_BOXES, REGION
from diffusion_policy.envs.panda_reach_expert import ACCELERATION, PERIOD, SPEED, PandaReachExpert, find_path, plan_path
from diffusion_policy.envs.panda_scene import ARRAY, MODES, NO_OBSTACLES, OBSTACLE_RADII, mode_of
from diffusion_policy.envs.panda_world import PandaWorld
from diffusion_policy.envs.protocols import as_armed, as_drawable, as_foreseeing, as_judging, as_posable, places_of
from diffusion_policy.envs.simulation import Simulation

REACH = "diffusion_policy/PandaReach-v0"
FOLDED = (0.16, 1.38, -0.05, -2.92, -1.61, 0.51, -1.06)
"""The hand touches the arm itself."""
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def env() -> Iterator[gymnasium.Env]:
    made = envs.make(REACH)
    yield made
    made.close()


@pytest.fixture(scope="module")
def obstructed() -> Iterator[gymnasium.Env]:
    made = envs.make(REACH, obstacles=2)
    yield made
    made.close()


@cache
def world() -> PandaWorld:
    return PandaWorld(Simulation(0.01, envs.make(REACH).unwrapped._simulation._view), 1)


def run(env: gymnasium.Env, expert: PandaReachExpert, observation: dict) -> tuple[dict[str, np.ndarray], dict]:
    """What an expert's episode observes, and its last info."""
    path, done, info = [observation], False, {}
    while not done:
        observation, _, terminated, truncated, info = env.step(expert.act(observation))
        path.append(observation)
        done = terminated or truncated
    return {key: np.stack([row[key] for row in path]) for key in observation}, info


# The arm as numbers


def test_links_and_tool_are_where_the_simulator_has_them() -> None:
    simulation = world()._simulation
    for joints in RNG.uniform(*LIMITS.T, (10, 7)):
        world().put(joints)
        links = [simulation.link_position("arm", link) for link in range(7)]
        np.testing.assert_allclose(panda_model.link_positions(joints), links, atol=1e-6)
        np.testing.assert_allclose(tool_positions(joints), simulation.link_position("arm", 11), atol=1e-6)


def test_the_balls_cover_the_arm_and_little_more() -> None:
    """Where they touch nothing, the simulator's arm touches nothing; where it is 6 cm away, neither do they."""
    ball, slack = np.array([[0.45, 0.1, 0.45, 0.08]]), []
    for joints in RNG.uniform(*LIMITS.T, (150, 7)):
        gap = float(least_gaps(joints, NO_BOXES, ball)[0])
        world().stand(ball)
        world().put(joints)
        if gap > 0:
            assert not world()._simulation.is_near("arm", "ball 0 0.08", 1, gap - 0.002)
            assert not world().touches_itself()
        if 0 < gap < least_gaps(joints, NO_BOXES, NO_OBSTACLES)[0] - 0.01:  # neither table nor arm are nearest
            slack.append(world()._simulation.is_near("arm", "ball 0 0.08", 1, gap + 0.06))
    assert len(slack) > 20
    assert all(slack)


def test_what_is_free_is_what_the_simulator_says() -> None:
    joints = np.array([
        (0.6, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8),  # beside the gate
        (0.0, 0.4, 0.0, -1.9, 0.0, 2.3, 0.8),  # in the divider
        (0.6, 1.2, 0.0, -1.2, 0.0, 2.4, 0.8),  # in the table
        FOLDED,
    ])  # fmt: skip
    assert world().is_free(joints, NO_OBSTACLES).tolist() == [True, False, False, False]
    ball = np.array([[*tool_positions(joints[0]), 0.06]])
    assert world().is_free(joints[:1], ball).tolist() == [False]


# Episodes


def test_the_seed_draws_free_starts_and_goals_on_two_sides(env: gymnasium.Env) -> None:
    sides, blocked = [], []
    for seed in range(30):
        observation, info = env.reset(seed=seed)
        assert env.observation_space.contains(observation)
        ends = np.stack([observation["joints"], observation["goal"]]).astype(np.float64)
        assert least_gaps(ends, ARRAY, NO_OBSTACLES).min() >= FREE - 1e-5
        tool = tool_positions(ends)
        np.testing.assert_allclose(tool, [observation["tool"], observation["goal_tool"]], atol=1e-5)
        assert (np.abs(tool) >= REGION[:, 0] - 1e-5).all()
        assert tool[0, 1] * tool[1, 1] < 0
        assert info == {"is_success": False, "measures": {"smoothness": 0.0, "collision": 0.0}}
        sides.append(tool[0, 1] > 0)
        blocked.append(not world().is_free(line(*ends), NO_OBSTACLES).all())
    assert 0.2 < np.mean(sides) < 0.8
    assert np.mean(blocked) > 0.5  # of straight lines


def test_obstacles_block_a_demonstration_and_leave_a_way(obstructed: gymnasium.Env) -> None:
    for seed in range(3):
        observation, _ = obstructed.reset(seed=seed)
        start, goal, obstacles = (observation[key] for key in ("joints", "goal", "obstacles"))
        assert obstructed.observation_space.contains(observation)
        assert set(obstacles[:, 3].tolist()) <= set(np.float32(OBSTACLE_RADII).tolist())
        assert least_gaps(np.stack([start, goal]), NO_BOXES, obstacles).min() > AROUND_ENDS - 1e-5
        shown = [find_path(start, goal, mode) for mode in MODES]
        assert any(path is not None and least_gaps(path, NO_BOXES, obstacles).min() < 0 for path in shown)
        left = [path for path in (find_path(start, goal, mode, obstacles) for mode in MODES) if path is not None]
        assert left
        assert all(least_gaps(path, ARRAY, obstacles).min() > 0 for path in left)
        again, _ = obstructed.reset(seed=seed)
        np.testing.assert_array_equal(again["obstacles"], obstacles)


def test_what_is_given_is_not_drawn(obstructed: gymnasium.Env) -> None:
    start, goal = (0.6, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8), (-0.6, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8)
    ball = (0.3, 0.0, 0.3, 0.06)
    observation, _ = obstructed.reset(seed=0, options={"start": start, "goal": goal, "obstacles": [ball]})
    np.testing.assert_array_equal(observation["joints"], np.float32(start))
    np.testing.assert_array_equal(observation["goal"], np.float32(goal))
    np.testing.assert_array_equal(observation["obstacles"], np.float32([ball, (0, 0, 0, 0)]))


@pytest.mark.parametrize("options, said", [
    ({"start": (0.0,) * 6}, r"a start is seven joint angles \[rad\] at which nothing is touched; got \(0.0"),
    ({"goal": (0.0, 0.4, 0.0, -1.9, 0.0, 2.3, 0.8)}, "a goal is seven joint angles"),
    ({"goal": "there"}, "a goal is seven .* got 'there'"),
    ({"obstacles": [(0.5, 0.0)]}, r"obstacles are rows x, y, z, radius \[m\]; got"),
    ({"obstacles": [(0.5, 0.0, 0.3, 0.3)]}, "an obstacle is a ball with a radius of 0.04, 0.06, 0.08 m; got"),
    ({"obstacles": [(0.5, 0.0, 0.9, 0.04)] * 3}, "the environment has places for 2 obstacles; got 3"),
    ({"start": (0.6, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8), "goal": (-0.6, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8),
      "obstacles": [(0.3, 0.2, 0.4, 0.08)]}, "obstacles touch start or goal"),
])  # fmt: skip
def test_what_cannot_be_given_is_named(obstructed: gymnasium.Env, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        obstructed.reset(seed=0, options=options)


@pytest.mark.parametrize("count", [-1, 5, 1.5, "2", True, None])
def test_other_numbers_of_obstacles_are_refused(count: object) -> None:
    with pytest.raises(ValueError, match=f"obstacles must be a whole number of 0 to 4; got {count!r}"):
        envs.make(REACH, obstacles=count)


# Physics


@pytest.mark.parametrize("wanted, where", [
    ((0.0, 0.4, 0.0, -1.9, 0.0, 2.3, 0.8), "the divider"),
    ((0.6, 1.3, 0.0, -1.0, 0.0, 2.3, 0.8), "the table"),
])  # fmt: skip
def test_a_touch_ends_the_episode(env: gymnasium.Env, wanted: tuple, where: str) -> None:
    env.reset(seed=0, options={"start": (0.6, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8)})
    terminated, info = False, {}
    for _ in range(30):
        _, reward, terminated, _, info = env.step(np.array(wanted))
        if terminated:
            break
    assert terminated, where
    assert (reward, info["is_success"], info["measures"]["collision"]) == (0, False, 1.0)


def test_the_arm_that_touches_itself_ends_the_episode(env: gymnasium.Env) -> None:
    env.reset(seed=0)
    env.unwrapped._world.put(np.array(FOLDED))
    _, reward, terminated, _, info = env.step(np.array(FOLDED))
    assert (reward, terminated, info["measures"]["collision"]) == (0, True, 1.0)


def test_touching_an_obstacle_ends_the_episode(obstructed: gymnasium.Env) -> None:
    start, wanted = np.array([(0.6, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8), (1.2, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8)])
    touched = []
    for balls in ([(*tool_positions(wanted), 0.04)], []):
        obstructed.reset(seed=0, options={"start": start, "obstacles": balls})
        steps = [obstructed.step(wanted)[2] for _ in range(10)]
        touched.append(any(steps))
    assert touched == [True, False]  # and where it was, nothing is left


@pytest.mark.parametrize("touching", [False, True])
def test_a_saved_state_goes_on_to_the_bit_whatever_is_planned_and_judged(env: gymnasium.Env, touching: bool) -> None:
    task = env.unwrapped
    assert isinstance(task, PandaReachEnv)
    observation, _ = env.reset(seed=5)
    wanted = np.array((0.0, 0.5, 0.0, -1.9, 0.0, 2.3, 0.8)) if touching else observation["joints"] + 0.1
    for _ in range(12 if touching else 3):
        task.step(wanted)
    saved = task.save_state()
    onward = [task.step(wanted + 0.01 * i) for i in range(6)]
    env.reset(seed=6)
    task.step(wanted)
    task.restore_state(saved)
    plan_path(observation["joints"], observation["goal"], "over")
    task.judge(observation, np.broadcast_to(wanted, (2, 4, 7)))
    for i, (observation, reward, terminated, _, info) in enumerate(onward):
        again = task.step(wanted + 0.01 * i)
        assert (again[1], again[2], again[4]) == (reward, terminated, info)
        for key, value in observation.items():
            np.testing.assert_array_equal(again[0][key], value)


def test_what_is_foreseen_comes_about(env: gymnasium.Env) -> None:
    observation, _ = env.reset(seed=0)
    foreseeing = as_foreseeing(env)
    assert foreseeing is not None
    before, *_ = env.step(observation["joints"] + 0.05)
    history = {key: np.stack([observation[key], before[key]])[None] for key in observation}
    actions = observation["joints"] + np.array([0.1, 0.15, 0.12])[:, None]
    ahead = foreseeing.roll_forward(history, actions[None])
    last, now = before, before
    for action in actions:
        last, now = now, env.step(action)[0]
    for key in observation:
        tolerance = 0.06 if key == "velocities" else 0.01
        np.testing.assert_allclose(ahead[key][0], np.stack([last[key], now[key]]), atol=tolerance)
    with pytest.raises(ValueError, match="what a camera will see cannot be foreseen"):
        foreseeing.roll_forward({**history, "image": np.zeros((1, 2, 8, 8, 3))}, actions[None])


# What a trajectory means, and the expert


@pytest.mark.parametrize("xs, zs, mode", [
    ((0.4, 0.4), (0.3, 0.3), "near"),
    ((0.6, 0.6), (0.4, 0.4), "through"),
    ((0.6, 0.6), (0.8, 0.8), "over"),
    ((0.3, 0.7), (0.4, 0.4), "through"),  # it crosses the plane at x = 0.5
])  # fmt: skip
def test_the_mode_is_where_the_tool_crosses_the_plane_of_the_gate(xs: tuple, zs: tuple, mode: str) -> None:
    path = np.array([(xs[0], 0.3, zs[0]), (xs[1], -0.3, zs[1])])
    assert mode_of(path) == mode_of(path[::-1]) == mode
    assert mode_of(path[:1]) is None
    assert mode_of(np.concatenate([path, path[:1]])) is None  # it goes back


def test_the_expert_shows_every_mode_without_touching(env: gymnasium.Env) -> None:
    lengths = []
    for seed in range(9):
        observation, _ = env.reset(seed=seed)
        mode = MODES[seed % 3]
        path, info = run(env, PandaReachExpert(mode), observation)
        assert info["is_success"], (seed, mode)
        assert env.unwrapped.mode(path) == mode
        assert 1.0 <= info["measures"]["path_ratio"] < 3.5
        assert np.abs(path["joints"][-1] - path["goal"][-1]).max() <= GOAL_ANGLE
        lengths.append(len(path["joints"]) - 1)
    assert max(lengths) <= 64
    assert env.unwrapped.mode({key: rows[:3] for key, rows in path.items()}) is None


def test_the_expert_goes_around_obstacles(obstructed: gymnasium.Env) -> None:
    for seed in range(3):
        observation, _ = obstructed.reset(seed=seed)
        mode = obstructed.unwrapped.modes_that_solve(observation)[0]
        path, info = run(obstructed, PandaReachExpert(mode), observation)
        assert info["is_success"]
        assert obstructed.unwrapped.mode(path) == mode


def test_a_plan_is_at_rest_at_its_ends_and_keeps_its_limits(env: gymnasium.Env) -> None:
    for seed in range(4):
        observation, _ = env.reset(seed=seed)
        plan = plan_path(observation["joints"], observation["goal"], MODES[seed % 3])
        np.testing.assert_allclose(plan[[0, -1]], [observation["joints"], observation["goal"]], atol=1e-6)
        velocity = np.diff(plan, axis=0) / PERIOD
        assert np.linalg.norm(velocity, axis=1).max() <= SPEED + 1e-6
        assert np.linalg.norm(velocity[[0, -1]], axis=1).max() <= ACCELERATION * PERIOD
        assert np.linalg.norm(np.diff(velocity, axis=0) / PERIOD, axis=1).max() <= 2.0 * ACCELERATION
        assert world().is_free(plan, NO_OBSTACLES).all()


def test_the_same_question_has_the_same_answer(env: gymnasium.Env) -> None:
    observation, _ = env.reset(seed=2)
    first = plan_path(observation["joints"], observation["goal"], "near")
    panda_reach_expert._plan.cache_clear()
    np.testing.assert_array_equal(plan_path(observation["joints"], observation["goal"], "near"), first)


@pytest.mark.parametrize("mode", ["", "under", "near-over"])
def test_unknown_modes_are_refused(env: gymnasium.Env, mode: str) -> None:
    with pytest.raises(ValueError, match=f"unknown mode '{mode}'; choose from near, through, over"):
        PandaReachExpert(mode)
    observation, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=f"no path of the mode '{mode}' was found"):
        plan_path(observation["joints"], observation["goal"], mode)


def test_demonstrations_survive_noise() -> None:
    demonstrator = Demonstrator(EnvSpec(REACH, {}), PandaReachExpert, 0.1)
    shown = [demonstrator(seed) for seed in range(4)]
    assert all(episode.success and episode.mode in MODES for episode in shown)
    demonstrator.close()


def test_plans_are_judged_as_they_are(env: gymnasium.Env) -> None:
    judging = as_judging(env)
    assert judging is not None
    observation, _ = env.reset(seed=1)
    start, goal = (observation[key].astype(np.float64) for key in ("joints", "goal"))
    for mode in MODES:
        path = plan_path(start, goal, mode)
        (verdict,) = judging.judge(observation, path[None, 1:])
        assert (verdict.valid, verdict.mode) == (True, mode)
        assert 1 < verdict.ratio < 3.5
    stays, jump = np.broadcast_to(start, (2, 7)), np.stack([start, goal])
    verdicts = judging.judge(observation, np.stack([stays, jump]))
    assert [verdict.valid for verdict in verdicts] == [False, False]  # what lies between is looked at
    assert verdicts[1].ratio == pytest.approx(1)


def test_all_that_our_tasks_offer_is_found(obstructed: gymnasium.Env) -> None:
    observation, _ = obstructed.reset(seed=1)
    task, armed, posable = as_drawable(obstructed), as_armed(obstructed), as_posable(obstructed)
    assert task is not None
    assert armed is not None
    assert posable is not None
    assert armed.arm.origins.shape == (7, 4)
    goal, *obstacles = places_of(task, observation)
    np.testing.assert_allclose(np.mean(goal[0], axis=0), observation["goal_tool"][:2], atol=1e-6)
    assert len(obstacles) == 2
    other, _ = obstructed.reset(seed=2)
    posed = posable.pose({key: observation[key] for key in posable.pose_keys})
    for key, value in posed.items():
        np.testing.assert_allclose(value, observation[key], atol=1e-6)
    plan = task.planned_path(other, np.zeros((3, 4, 7)))
    np.testing.assert_allclose(plan[:, 0], np.broadcast_to(other["tool"][:2], (3, 2)), atol=1e-5)

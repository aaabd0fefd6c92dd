"""Maze: physics, starts, goals, obstacles, modes, the expert."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import gymnasium
import numpy as np
import pytest

from diffusion_policy import envs
from diffusion_policy.datasets.collect import Demonstrator, disturb
from diffusion_policy.envs import maze_map
from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.maze import GOAL_RADIUS, GOAL_SPEED, MazeEnv
from diffusion_policy.envs.maze_draws import APART, BLOCKED, FREE, OBSTACLE_RADII
from diffusion_policy.envs.maze_expert import ACCELERATION, PERIOD, SPEED, MazeExpert, plan_path
from diffusion_policy.envs.maze_map import DISC_RADIUS, MODES
from diffusion_policy.envs.maze_paths import shortest_length
from diffusion_policy.envs.protocols import (
    as_drawable,
    as_foreseeing,
    as_multimodal,
    as_pictured,
    as_posable,
    places_of,
)

MAZE = "diffusion_policy/Maze-v0"


@pytest.fixture
def env() -> Iterator[gymnasium.Env]:
    made = envs.make(MAZE)
    yield made
    made.close()


@pytest.fixture
def obstructed() -> Iterator[gymnasium.Env]:
    made = envs.make(MAZE, obstacles=2)
    yield made
    made.close()


def run(env: gymnasium.Env, expert: MazeExpert, observation: dict) -> tuple[dict[str, np.ndarray], dict]:
    """What an expert's episode observes, and its last info."""
    path, done, info = [observation], False, {}
    while not done:
        observation, _, terminated, truncated, info = env.step(expert.act(observation))
        path.append(observation)
        done = terminated or truncated
    return {key: np.stack([row[key] for row in path]) for key in observation}, info


# Episodes


def test_the_seed_draws_free_starts_and_goals_with_several_ways(env: gymnasium.Env) -> None:
    starts = []
    for seed in range(40):
        observation, info = env.reset(seed=seed)
        start, goal = observation["position"], observation["goal"]
        assert env.observation_space.contains(observation)
        assert maze_map.wall_distance(np.stack([start, goal])).min() >= FREE - 1e-6
        assert np.linalg.norm(goal - start) >= APART - 1e-6
        assert len(env.unwrapped.classes(start, goal)) >= 2
        assert env.unwrapped.modes_that_solve(observation) == env.unwrapped.classes(start, goal)
        assert info == {"is_success": False, "measures": {"smoothness": 0.0, "collision": 0.0}}
        starts.append(start)
    assert np.std(starts, axis=0).min() > 0.8  # all over the room


def test_obstacles_block_shortest_ways_and_leave_one(obstructed: gymnasium.Env) -> None:
    task = obstructed.unwrapped
    for seed in range(15):
        observation, _ = obstructed.reset(seed=seed)
        start, goal, obstacles = observation["position"], observation["goal"], observation["obstacles"]
        assert obstructed.observation_space.contains(observation)
        assert set(obstacles[:, 2].tolist()) <= set(np.float32(OBSTACLE_RADII).tolist())
        assert (maze_map.wall_distance(obstacles[:, :2]) >= obstacles[:, 2] - 1e-6).all()
        left = task.modes_that_solve(observation)
        assert left
        plans = [plan_path(start, goal, mode) for mode in task.classes(start, goal)]
        blocked = [maze_map.disc_distance(plan, obstacles).min() < DISC_RADIUS + 0.1 for plan in plans]
        assert np.mean(blocked) >= BLOCKED
        for mode in left:
            assert maze_map.clearance(plan_path(start, goal, mode, obstacles), obstacles) > 0.01


def test_another_process_draws_the_same(obstructed: gymnasium.Env) -> None:
    code = f"""
from diffusion_policy import envs
env = envs.make("{MAZE}", obstacles=2)
for seed in (3, 9):
    print(*(rows.tobytes().hex() for rows in env.reset(seed=seed)[0].values()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [" ".join(rows.tobytes().hex() for rows in obstructed.reset(seed=seed)[0].values()) for seed in (3, 9)]
    assert done.stdout.split("\n")[:2] == here


def test_what_is_given_is_not_drawn(obstructed: gymnasium.Env) -> None:
    options = {"start": (-1.7, -1.7), "goal": (1.7, 1.7), "obstacles": [(0.5, 0.0, 0.15)]}
    observation, _ = obstructed.reset(seed=0, options=options)
    np.testing.assert_array_equal(observation["position"], np.float32(options["start"]))
    np.testing.assert_array_equal(observation["goal"], np.float32(options["goal"]))
    np.testing.assert_array_equal(observation["obstacles"], np.float32([(0.5, 0.0, 0.15), (0, 0, 0)]))
    observation, _ = obstructed.reset(seed=0, options={"goal": (1.7, 1.7), "obstacles": []})
    assert not observation["obstacles"].any()
    np.testing.assert_array_equal(observation["goal"], np.float32((1.7, 1.7)))


@pytest.mark.parametrize("options, said", [
    ({"start": (0.0, 0.0)}, r"a start is x, y \[m\], more than 0.1 m from the walls; got \(0.0, 0.0\)"),
    ({"goal": (1.95, 0.0)}, "a goal is x, y"),
    ({"goal": "there"}, "a goal is x, y .* got 'there'"),
    ({"obstacles": [(0.5, 0.0)]}, r"obstacles are rows x, y, radius \[m\]; got"),
    ({"obstacles": [(0.5, 0.0, 0.3)]}, "an obstacle stands in the room with a radius of 0.1, 0.15, 0.2 m; got"),
    ({"obstacles": [(0.5, 0.0, 0.1)] * 3}, "the environment has places for 2 obstacles; got 3: make it with more"),
    ({"start": (-1.7, -1.7), "goal": (1.7, 1.7), "obstacles": [(-1.6, -1.6, 0.2)]}, "no way is left for the disc"),
])  # fmt: skip
def test_what_cannot_be_given_is_named(obstructed: gymnasium.Env, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        obstructed.reset(seed=0, options=options)


@pytest.mark.parametrize("count", [-1, 7, 1.5, "2", True, None])
def test_other_numbers_of_obstacles_are_refused(count: object) -> None:
    with pytest.raises(ValueError, match=f"obstacles must be a whole number of 0 to 6; got {count!r}"):
        envs.make(MAZE, obstacles=count)


# Physics


def test_the_disc_comes_to_rest_where_it_is_wanted(env: gymnasium.Env) -> None:
    env.reset(seed=0, options={"start": (-1.7, 0.0), "goal": (1.7, 1.7)})
    wanted = np.array([-1.7, 0.5], np.float32)
    ys = []
    for _ in range(25):
        observation, *_ = env.step(wanted)
        ys.append(float(observation["position"][1]))
    assert all(after >= before - 1e-4 for before, after in pairwise(ys))  # without overshoot
    np.testing.assert_allclose(observation["position"], wanted, atol=1e-3)
    np.testing.assert_allclose(observation["velocity"], 0, atol=1e-2)


def test_speed_is_bounded(env: gymnasium.Env) -> None:
    env.reset(seed=0, options={"start": (-1.7, -1.7), "goal": (1.7, 1.7)})
    speeds = [np.linalg.norm(env.step(np.array([-1.7, 1.7]))[0]["velocity"]) for _ in range(15)]
    assert 1.4 < max(speeds) <= 1.5 + 1e-3


@pytest.mark.parametrize("wanted, gap", [((-0.05, 0.0), 0.1), ((-2.0, -1.6), 0.1)])
def test_touching_a_wall_ends_the_episode(env: gymnasium.Env, wanted: tuple, gap: float) -> None:
    observation, _ = env.reset(seed=0, options={"start": (-0.6, -0.5), "goal": (1.7, 1.7)})
    terminated = False
    for _ in range(40):
        observation, reward, terminated, _, info = env.step(np.array(wanted))
        if terminated:
            break
    assert terminated
    assert (reward, info["is_success"], info["measures"]["collision"]) == (0, False, 1.0)
    assert maze_map.wall_distance(observation["position"]) == pytest.approx(gap, abs=0.006)


def test_touching_an_obstacle_ends_the_episode(obstructed: gymnasium.Env) -> None:
    options = {"start": (-1.7, 1.0), "goal": (1.7, 1.7), "obstacles": [(-1.7, 1.7, 0.15)]}
    obstructed.reset(seed=0, options=options)
    for _ in range(20):
        observation, _, terminated, _, info = obstructed.step(np.array([-1.7, 1.7]))
        if terminated:
            break
    assert info["measures"]["collision"] == 1
    assert observation["position"][1] == pytest.approx(1.45, abs=0.006)
    obstructed.reset(seed=0, options={**options, "obstacles": []})  # and where it stood, nothing is left
    for _ in range(20):
        observation, _, terminated, _, info = obstructed.step(np.array([-1.7, 1.7]))
        assert not terminated
    assert observation["position"][1] == pytest.approx(1.7, abs=0.01)


def test_success_is_to_rest_at_the_goal(env: gymnasium.Env) -> None:
    env.reset(seed=0, options={"start": (-1.7, -1.0), "goal": (-1.7, 0.0)})
    passed = False
    for _ in range(20):
        observation, reward, terminated, _, info = env.step(np.array([-1.7, 0.0]))
        near = np.linalg.norm(observation["position"] - observation["goal"]) <= GOAL_RADIUS
        slow = np.linalg.norm(observation["velocity"]) <= GOAL_SPEED
        assert info["is_success"] == terminated == bool(near and slow) == bool(reward)
        passed = passed or (near and not slow)
        if terminated:
            break
    assert terminated
    assert passed


@pytest.mark.parametrize("touching", [False, True])
def test_a_saved_state_goes_on_to_the_bit_after_other_episodes(obstructed: gymnasium.Env, touching: bool) -> None:
    task = obstructed.unwrapped
    assert isinstance(task, MazeEnv)
    observation, _ = obstructed.reset(seed=5)
    place = observation["position"] + (3.0, 0.1) if touching else observation["position"] + (0.1, 0.05)
    wanted = np.clip(place, -2, 2).astype(np.float32)
    for _ in range(20 if touching else 4):
        task.step(wanted)
    saved = task.save_state()
    onward = [task.step(wanted + np.float32(0.01 * i)) for i in range(10)]
    obstructed.reset(seed=6)
    task.step(wanted)
    task.restore_state(saved)
    for i, (observation, reward, terminated, _, info) in enumerate(onward):
        again = task.step(wanted + np.float32(0.01 * i))
        assert (again[1], again[2], again[4]) == (reward, terminated, info)
        for key, value in observation.items():
            np.testing.assert_array_equal(again[0][key], value)


# What a trajectory means


def test_the_expert_shows_every_class_without_touching(env: gymnasium.Env) -> None:
    lengths, shown = [], set()
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        modes = env.unwrapped.modes_that_solve(observation)
        mode = modes[seed % len(modes)]
        path, info = run(env, MazeExpert(mode), observation)
        assert info["is_success"]
        assert env.unwrapped.mode(path) == mode
        assert 1.0 <= info["measures"]["path_ratio"] < 1.8
        assert maze_map.clearance(path["position"]) > 0.03
        lengths.append(len(path["position"]) - 1)
        shown.add(mode)
    assert max(lengths) <= 128
    assert len(shown) > 8


def test_the_expert_goes_around_obstacles(obstructed: gymnasium.Env) -> None:
    for seed in range(10):
        observation, _ = obstructed.reset(seed=seed)
        mode = obstructed.unwrapped.modes_that_solve(observation)[0]
        path, info = run(obstructed, MazeExpert(mode), observation)
        assert info["is_success"]
        assert obstructed.unwrapped.mode(path) == mode


def test_a_plan_is_at_rest_at_its_ends_and_keeps_its_limits(env: gymnasium.Env) -> None:
    for seed in range(10):
        observation, _ = env.reset(seed=seed)
        mode = env.unwrapped.modes_that_solve(observation)[-1]
        plan = plan_path(observation["position"], observation["goal"], mode)
        np.testing.assert_allclose(plan[[0, -1]], [observation["position"], observation["goal"]], atol=1e-6)
        velocity = np.diff(plan, axis=0) / PERIOD
        assert np.linalg.norm(velocity, axis=1).max() <= SPEED + 1e-6
        assert np.linalg.norm(velocity[[0, -1]], axis=1).max() <= ACCELERATION * PERIOD
        assert np.linalg.norm(np.diff(velocity, axis=0) / PERIOD, axis=1).max() <= 1.5 * ACCELERATION
        assert maze_map.class_of(plan) == mode
        assert maze_map.clearance(plan) > 0.05


def test_the_longest_plan_fits_into_128_steps(env: gymnasium.Env) -> None:
    task = env.unwrapped
    for ends in [((-1.75, -1.75), (1.75, 1.75)), ((-1.75, 1.75), (1.75, -1.75)), ((1.75, 1.5), (-1.75, -1.5))]:
        start, goal = np.array(ends)
        assert max(len(plan_path(start, goal, mode)) for mode in task.classes(start, goal)) <= 128


@pytest.mark.parametrize("mode", ["", "F", "A-a", "above"])
def test_unknown_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"unknown mode '{mode}'; choose from below, A, a"):
        MazeExpert(mode)


def test_a_way_that_is_not_there_is_named(env: gymnasium.Env) -> None:
    observation, _ = env.reset(seed=0, options={"start": (-1.7, 1.0), "goal": (-1.7, -1.0)})
    with pytest.raises(ValueError, match="no way of the class 'A-C-B' leads from"):
        MazeExpert("A-C-B").act(observation)


def test_demonstrations_survive_noise_which_is_a_share_of_what_an_action_changes() -> None:
    demonstrator = Demonstrator(EnvSpec(MAZE, {}), MazeExpert, 0.2)
    shown = [demonstrator(seed) for seed in range(8)]
    assert all(episode.success and episode.mode in MODES for episode in shown)
    demonstrator.close()
    place = np.array([1.0, 1.0], np.float32)
    assert disturb(place, 0.5, np.random.default_rng(0), place).tolist() == place.tolist()
    moved = disturb(place, 0.5, np.random.default_rng(0), place - 0.1) - place
    assert 0 < np.linalg.norm(moved) < 0.3


def test_no_mode_before_the_goal_or_by_a_way_that_is_none(env: gymnasium.Env) -> None:
    mode = env.unwrapped.mode
    path = np.array([(-1.7, 1.7), (0.0, 1.7), (0.4, 0.5), (-0.5, 0.5)])
    assert mode({"position": path, "goal": np.full((4, 2), 1.7)}) is None
    assert mode({"position": path, "goal": np.broadcast_to(path[-1] + 0.05, (4, 2))}) == "A-e"
    around = np.array([(0.4, 0.5), (0.4, -0.5), (-0.5, -0.5), (-0.5, 0.5)])
    twice = np.concatenate([path, around, around])
    assert mode({"position": twice, "goal": np.broadcast_to(twice[-1], (12, 2))}) is None


def test_all_that_our_tasks_offer_is_found(obstructed: gymnasium.Env) -> None:
    observation, _ = obstructed.reset(seed=1)
    task = as_drawable(obstructed)
    assert task is not None
    assert None not in (as_multimodal(obstructed), as_pictured(obstructed), as_foreseeing(obstructed))
    assert len(task.scene.places) == len(maze_map.BLOCKS)
    goal, *obstacles = places_of(task, observation)
    np.testing.assert_allclose(np.mean(goal[0], axis=0), observation["goal"], atol=1e-6)
    assert len(obstacles) == 2
    posable = as_posable(obstructed)
    assert posable is not None
    other, _ = obstructed.reset(seed=2)
    posed = posable.pose({key: observation[key] for key in posable.pose_keys})
    for key, value in posed.items():
        np.testing.assert_array_equal(value, observation[key])
    plan = task.planned_path(other, np.zeros((3, 4, 2)))
    np.testing.assert_array_equal(plan[:, 0], np.broadcast_to(other["position"], (3, 2)))


def test_what_is_foreseen_comes_about(env: gymnasium.Env) -> None:
    observation, _ = env.reset(seed=0, options={"start": (-1.7, -1.0), "goal": (1.7, 1.7)})
    before, _, *_ = env.step(np.array([-1.7, -0.9]))
    history = {key: np.stack([observation[key], before[key]])[None] for key in observation}
    actions = np.array([(-1.68, -0.8), (-1.66, -0.7), (-1.7, -0.6)])
    ahead = env.unwrapped.roll_forward(history, actions[None])
    for action in actions:
        last, now = before, env.step(action)[0]
        before = now
    for key in observation:
        np.testing.assert_allclose(ahead[key][0], np.stack([last[key], now[key]]), atol=2e-3)
    with pytest.raises(ValueError, match="what a camera will see cannot be foreseen"):
        env.unwrapped.roll_forward({**history, "image": np.zeros((1, 2, 8, 8, 3))}, actions[None])


def test_measures_are_those_of_the_path(env: gymnasium.Env) -> None:
    observation, _ = env.reset(seed=4)
    path, info = run(env, MazeExpert(env.unwrapped.modes_that_solve(observation)[0]), observation)
    xy = path["position"].astype(np.float64)
    steps = np.diff(np.concatenate([xy[:1], xy]), axis=0)  # it begins at rest
    acceleration = np.diff(steps, axis=0) / PERIOD**2
    assert info["measures"]["smoothness"] == pytest.approx((acceleration**2).sum(1).mean(), rel=1e-3)
    left = np.linalg.norm(xy[-1] - path["goal"][-1])
    length = np.linalg.norm(steps, axis=1).sum() + left
    shortest = shortest_length(xy[0], path["goal"][0].astype(np.float64))
    assert info["measures"]["path_ratio"] == pytest.approx(length / shortest, rel=1e-5)

"""Goals that differ from episode to episode: Push-T's pose, Avoid's gate."""

from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

from diffusion_policy import envs
from diffusion_policy.datasets.collect import Demonstrator
from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.avoid import FINISH_Y, ROWS, TILE, gate_x
from diffusion_policy.envs.experts import AvoidExpert
from diffusion_policy.envs.protocols import as_drawable, as_foreseeing, as_posable, places_of
from diffusion_policy.envs.push_t_block import FIXED_GOAL, GOAL_MARGIN, SIZE, draw_goal, goal_place, keypoints
from diffusion_policy.evaluation.pool import EnvironmentPool

AVOID, PUSH_T = "diffusion_policy/Avoid-v0", "diffusion_policy/PushT-v0"
needs_push_t = pytest.mark.skipif(find_spec("gym_pusht") is None, reason="gym-pusht is not installed")

# Push-T


@pytest.fixture
def push_t() -> object:
    return envs.make(PUSH_T, goal="random", image_size=96).unwrapped


@needs_push_t
def test_the_seed_draws_the_goal_and_nothing_else_changes(push_t: object) -> None:
    plain = envs.make(PUSH_T).unwrapped
    goals = []
    for seed in (3, 4, 3):
        observation, _ = push_t.reset(seed=seed)
        np.testing.assert_array_equal(observation["state"], plain.reset(seed=seed)[0]["state"])
        assert push_t.observation_space.contains(observation)
        goals.append(observation["goal"])
    np.testing.assert_array_equal(goals[0], goals[2])
    assert not np.allclose(goals[0], goals[1])
    push_t.reset(seed=3)
    drawn = [push_t.reset()[0]["goal"] for _ in range(2)]
    push_t.reset(seed=3)
    np.testing.assert_array_equal(drawn, [push_t.reset()[0]["goal"] for _ in range(2)])
    assert "goal" not in plain.reset(seed=3)[0]


def test_every_goal_leaves_room_for_the_agent() -> None:
    random = np.random.default_rng(0)
    goals = np.array([draw_goal(random) for _ in range(500)])
    assert ((goals[:, 2] >= 0) & (goals[:, 2] < 2 * np.pi)).all()
    corners = np.array([goal_place(goal)[0] for goal in goals])
    wall = 5
    assert corners.min() - wall > 30  # the agent's diameter
    assert SIZE - wall - corners.max() > 30
    center = keypoints(np.concatenate([np.zeros((500, 2)), goals], axis=1)).mean(axis=1)
    assert center.std(axis=0).min() > (SIZE - 2 * GOAL_MARGIN) / 5  # they are all over the plane


@needs_push_t
def test_coverage_and_success_are_of_the_wanted_goal(push_t: object) -> None:
    goal = (180.0, 300.0, 1.0)
    at_home = {"state": (400.0, 100.0, *goal), "goal": goal}
    observation, info = push_t.reset(options=at_home)
    np.testing.assert_allclose(observation["goal"], goal, rtol=1e-6)
    assert (info["is_success"], info["measures"]["final_coverage"] > 0.99) == (True, True)
    *_, terminated, _, info = push_t.step(np.array([400.0, 100.0]))
    assert (terminated, info["is_success"]) == (True, True)
    _, info = push_t.reset(options=at_home | {"goal": (300.0, 300.0, 1.0 - 2 * np.pi)})
    assert info["measures"]["final_coverage"] < 0.3
    assert push_t.reset(options=at_home | {"goal": (300.0, 300.0, 1.0 - 2 * np.pi)})[0]["goal"][2] == pytest.approx(1.0)
    push_t.reset(seed=0)
    assert not np.allclose(push_t._simulation.goal_pose, goal)  # one that was given holds for its episode alone


@needs_push_t
def test_the_picture_and_each_episode_show_its_goal(push_t: object) -> None:
    state = (30.0, 30.0, 400.0, 80.0, 0.0)
    one = push_t.reset(options={"state": state, "goal": (150.0, 200.0, 0.0)})[0]
    other = push_t.reset(options={"state": state, "goal": (350.0, 300.0, 2.0)})[0]
    for observation in (one, other):
        green = np.argwhere((observation["image"] == (144, 238, 144)).all(axis=-1))[:, ::-1] * SIZE / 96
        corners = np.array(goal_place(observation["goal"].astype(float))[0])
        assert (green >= corners.min(axis=0) - 8).all()
        assert (green <= corners.max(axis=0) + 8).all()
        assert len(green) > 150
        assert places_of(push_t, observation) == (goal_place(observation["goal"].astype(float)),)
    assert as_drawable(push_t) is push_t
    assert push_t.scene.places == ()
    fixed = envs.make(PUSH_T).unwrapped
    assert fixed.scene.places == (goal_place(FIXED_GOAL),)
    assert places_of(fixed, {}) == ()


@needs_push_t
def test_a_saved_state_and_a_pose_have_their_goal(push_t: object) -> None:
    push_t.reset(seed=1)
    push_t.step(np.array([200.0, 200.0]))
    saved = push_t.save_state()
    expected, *_ = push_t.step(np.array([250.0, 250.0]))
    push_t.reset(seed=2)
    push_t.restore_state(saved)
    found, *_ = push_t.step(np.array([250.0, 250.0]))
    posable = as_posable(push_t)
    assert posable.pose_keys == ("state", "goal")
    push_t.reset(seed=5)
    posed = posable.pose(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
        np.testing.assert_allclose(posed[key].astype(float), value, atol=1e-3)


@needs_push_t
@pytest.mark.parametrize("goal", [(1, 2), (1, 2, np.nan), (-1, 2, 0), (1, 600, 0), "there", None])
def test_a_goal_that_is_none_is_refused(push_t: object, goal: object) -> None:
    with pytest.raises(ValueError, match=r"a goal is x, y between 0 and 512 \[px\] and a finite angle \[rad\]; got"):
        push_t.reset(options={"goal": goal})


@needs_push_t
def test_wrong_arguments_of_push_t_are_named() -> None:
    with pytest.raises(ValueError, match="unknown goal 'anywhere'; choose from fixed, random"):
        envs.make(PUSH_T, goal="anywhere")
    with pytest.raises(ValueError, match="the goal is fixed; make the environment with goal='random'"):
        envs.make(PUSH_T).reset(options={"goal": (256, 256, 0)})


# Avoid


def cross(env: object, gate: str) -> tuple[dict, bool, dict]:
    """Finish through a gate of the only row, straight; what the last step gives: observation, end, info."""
    expert, ended = AvoidExpert(gate), False
    observation, _ = env.reset(seed=0, options={"goal": "left"})
    while not ended:
        observation, _, terminated, truncated, info = env.step(expert.act(observation))
        ended = terminated or truncated
    return observation, terminated, info


def test_only_the_wanted_gate_is_a_success() -> None:
    env = envs.make(AVOID, rows=1, goal=True)
    observation, terminated, info = cross(env, "left")
    assert (observation["goal"].tolist(), terminated, info["is_success"]) == ([1, 0], True, True)
    observation, terminated, info = cross(env, "right")
    assert observation["actual_xy"][1] > FINISH_Y
    assert (terminated, info) == (True, {"is_success": False, "collision": False})
    assert env.unwrapped.modes == ("left", "right")


def test_the_seed_draws_a_gate_of_the_last_row_in_any_process() -> None:
    env, plain = envs.make(AVOID, rows=3, goal=True), envs.make(AVOID, rows=3)
    seen = [env.reset(seed=seed)[0]["goal"] for seed in range(24)]
    assert all(goal.shape == (4,) and goal.sum() == 1 for goal in seen)
    assert np.sum(seen, axis=0).min() > 1
    for seed in range(3):
        one, other = env.reset(seed=seed)[0], plain.reset(seed=seed)[0]
        assert env.observation_space.contains(one)
        for key, value in other.items():
            np.testing.assert_array_equal(one[key], value)
    with EnvironmentPool(partial(envs.make, AVOID, rows=3, goal=True), 2) as pool:
        starts = pool.reset({0: 7, 1: 8})
    for slot, seed in ((0, 7), (1, 8)):
        np.testing.assert_array_equal(starts[slot]["goal"], seen[seed])


def test_the_last_crossing_of_the_last_row_counts() -> None:
    env = envs.make(AVOID, rows=1, goal=True, fixed_start=True).unwrapped
    env.reset(seed=0, options={"goal": "right"})
    row, passage = ROWS[0], env._passage
    way = [(0.4, row.y - 0.1), (0.4, row.y + 0.1), (0.4, row.y - 0.1), (0.6, row.y - 0.1), (0.6, row.y + 0.1)]
    rights = []
    for xy in way:
        passage = passage.after(row, np.array(xy))
        rights.append(passage.is_right)
    assert rights == [False, False, False, False, True]


def test_demonstrations_go_through_the_wanted_gate() -> None:
    demonstrator = Demonstrator(EnvSpec(AVOID, {"rows": 2, "goal": True}), AvoidExpert, 0.0)
    gates = ROWS[1].gates
    shown = [demonstrator(seed) for seed in range(8)]
    demonstrator.close()
    for one in shown:
        assert one.success
        assert one.mode.split("-")[-1] == gates[int(one.data["goal"][0].argmax())]
        assert (one.data["goal"] == one.data["goal"][0]).all()
    assert len({one.mode for one in shown}) > 3


def test_the_wanted_gate_is_seen_drawn_and_restored() -> None:
    env = envs.make(AVOID, rows=1, goal=True, image_size=96).unwrapped
    images = {}
    for gate in ROWS[0].gates:
        observation, _ = env.reset(seed=0, options={"goal": gate})
        images[gate] = observation["image"]
        ((corners, _),) = places_of(env, observation)
        np.testing.assert_allclose(np.mean(corners, axis=0), (gate_x(ROWS[0], gate), ROWS[0].y))
        assert np.ptp(corners, axis=0) == pytest.approx(2 * TILE)
    saved, left = env.save_state(), env.reset(seed=0, options={"goal": "left"})[0]["goal"]
    assert (images["left"] != images["right"]).any(axis=-1).sum() > 20
    env.restore_state(saved)
    observation, *_ = env.step(np.zeros(2, np.float32))
    assert observation["goal"].tolist() == (1 - left).tolist()
    assert places_of(envs.make(AVOID).unwrapped, observation) == ()
    env.close()


def test_what_follows_an_action_keeps_the_goal_and_foresees_no_image() -> None:
    env = envs.make(AVOID, rows=1, goal=True).unwrapped
    first, _ = env.reset(seed=0)
    history = {key: np.stack([value, value])[None] for key, value in first.items()}  # (1, To, ...)
    foreseen = as_foreseeing(env).roll_forward(history, np.full((1, 2, 2), 0.01))
    assert foreseen.keys() == history.keys()
    np.testing.assert_array_equal(foreseen["goal"], history["goal"])
    with pytest.raises(ValueError, match="what a camera will see cannot be foreseen; the policy observes image"):
        env.roll_forward(history | {"image": np.zeros((1, 2, 8, 8, 3))}, np.zeros((1, 2, 2)))


def test_wrong_goals_of_avoid_are_named() -> None:
    env = envs.make(AVOID, rows=2, goal=True)
    with pytest.raises(ValueError, match="a goal is a gate of the last row, left, middle, right; got 'leftmost'"):
        env.reset(options={"goal": "leftmost"})
    with pytest.raises(ValueError, match="there are no goals; make the environment with goal=True"):
        envs.make(AVOID).reset(options={"goal": "left"})

"""What is particular to BlockPush: rewards and events, resets, kinds of action, modes, and its expert."""

from collections.abc import Iterator

import numpy as np
import pytest

from diffusion_policy.datasets.collect import disturb, disturbance_generator
from diffusion_policy.envs.block_push import BLOCK_SIZE, MAX_ACTION, START_XY, WORKSPACE, BlockPushEnv
from diffusion_policy.envs.block_push_expert import BlockPushExpert
from diffusion_policy.envs.block_push_hand import SPEED
from diffusion_policy.envs.block_push_state import BLOCKS, MODES, TARGETS, block_xy, relative_features, target_xy
from diffusion_policy.envs.protocols import Push
from diffusion_policy.envs.robots import xarm_angles

EPISODE_STEPS = 350


@pytest.fixture(scope="module")
def shared_env() -> Iterator[BlockPushEnv]:
    env = BlockPushEnv()
    yield env
    env.close()


@pytest.fixture
def env(shared_env: BlockPushEnv) -> BlockPushEnv:
    shared_env.reset(seed=0)
    return shared_env


def put(env: BlockPushEnv, block: int, xy: np.ndarray) -> None:
    """Move a block by hand."""
    env._simulation.place(BLOCKS[block], (*xy, BLOCK_SIZE / 2), 0.0)


def play(env: BlockPushEnv, seed: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, dict]:
    """The expert's episode of one seed, the modes in turn: states (steps + 1, 16), actions (steps, 2), last info."""
    expert = BlockPushExpert(MODES[seed % len(MODES)])
    rng = disturbance_generator(seed)
    observation, info = env.reset(seed=seed)
    states, actions = [observation["state"]], []
    for _ in range(EPISODE_STEPS):
        actions.append(expert.act(observation))
        observation, _, terminated, _, info = env.step(disturb(actions[-1], noise, rng))
        states.append(observation["state"])
        if terminated:
            break
    return np.stack(states), np.stack(actions), info


# Resets and actions


def test_resets_lie_in_the_published_ranges(env: BlockPushEnv) -> None:
    states = np.stack([env.reset(seed=seed)[0]["state"] for seed in range(80)])
    blocks, targets = block_xy(states), target_xy(states)  # (80, 2, 2)
    assert (np.abs(blocks - (0.4, -0.2)) <= (0.101, 0.151)).all()  # they settle by less than 1 mm
    assert (np.abs(blocks[:, 0, 0] - blocks[:, 1, 0]) > 0.099).all()
    assert (np.ptp(blocks, axis=0) > (0.17, 0.27)).all()
    assert (np.abs(np.abs(targets[..., 0] - 0.4) - 0.12) <= 0.00501).all()
    assert (np.abs(targets[..., 1] - 0.2) <= 0.00751).all()
    sides = np.sign(targets[..., 0] - 0.4)
    assert (sides.sum(axis=1) == 0).all()
    assert 25 < (sides[:, 0] > 0).sum() < 55
    yaws = states[:, [2, 5]]
    assert ((yaws > 0.99) & (yaws < 3.15)).all()
    target_yaws = states[:, [12, 15]]
    assert (np.abs(np.sin(target_yaws)) <= np.sin(np.pi / 30) + 1e-6).all()
    assert (states[:, [2, 5, 12, 15]] >= 0).all()
    np.testing.assert_allclose(states[:, 6:10], np.tile([*START_XY, *START_XY], (80, 1)), atol=1e-4)


def test_a_delta_adds_to_the_command_and_is_clipped(env: BlockPushEnv) -> None:
    observation, *_ = env.step(np.array([0.03, -0.02], np.float32))
    np.testing.assert_allclose(observation["state"][8:10], [0.33, -0.42], atol=1e-6)
    observation, *_ = env.step(np.array([5.0, 0.0]))
    np.testing.assert_allclose(observation["state"][8:10], [0.33 + MAX_ACTION, -0.42], atol=1e-6)
    for _ in range(4):
        observation, *_ = env.step(np.array([0.0, -0.1]))
    assert observation["state"][9] == WORKSPACE[1][0]


def test_an_absolute_action_is_the_command_within_the_workspace() -> None:
    env = BlockPushEnv(action="absolute")
    env.reset(seed=0)
    assert env.action_space.contains(np.array([0.3, -0.4], np.float32))
    for action, command in (([0.35, -0.38], [0.35, -0.38]), ([9.0, -9.0], [0.7, -0.5]), ([0.3, 0.1], [0.3, 0.1])):
        observation, *_ = env.step(np.array(action))
        np.testing.assert_allclose(observation["state"][8:10], command, atol=1e-6)
    plan = env.planned_path(observation, np.array([[0.4, 0.2]]))
    np.testing.assert_allclose(plan, [[0.3, 0.1], [0.4, 0.2]], atol=1e-6)
    env.close()


@pytest.mark.parametrize("action", [[np.nan, 0.0], [0.0, np.inf], [0.0, 0.0, 0.0], 0.0])
def test_meaningless_actions_are_refused(env: BlockPushEnv, action: object) -> None:
    with pytest.raises(ValueError, match=r"an action is two finite numbers \[m\]; got"):
        env.step(np.array(action))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown action 'velocity'; choose from delta, absolute"):
        BlockPushEnv(action="velocity")
    with pytest.raises(ValueError, match=r"unknown render_mode 'ansi'; choose from human, rgb_array"):
        BlockPushEnv(render_mode="ansi")
    with pytest.raises(
        ValueError, match=r"unknown mode 'red'; choose from red-green, red-yellow, blue-green, blue-yel"
    ):
        BlockPushExpert("red")


def test_the_rod_follows_the_command_in_a_straight_line(env: BlockPushEnv) -> None:
    for action in ([0.03, -0.02], [0.1, 0.0], [-0.1, -0.05], [0.0, 0.03]):
        observation, *_ = env.step(np.array(action))
        np.testing.assert_allclose(observation["state"][6:8], observation["state"][8:10], atol=5e-4)
        assert env._arm.tool_position[2] == pytest.approx(0.06, abs=5e-4)


def test_out_of_reach_the_arm_stretches_towards_the_command(env: BlockPushEnv) -> None:
    for _ in range(4):
        env.step(np.array([0.1, 0.0]))
    observation, *_ = env.step(np.array([0.0, -0.1]))
    effector, command = observation["state"][6:8], observation["state"][8:10]
    np.testing.assert_allclose(command, [0.7, -0.5], atol=1e-6)
    assert np.linalg.norm(effector) == pytest.approx(0.71, abs=0.01)  # the arm's length
    np.testing.assert_allclose(effector / np.linalg.norm(effector), command / np.linalg.norm(command), atol=1e-3)


def test_the_arm_keeps_to_the_limits_of_its_joints_all_over_the_workspace() -> None:
    low, high = [-6.28, -2.059, -3.927, -6.28, -1.693, -6.28], [6.28, 2.0944, 0.192, 6.28, 3.1416, 6.28]  # its URDF's
    for x in np.linspace(*WORKSPACE[0], 12):
        for y in np.linspace(*WORKSPACE[1], 21):
            angles = xarm_angles((x, y, 0.06), tool_offset=0.048)
            assert (np.clip(angles, low, high) == angles).all()


# Rewards, events, modes


def test_each_first_entry_is_rewarded_and_both_blocks_end_the_episode(env: BlockPushEnv) -> None:
    still = np.zeros(2)
    green, yellow = target_xy(env.step(still)[0]["state"])
    put(env, 0, green + np.array([0.045, 0]))
    _, reward, terminated, _, info = env.step(still)
    assert (reward, terminated, info["is_success"]) == (0.49, False, False)
    assert info["measures"] == {"score": 0.49, "p1": 1.0, "p2": 0.0}
    assert info["events"] == {"REACH_0": 2, "TARGET_0_0": 2}
    assert env.step(still)[1] == 0  # it has been there
    put(env, 1, yellow - np.array([0, 0.04]))
    _, reward, terminated, _, info = env.step(still)
    assert (reward, terminated, info["is_success"]) == (0.51, True, True)
    assert info["measures"] == {"score": 1.0, "p1": 1.0, "p2": 1.0}
    assert info["events"] == {"REACH_0": 2, "TARGET_0_0": 2, "REACH_1": 4, "TARGET_1_1": 4}


def test_the_score_counts_equal_rewards_once(env: BlockPushEnv) -> None:
    green, yellow = target_xy(env.step(np.zeros(2))[0]["state"])
    for target in (green, yellow):
        put(env, 1, target)
        _, reward, *_, info = env.step(np.zeros(2))
        assert reward == 0.49
        assert info["measures"] == {"score": 0.49, "p1": 1.0, "p2": 0.0}


def test_two_blocks_in_one_target_do_not_solve_it(env: BlockPushEnv) -> None:
    green, _ = target_xy(env.step(np.zeros(2))[0]["state"])
    put(env, 0, green - np.array([0.025, 0]))
    put(env, 1, green + np.array([0.025, 0]))
    _, _, terminated, _, info = env.step(np.zeros(2))
    assert not terminated
    assert info["events"].keys() >= {"TARGET_0_0", "TARGET_1_0"}
    assert info["measures"]["p2"] == 0


def test_blocks_beyond_the_tolerance_are_outside(env: BlockPushEnv) -> None:
    green, _ = target_xy(env.step(np.zeros(2))[0]["state"])
    put(env, 0, green + np.array([0.052, 0]))
    _, reward, *_, info = env.step(np.zeros(2))
    assert reward == 0
    assert info["measures"] == {"score": 0.0, "p1": 0.0, "p2": 0.0}


def states_of(*places: tuple[str | None, str | None]) -> dict[str, np.ndarray]:
    """A path of states, each told by where the red and the blue block are: in which target, or in none."""
    where = {None: (0.4, -0.2), "green": (0.28, 0.2), "yellow": (0.52, 0.2)}
    rows = [
        [*where[red], 1.0, *where[blue], 1.0, 0.3, -0.4, 0.3, -0.4, *where["green"], 3.1, *where["yellow"], 0.1]
        for red, blue in places
    ]
    return {"state": np.array(rows, np.float32)}


@pytest.mark.parametrize(
    "places, label",
    [
        ([(None, None), ("green", None), ("green", "yellow")], "red-green"),
        ([(None, None), ("yellow", None), ("yellow", "green")], "red-yellow"),
        ([(None, None), (None, "green"), ("yellow", "green")], "blue-green"),
        ([(None, None), (None, "yellow"), ("green", "yellow")], "blue-yellow"),
        ([(None, None), ("green", None), ("yellow", None), ("yellow", "green")], "red-yellow"),  # only crossed green
        ([(None, None), ("green", None), (None, None), (None, "yellow"), ("green", "yellow")], "red-green"),
        ([(None, None), ("green", None), ("green", "green")], None),
        ([(None, None), ("green", None)], None),
        ([(None, None)], None),
    ],
)
def test_a_mode_is_the_block_that_comes_first_and_its_target(
    shared_env: BlockPushEnv, places: list, label: str | None
) -> None:
    assert shared_env.mode(states_of(*places)) == label


# Features and states


def test_relative_features_are_what_they_say(env: BlockPushEnv) -> None:
    observation, *_ = env.step(np.array([0.02, 0.05]))
    state, relative = observation["state"].astype(np.float64), observation["relative"]
    red, red_yaw, blue, blue_yaw = state[0:2], state[2], state[3:5], state[5]
    effector, command, green, yellow = state[6:8], state[8:10], state[10:12], state[13:15]
    expected = [*(red - command), *(blue - command), *(effector - command), *(green - command), *(yellow - command)]
    expected += [np.cos(4 * red_yaw), np.sin(4 * red_yaw), np.cos(4 * blue_yaw), np.sin(4 * blue_yaw)]
    expected += [*(red - green), *(red - yellow), *(blue - green), *(blue - yellow)]
    np.testing.assert_allclose(relative, expected, atol=1e-6)
    assert relative.dtype == np.float32


def test_relative_features_ignore_where_the_scene_lies_and_quarter_turns_of_cubes() -> None:
    states = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 5, 16))
    moved = states.copy()
    moved[..., [0, 3, 6, 8, 10, 13]] += 0.3
    moved[..., [1, 4, 7, 9, 11, 14]] -= 0.2
    moved[..., [2, 5]] += np.pi / 2
    features = relative_features(states)
    assert features.shape == (3, 5, 22)
    np.testing.assert_allclose(features, relative_features(moved), atol=1e-6)


def test_a_restored_state_continues_as_before(env: BlockPushEnv) -> None:
    expert = BlockPushExpert("blue-green")
    observation, info = env.reset(seed=5)
    while "TARGET_1_0" not in info["events"]:
        observation, *_, info = env.step(expert.act(observation))
    saved = env.save_state()
    actions = np.random.default_rng(0).uniform(-0.03, 0.03, (15, 2))
    before = [env.step(action) for action in actions]
    env.reset(seed=6)  # other targets, other counts
    for _ in range(2):
        env.restore_state(saved)
        after = [env.step(action) for action in actions]
        for (a, *rest), (b, *same) in zip(before, after, strict=True):
            np.testing.assert_array_equal(a["state"], b["state"])
            assert rest == same


# A hand that pushes blocks


def push(env: BlockPushEnv, block: int, goal: np.ndarray, steps: int) -> np.ndarray:
    """The states while a block is pushed by hand towards a point of the table and the robot stays,
    (steps + 1, 16)."""
    start = env._state()
    grip = env.grip(block_xy(start)[block])
    assert grip is not None
    states = [start]
    for _ in range(steps):
        env.push(Push(grip, (float(goal[0]), float(goal[1]))))
        states.append(env.step(np.zeros(2))[0]["state"])
    return np.stack(states)


def test_a_hand_grips_what_the_picture_shows(env: BlockPushEnv) -> None:
    points = env._simulation.seen_at(np.array([0.4, -0.2]), BLOCK_SIZE / 2)
    np.testing.assert_allclose(
        env._simulation.pixels(np.array([*points, BLOCK_SIZE / 2])), env.pixels(np.array([0.4, -0.2])), atol=1e-6
    )
    for name, xy in zip(BLOCKS, block_xy(env._state()), strict=True):
        grip = env.grip(xy)
        assert grip is not None
        assert grip.body == name
        assert np.abs(grip.point).max() <= BLOCK_SIZE / 2
    assert env.grip(np.array([0.6, 0.4])) is None


def test_a_pushed_block_follows_the_hand_no_faster_than_it_may_and_stays_there(env: BlockPushEnv) -> None:
    goal = np.array([0.55, 0.0])
    states = push(env, 0, goal, steps=12)
    path = block_xy(states)[:, 0]
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).max() <= SPEED * 0.1 + 1e-3
    assert np.linalg.norm(path[-1] - goal) < 0.03  # the middle of the block: it is gripped next to it
    assert np.linalg.norm(path[0] - goal) > 0.2
    assert np.abs(states[:, 6:8] - START_XY).max() < 1e-3  # the robot stays
    after = env.step(np.zeros(2))[0]["state"]
    np.testing.assert_allclose(block_xy(after)[0], path[-1], atol=5e-3)


def test_a_pushed_block_pushes_the_other_and_stops_at_the_rod(env: BlockPushEnv) -> None:
    put(env, 0, np.array([0.3, -0.2]))
    put(env, 1, np.array([0.4, -0.2]))
    states = push(env, 0, np.array([0.5, -0.2]), steps=10)
    apart = np.linalg.norm(np.diff(block_xy(states), axis=1), axis=-1)
    assert block_xy(states)[-1, 1, 0] > 0.43
    assert apart.min() > BLOCK_SIZE - 2e-3
    put(env, 1, np.array([0.6, 0.3]))
    put(env, 0, np.array([0.3, -0.3]))
    states = push(env, 0, np.array([0.3, -0.5]), steps=10)
    away = np.linalg.norm(block_xy(states)[:, 0] - states[:, 6:8], axis=-1)
    assert away.min() > BLOCK_SIZE / 2 + 0.01 - 3e-3  # the rod's radius
    assert np.abs(states[:, 6:8] - START_XY).max() < 2e-3


def test_the_same_pushes_repeat_an_episode(env: BlockPushEnv) -> None:
    other = BlockPushEnv()
    traces = []
    for one in (env, env, other):
        one.reset(seed=4)
        traces.append(push(one, 1, np.array([0.3, -0.4]), steps=6))
        one.push(Push(one.grip(block_xy(one._state())[1]), (0.5, 0.0)))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(traces[0], traces[1])
    np.testing.assert_array_equal(traces[0], traces[2])
    env.reset(seed=4)  # what was not pushed yet is forgotten
    other.reset(seed=4)
    fresh = BlockPushEnv()
    fresh.reset(seed=4)
    for _ in range(3):
        observed = [one.step(np.array([0.02, 0.03]))[0]["state"] for one in (env, other, fresh)]
        np.testing.assert_array_equal(observed[0], observed[2])
        np.testing.assert_array_equal(observed[1], observed[2])
    other.close()
    fresh.close()


# Drawing and choosing


def test_pixels_find_things_in_the_picture() -> None:
    env = BlockPushEnv(render_mode="rgb_array")
    observation, _ = env.reset(seed=1)
    picture = env.render()
    assert picture is not None
    points = np.concatenate([target_xy(observation["state"]), block_xy(observation["state"])])
    green, yellow, red, blue = (picture[row, column] / 255 for column, row in env.pixels(points).astype(int))
    assert [color.argmax() for color in (green, red, blue)] == [1, 0, 2]
    assert yellow.argmin() == 2
    assert yellow[:2].min() > 0.5
    env.close()


def test_a_plan_chooses_the_block_that_it_comes_nearest_to(env: BlockPushEnv) -> None:
    observation, _ = env.reset(seed=3)
    start = observation["state"][8:10]
    for i, block in enumerate(BLOCKS):
        steps = np.tile((block_xy(observation["state"])[i] - start) / 8, (8, 1))
        assert env.choice(observation, steps) == ("first block", block)
    assert env.choice(observation, np.zeros((8, 2))) is None
    there = {"state": states_of(("green", None))["state"][0]}
    assert env.choice(there, np.full((8, 2), 0.03)) is None


def test_paths_follow_the_effector_and_plans_the_command(env: BlockPushEnv) -> None:
    states = np.arange(48.0).reshape(3, 16)
    np.testing.assert_array_equal(env.path({"state": states}), states[:, 6:8])
    plan = env.planned_path({"state": states[0]}, np.ones((5, 4, 2)))
    assert plan.shape == (5, 5, 2)
    np.testing.assert_array_equal(plan[2], [[8 + i, 9 + i] for i in range(5)])
    assert (env.scene.x_range, env.scene.y_range) == WORKSPACE


# The expert


@pytest.mark.parametrize("seed", range(4))
def test_the_expert_solves_its_order_with_steps_as_published(env: BlockPushEnv, seed: int) -> None:
    states, actions, info = play(env, seed)
    assert info["is_success"]
    assert env.mode({"state": states}) == MODES[seed]
    assert np.linalg.norm(actions, axis=-1).max() <= 0.035
    assert len(actions) < 250


@pytest.mark.parametrize("seed", range(4, 8))
def test_the_expert_recovers_from_noise(env: BlockPushEnv, seed: int) -> None:
    states, _, info = play(env, seed, noise=0.4)
    assert info["is_success"]
    assert env.mode({"state": states}) == MODES[seed % 4]


def test_the_expert_brings_back_a_block_that_is_taken_away(env: BlockPushEnv) -> None:
    expert = BlockPushExpert("red-green")
    observation, info = env.reset(seed=0)
    while "TARGET_0_0" not in info["events"]:
        observation, *_, info = env.step(expert.act(observation))
    put(env, 0, np.array([0.45, 0.0]))
    terminated = False
    for _ in range(EPISODE_STEPS):
        observation, _, terminated, _, info = env.step(expert.act(observation))
        if terminated:
            break
    assert terminated
    assert np.linalg.norm(block_xy(observation["state"])[0] - target_xy(observation["state"])[0]) < 0.05


@pytest.mark.slow
def test_the_expert_solves_500_seeds_in_equal_parts(env: BlockPushEnv) -> None:
    solved, lengths = np.zeros((4, 2), int), []
    for seed in range(500):
        states, actions, info = play(env, seed)
        solved[seed % 4] += [info["is_success"], 1]
        assert not info["is_success"] or env.mode({"state": states}) == MODES[seed % 4]
        assert np.linalg.norm(actions, axis=-1).max() <= 0.035
        lengths.append(len(actions))
    assert solved[:, 0].sum() >= 490
    assert (solved[:, 0] >= 0.95 * solved[:, 1]).all()
    assert 100 < np.mean(lengths) < 130


def test_names_are_in_the_order_of_the_modes() -> None:
    assert [f"{block}-{target}" for block in BLOCKS for target in TARGETS] == list(MODES)
    assert MODES == ("red-green", "red-yellow", "blue-green", "blue-yellow")

"""Every registered id, and what is particular to each task."""

import gc
import subprocess
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from diffusion_policy import envs
from diffusion_policy.envs.avoid import FINISH_Y, MAX_ACTION, ROWS, START_RANGE, START_XY
from diffusion_policy.evaluation.pool import EnvironmentPool

AVOID = "diffusion_policy/Avoid-v0"
MISSING = pytest.mark.skipif(find_spec("gym_pusht") is None, reason="gym-pusht is not installed")
TASKS = [pytest.param(env_id, marks=MISSING if "PushT" in env_id else ()) for env_id in envs.ENV_IDS]


def play(env: gymnasium.Env, seed: int, steps: int = 60) -> list[np.ndarray]:
    """An episode of random actions, as flat numbers."""
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    trace = [np.concatenate([observation[key].ravel() for key in sorted(observation)])]
    for _ in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        trace.append(np.concatenate([*(observation[key].ravel() for key in sorted(observation)), [reward]]))
        assert isinstance(info["is_success"], bool)
        if terminated or truncated:
            break
    return trace


@pytest.mark.parametrize("env_id", TASKS)
def test_gymnasium_checks_the_environment(env_id: str) -> None:
    env = envs.make(env_id)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no window: DISPLAY is not set.*")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized space.*")  # absolute places are not
        check_env(env.unwrapped)
    env.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_the_same_seed_gives_the_same_episode_whatever_came_before(env_id: str) -> None:
    env = envs.make(env_id)
    first = play(env, seed=3)
    play(env, seed=4)
    second = play(env, seed=3)
    assert len(first) == len(second)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    env.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_another_process_gives_the_same_episode(env_id: str) -> None:
    make_env = partial(envs.make, env_id)
    actions = np.full((10, *make_env().action_space.shape), 0.004, np.float32)
    results = []
    for workers in (1, 2):
        with EnvironmentPool(make_env, workers) as pool:
            starts = pool.reset({0: 5, 1: 6})
            stretches = pool.step({0: actions, 1: actions})
        answers = [answer for slot in (0, 1) for answer in (starts[slot], stretches[slot].observations)]
        results.append(np.concatenate([rows.ravel() for answer in answers for rows in answer.values()]))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("env_id", TASKS)
def test_it_renders_and_closes_twice(env_id: str) -> None:
    env = envs.make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.std() > 10  # something is to be seen
    env.unwrapped.close()
    env.unwrapped.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_every_mode_has_one_label(env_id: str) -> None:
    modes = envs.make(env_id).unwrapped.modes
    assert len(set(modes)) == len(modes) != 1  # Push-T knows none


@pytest.mark.parametrize("env_id", TASKS)
def test_a_restored_state_goes_on_as_the_saved_one_did(env_id: str) -> None:
    env = envs.make(env_id).unwrapped
    env.reset(seed=8)
    rng = np.random.default_rng(0)
    actions = rng.uniform(env.action_space.low, env.action_space.high, (24, *env.action_space.shape)).astype(np.float32)
    for action in actions[:8]:
        env.step(action)
    saved = env.save_state()
    continued = [env.step(action)[:2] for action in actions[8:]]
    for _ in range(2):
        env.restore_state(saved)
        for action, (observation, reward) in zip(actions[8:], continued, strict=True):
            again, reward_again, *_ = env.step(action)
            assert reward_again == reward
            for key, value in observation.items():
                np.testing.assert_array_equal(again[key], value)
    env.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_planned_paths_lie_in_the_picture(env_id: str) -> None:
    env = envs.make(env_id, render_mode="rgb_array").unwrapped
    observation, _ = env.reset(seed=1)
    center = (env.action_space.low + env.action_space.high) / 2
    path = env.planned_path(observation, np.broadcast_to(center, (3, 5, *center.shape)))
    assert path.shape == (3, 6, 2)
    pixels = env.pixels(path)
    height, width = env.render().shape[:2]
    assert pixels.shape == path.shape
    assert (pixels >= 0).all()
    assert (pixels < [width, height]).all()
    env.close()


def test_unknown_ids_and_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown environment 'Nope-v0'; choose from diffusion_policy/Avoid-v0"):
        envs.make("Nope-v0")
    with pytest.raises(ValueError, match=r"does not take the arguments \{'row': 2\}.*unexpected keyword"):
        envs.make(AVOID, row=2)


# Avoid


@pytest.mark.parametrize("rows, count", [(1, 2), (2, 6), (3, 24)])
def test_rows_multiply_modes(rows: int, count: int) -> None:
    assert len(envs.make(AVOID, rows=rows).unwrapped.modes) == count


@pytest.mark.parametrize("rows", [0, 4, "2", None])
def test_other_numbers_of_rows_are_refused(rows: object) -> None:
    with pytest.raises(ValueError, match="rows must be 1, 2 or 3; got"):
        envs.make(AVOID, rows=rows)


def test_starts_differ_within_their_range_or_are_fixed() -> None:
    env = envs.make(AVOID)
    starts = np.array([env.reset(seed=seed)[0]["actual_xy"] for seed in range(20)])
    assert (np.abs(starts - START_XY) <= START_RANGE + 1e-3).all()
    assert starts.std(axis=0).min() > 0.005
    fixed = envs.make(AVOID, fixed_start=True)
    for seed in range(3):
        np.testing.assert_allclose(fixed.reset(seed=seed)[0]["actual_xy"], START_XY, atol=1e-3)


def test_the_rod_follows_the_command() -> None:
    env = envs.make(AVOID, rows=1, fixed_start=True)
    env.reset(seed=0)
    for _ in range(10):
        observation, *_ = env.step(np.array([0.008, 0.0], np.float32))
    np.testing.assert_allclose(observation["desired_xy"], [START_XY[0] + 0.08, START_XY[1]], atol=1e-6)
    np.testing.assert_allclose(observation["actual_xy"], observation["desired_xy"], atol=0.005)


def test_a_contact_with_a_cylinder_is_a_failure() -> None:
    env = envs.make(AVOID, rows=1, fixed_start=True)
    observation, _ = env.reset(seed=0)
    row = ROWS[0]
    for _ in range(60):
        toward = np.array([row.centers_x[0], row.y]) - observation["desired_xy"]
        action = 0.008 * toward / np.linalg.norm(toward)
        observation, reward, terminated, _, info = env.step(action.astype(np.float32))
        if terminated:
            break
    assert info == {"is_success": False, "collision": True}
    assert reward == 0
    distance = np.linalg.norm(observation["actual_xy"] - (row.centers_x[0], row.y))
    assert distance == pytest.approx(row.radius + 0.01, abs=0.006)  # the rod's radius is 1 cm


def test_passing_close_by_without_contact_succeeds() -> None:
    env = envs.make(AVOID, rows=1, fixed_start=True)
    observation, _ = env.reset(seed=0)
    clear_x = ROWS[0].centers_x[0] + ROWS[0].radius + 0.01 + 0.008
    done = False
    while not done:
        toward = np.array([clear_x - observation["desired_xy"][0], 0.01])
        action = np.clip(toward, -0.01, 0.01).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    assert info == {"is_success": True, "collision": False}
    assert reward == 1
    assert observation["actual_xy"][1] > FINISH_Y


def test_large_actions_are_clipped_and_meaningless_ones_refused() -> None:
    env = envs.make(AVOID, fixed_start=True).unwrapped
    env.reset(seed=0)
    observation, *_ = env.step(np.array([1.0, 0.0]))
    assert observation["desired_xy"][0] == pytest.approx(START_XY[0] + MAX_ACTION, abs=1e-6)
    for action in ([np.nan, 0.0], [np.inf, 0.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="an action is two finite numbers"):
            env.step(np.array(action))


def test_time_runs_out_after_250_steps() -> None:
    env = envs.make(AVOID)
    env.reset(seed=0)
    for step in range(1, 251):
        *_, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        assert not terminated
        assert truncated == (step == 250)
    assert info["is_success"] is False


def straight_through(xs: list[float]) -> dict[str, np.ndarray]:
    """A path that crosses row i at xs[i]."""
    points = [(0.525, -0.28)]
    for row, x in zip(ROWS, xs, strict=False):
        points += [(x, row.y - 0.02), (x, row.y + 0.02)]
    points.append((xs[-1], 0.36))
    dense = [np.linspace(a, b, 7) for a, b in pairwise(points)]
    return {"actual_xy": np.concatenate(dense)}


@pytest.mark.parametrize(
    "xs, label",
    [
        ([0.4], "left"),
        ([0.6], "right"),
        ([0.4, 0.5], "left-middle"),
        ([0.6, 0.7], "right-right"),
        ([0.4, 0.3, 0.3], "left-left-leftmost"),
        ([0.6, 0.5, 0.6], "right-middle-right"),
        ([0.6, 0.6, 0.7], "right-right-rightmost"),
    ],
)
def test_a_mode_is_the_gates_passed(xs: list[float], label: str) -> None:
    assert envs.make(AVOID, rows=len(xs)).unwrapped.mode(straight_through(xs)) == label


def test_no_mode_before_every_row_is_passed() -> None:
    env = envs.make(AVOID, rows=3).unwrapped
    path = straight_through([0.4, 0.5, 0.6])["actual_xy"]
    assert env.mode({"actual_xy": path[path[:, 1] < 0.2]}) is None
    assert env.mode({"actual_xy": path[:1]}) is None


def test_the_last_crossing_of_a_row_counts() -> None:
    there_and_back = np.array([(0.4, -0.15), (0.4, -0.05), (0.4, -0.15), (0.6, -0.15), (0.6, -0.05)])
    assert envs.make(AVOID, rows=1).unwrapped.mode({"actual_xy": there_and_back}) == "right"


def test_planned_paths_add_up_the_actions() -> None:
    env = envs.make(AVOID).unwrapped
    observation = {"desired_xy": np.array([0.5, -0.2]), "actual_xy": np.array([0.0, 0.0])}
    path = env.planned_path(observation, np.full((3, 4, 2), 0.01))
    assert path.shape == (3, 5, 2)
    np.testing.assert_allclose(path[1], [[0.5 + 0.01 * i, -0.2 + 0.01 * i] for i in range(5)])


def test_the_window_of_human_rendering_is_missed_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.warns(UserWarning, match="no window: DISPLAY is not set"):
        envs.make(AVOID, render_mode="human").close()


@pytest.mark.parametrize("y, xs, expected", [
    (-0.28, [0.44] * 16, ("row 1", "left")),  # it ends before the row
    (-0.20, [0.44, 0.44, 0.62], ("row 1", "right")),
    (-0.05, [0.50] * 4, ("row 2", "middle")),
    (0.10, [0.50] * 4, None),
])  # fmt: skip
def test_a_plan_chooses_a_gate_of_the_row_that_comes_next(y: float, xs: list[float], expected: object) -> None:
    points = np.array([(0.525, y), *((x, y + 0.01 * i) for i, x in enumerate(xs, start=1))])
    if len(xs) == 3:
        points[-1] = (0.62, -0.05)
    observation = {"desired_xy": points[0], "actual_xy": points[0]}
    assert envs.make(AVOID).unwrapped.choice(observation, np.diff(points, axis=0)) == expected


def test_nothing_is_printed_where_output_is_a_pipe() -> None:
    code = 'from diffusion_policy import envs; env = envs.make("diffusion_policy/Avoid-v0"); env.reset(); env.close()'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_hidden_needs_no_open_output(closed: str) -> None:
    code = "import os; from diffusion_policy.envs.quiet import silence\nwith silence(): os.write(1, b'x')\nos._exit(7)"
    assert subprocess.run(f'exec "{sys.executable}" -c "{code}" {closed}', shell=True).returncode == 7


def test_a_simulation_interrupted_while_it_connects_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pytest makes an error of what a destructor raises."""

    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pybullet.connect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            envs.make("diffusion_policy/Avoid-v0")
    gc.collect()

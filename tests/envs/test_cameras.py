"""Images beside the state: what is seen, that a seed repeats it in any process, and that nothing else changes."""

import itertools
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

from diffusion_policy import envs
from diffusion_policy.envs import avoid, block_push, egl, maze
from diffusion_policy.evaluation.pool import EnvironmentPool

AVOID, BLOCK_PUSH, MAZE, PANDA_REACH, PUSH_T, INTERSECTION = envs.ENV_IDS
MISSING = pytest.mark.skipif(find_spec("gym_pusht") is None, reason="gym-pusht is not installed")
ARMS = [AVOID, BLOCK_PUSH]
TASKS = [*ARMS, MAZE, PANDA_REACH, INTERSECTION, pytest.param(PUSH_T, marks=MISSING)]
SIZE = 32


def seen(env_id: str) -> dict[str, object]:
    """Arguments for all images that a task has."""
    return {"image_size": SIZE} | ({"wrist_image": True} if env_id in ARMS else {})


def play(env: object, seed: int, steps: int = 6) -> list[dict[str, np.ndarray]]:
    """What is observed under random actions."""
    trace = [env.reset(seed=seed)[0]]
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        trace.append(env.step(rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32))[0])
    return trace


@pytest.mark.parametrize("env_id", TASKS)
def test_images_stand_beside_the_state_and_change_nothing_of_it(env_id: str) -> None:
    env, blind = envs.make(env_id, **seen(env_id)), envs.make(env_id)
    keys = {"image", *(("wrist_image",) if env_id in ARMS else ())}
    added = keys | ({"agent_pos"} if env_id == PUSH_T else set())
    assert env.observation_space.keys() - blind.observation_space.keys() == added
    for one, other in zip(play(env, 1), play(blind, 1), strict=True):
        assert env.observation_space.contains(one)
        assert one.keys() - other.keys() == added
        for key, value in other.items():
            np.testing.assert_array_equal(one[key], value)
        for key in keys:
            assert one[key].shape == (SIZE, SIZE, 3)
            assert one[key].dtype == np.uint8
            assert one[key].std() > 10  # something is to be seen
    env.close()
    blind.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_a_seed_gives_the_same_images_whatever_came_before_and_in_any_process(env_id: str) -> None:
    make_env = partial(envs.make, env_id, **seen(env_id))
    env = make_env()
    first = play(env, 3)
    play(env, 4)
    for one, other in zip(first, play(env, 3), strict=True):
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])
    actions = np.stack([env.action_space.low / 2 + env.action_space.high / 2] * 3).astype(np.float32)
    results = []
    for workers in (1, 2):
        with EnvironmentPool(make_env, workers) as pool:
            starts, steps = pool.reset({0: 5, 1: 6}), pool.step({0: actions, 1: actions})
        answers = [answer for slot in (0, 1) for answer in (starts[slot], steps[slot].observations)]
        results.append(np.concatenate([answer[key].ravel() for answer in answers for key in sorted(answer)]))
    np.testing.assert_array_equal(*results)
    env.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_an_image_follows_what_moves(env_id: str) -> None:
    env = envs.make(env_id, image_size=96)
    first, _ = env.reset(seed=0)
    low, high = env.action_space.low, env.action_space.high
    for _ in range(3):
        last, *_ = env.step(low + 0.9 * (high - low))
    moved = (first["image"] != last["image"]).any(axis=-1)
    assert 5 < moved.sum() < moved.size / 3
    env.close()


@pytest.mark.parametrize("module, env_id", [(avoid, AVOID), (block_push, BLOCK_PUSH), (maze, MAZE)])
def test_the_image_shows_the_whole_workspace(module: object, env_id: str) -> None:
    env = envs.make(env_id, image_size=SIZE).unwrapped
    client, camera = env._simulation._client, module.CAMERA
    eye = np.array(env._simulation._eye(camera)).reshape(4, 4).T
    lens = np.array(client.computeProjectionMatrixFOV(camera.field, 1.0, 0.1, 5)).reshape(4, 4).T
    corners = np.array(list(itertools.product(*module.WORKSPACE, (0.0, 0.1), (1.0,))))
    clip = corners @ (lens @ eye).T
    assert (np.abs(clip[:, :2] / clip[:, 3:]) <= 1).all()
    env.close()


@MISSING
def test_the_image_of_push_t_is_the_published_one_without_the_cross() -> None:
    env = envs.make(PUSH_T, image_size=96).unwrapped
    env.reset(seed=2)
    observation, *_ = env.step(np.array([100.0, 400.0]))
    np.testing.assert_array_equal(observation["image"], env._simulation._render())
    red = (observation["image"] == (255, 0, 0)).all(axis=-1)
    assert not red.any()
    env.close()


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("size", [0, None])
def test_without_a_size_there_is_no_image(env_id: str, size: int | None) -> None:
    env = envs.make(env_id, image_size=size)
    assert env.observation_space == envs.make(env_id).observation_space
    env.close()


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("size", [7, 513, -1, 32.0, "96", True])
def test_other_sizes_are_refused(env_id: str, size: object) -> None:
    with pytest.raises(ValueError, match=f"image_size must be a whole number of 8 to 512, or 0; got {size!r}"):
        envs.make(env_id, image_size=size)


@pytest.mark.parametrize("env_id", ARMS)
def test_what_goes_with_an_image_needs_one(env_id: str) -> None:
    with pytest.raises(ValueError, match="wrist_image needs an image_size of 8 to 512; got 0"):
        envs.make(env_id, wrist_image=True)
    with pytest.raises(ValueError, match="image_renderer needs an image_size of 8 to 512; got 0"):
        envs.make(env_id, image_renderer="egl")
    with pytest.raises(ValueError, match="unknown image_renderer 'gl'; choose from tiny, egl"):
        envs.make(env_id, image_size=SIZE, image_renderer="gl")


@pytest.mark.parametrize("reason", ["absent", "no driver"])
def test_egl_that_cannot_be_had_is_said_in_one_sentence(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    egl.find_plugin.cache_clear()
    if reason == "absent":
        monkeypatch.setattr(egl.importlib.util, "find_spec", lambda name: None)
    else:  # it ends the process that tries it
        monkeypatch.setattr(egl.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(ValueError, match=r"needs PyBullet's eglRenderer and a driver with EGL.*choose 'tiny'"):
        envs.make(AVOID, image_size=SIZE, image_renderer="egl")
    egl.find_plugin.cache_clear()


def test_egl_draws_the_same_scene_where_it_is_there() -> None:
    """In a process of its own: drivers print, and may end it."""
    try:
        egl.find_plugin()
    except ValueError as error:
        pytest.skip(str(error))
    code = f"""
import numpy as np
from diffusion_policy import envs
arguments = {{"image_size": {SIZE}, "wrist_image": True}}
one, other = (envs.make("{AVOID}", image_renderer="egl", render_mode="rgb_array", **arguments) for _ in range(2))
tiny = envs.make("{AVOID}", **arguments)
first, again, plain = (env.reset(seed=1)[0] for env in (one, other, tiny))
assert all(np.array_equal(first[key], again[key]) for key in first)
one.close()
again = other.reset(seed=1)[0]  # another simulation may close before
assert all(np.array_equal(first[key], again[key]) for key in first)
assert not np.array_equal(again["image"], plain["image"])
red = [np.argwhere((image[..., 0] > 100) & (image[..., 1] < 90)).mean(0) for image in (first["image"], plain["image"])]
assert np.abs(red[0] - red[1]).max() < 1, red  # the cylinders
assert other.render().std() > 10
other.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""

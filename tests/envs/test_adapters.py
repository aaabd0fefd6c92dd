"""Other people's environments as tasks of ours, and the examples for them."""

import importlib
import importlib.util
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from gymnasium.utils.env_checker import check_env

from diffusion_policy.datasets.collect import disturb, disturbance_generator
from diffusion_policy.envs.adapters import Adapter, EnvSpec, EnvSpecError, capped_steps
from diffusion_policy.envs.avoid import AvoidEnv
from diffusion_policy.envs.examples import (
    MOUNTAIN_CAR_MODES,
    MountainCarExpert,
    PandaPushExpert,
    PandaReachExpert,
    mountain_car_mode,
)
from diffusion_policy.envs.modules import load
from diffusion_policy.evaluation.pool import EnvironmentPool

AVOID = "diffusion_policy/Avoid-v0"
EXAMPLES = "diffusion_policy.envs.examples"
MOUNTAIN_CAR = EnvSpec(
    "MountainCarContinuous-v0", {}, "return>=90", f"{EXAMPLES}:mountain_car_mode", MOUNTAIN_CAR_MODES
)
REACH, PUSH = EnvSpec("panda_gym:PandaReach-v3"), EnvSpec("panda_gym:PandaPush-v3", fresh=True)
needs_panda = pytest.mark.skipif(importlib.util.find_spec("panda_gym") is None, reason="panda-gym is not installed")

MY_TASK = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box

class Walk(gymnasium.Env):
    observation_space, action_space = Box(-9, 9, (1,)), Box(-1, 1, (1,))
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.x, {}
    def step(self, action):
        self.x = self.x + action
        return self.x, 1.0, False, False, {}

gymnasium.register("Walk-v0", entry_point=Walk, max_episode_steps=3)

def far(observation, info):
    return observation["observation"][0] > 1

def side(observations):
    return "left" if observations["observation"][-1, 0] < 0 else "right"

def broken(*arguments):
    return {}["here"]

def silent(*arguments):
    return 3
"""


class Fake(gymnasium.Env):
    """Gives what it is told to."""

    def __init__(self, observation_space: Any = None, action_space: Any = None, infos: tuple = ({}, {})) -> None:
        self.observation_space = Box(-1, 1, (2,)) if observation_space is None else observation_space
        self.action_space = action_space or Box(-1, 1, (2,))
        self.infos = infos
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        self.actions = []
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.actions.append(action)
        done = len(self.actions) == len(self.infos)
        return self.observation_space.sample(), -1.0, done, False, self.infos[len(self.actions) - 1]


@pytest.fixture
def my_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, in the working directory."""
    name = f"my_{tmp_path.name}"  # another one in each test
    (tmp_path / f"{name}.py").write_text(MY_TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield name
    gymnasium.registry.pop("Walk-v0", None)


def finish(env: gymnasium.Env, seed: int = 0) -> tuple[list[bool], dict[str, Any]]:
    """An episode of zeros: is_success at each step, and the last info."""
    _, info = env.reset(seed=seed)
    answers, done = [info["is_success"]], False
    while not done:
        _, _, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
        answers.append(info["is_success"])
        done = terminated or truncated
    return answers, info


def show(env: gymnasium.Env, expert: Any, seed: int, noise: float) -> tuple[bool, str | None, int]:
    """An expert's episode: its success, mode and steps."""
    rng = disturbance_generator(seed)
    observation, _ = env.reset(seed=seed)
    path, done, info = [observation], False, {}
    while not done:
        action = expert.act(observation)
        assert np.abs(action).max() <= 1
        observation, _, terminated, truncated, info = env.step(disturb(action, noise, rng))
        path.append(observation)
        done = terminated or truncated
    mode = env.get_wrapper_attr("mode")({key: np.stack([row[key] for row in path]) for key in observation})
    return info["is_success"], mode, len(path) - 1


# Spaces


def test_nested_observations_become_a_flat_dict_that_keeps_its_types() -> None:
    space = Dict(
        {
            "camera": Dict({"depth": Box(0, 255, (2, 3), np.uint8), "gain": Box(-1, 1, (), np.float64)}),
            "joints": Tuple((Box(-np.inf, np.inf, (2,), np.float64), MultiBinary(3))),
            "gear": Discrete(3, start=-1),
            "dials": MultiDiscrete([2, 3]),
        }
    )
    env = Adapter(Fake(space))
    shapes = {
        "camera.depth": (2, 3),
        "camera.gain": (1,),
        "joints.0": (2,),
        "joints.1": (3,),
        "gear": (3,),
        "dials": (5,),
    }
    assert {key: part.shape for key, part in env.observation_space.items()} == shapes
    observation, _ = env.reset(seed=3)
    space.seed(3)
    raw = space.sample()
    assert observation in env.observation_space
    np.testing.assert_array_equal(observation["camera.depth"], raw["camera"]["depth"])
    np.testing.assert_array_equal(observation["joints.0"], raw["joints"][0])
    assert observation["gear"].tolist() == [raw["gear"] == gear for gear in (-1, 0, 1)]
    assert {key: rows.dtype.name for key, rows in observation.items()} == {
        **dict.fromkeys(("gear", "joints.1", "dials"), "float32"),
        **{"camera.depth": "uint8", "camera.gain": "float64", "joints.0": "float64"},
    }


def test_a_box_is_called_observation_as_the_recorder_calls_it() -> None:
    assert Adapter(Fake()).observation_space == Dict({"observation": Box(-1, 1, (2,))})


def test_observations_are_copies() -> None:
    env = Adapter(gymnasium.make("MountainCarContinuous-v0"), 90.0)
    first, _ = env.reset(seed=0)
    kept = first["observation"].copy()
    env.step(np.ones(1, np.float32))
    np.testing.assert_array_equal(first["observation"], kept)


def test_actions_are_clipped_and_get_their_type_and_shape_back() -> None:
    low, high = np.full((2, 2), -0.1), np.full((2, 2), 0.1)
    fake = Fake(action_space=Box(low, high, dtype=np.float64))
    env = Adapter(fake, 0.0)
    assert env.action_space == Box(low.reshape(-1), high.reshape(-1), dtype=np.float64)
    env.reset(seed=0)
    env.step(np.array([-3, 0, 0.05, 3], np.float32))
    assert fake.actions[0] in fake.action_space
    np.testing.assert_allclose(fake.actions[0], [[-0.1, 0], [0.05, 0.1]])
    for action in ([0.0, 0.0], [0.0, 0.0, 0.0, np.nan]):
        with pytest.raises(EnvSpecError, match="an action of Fake is 4 finite numbers; got"):
            env.step(np.array(action))


@pytest.mark.parametrize("space", [Discrete(3), Dict({"arm": Box(-1, 1, (2,))}), Box(0, 9, (2,), np.int64)])
def test_other_actions_are_refused(space: gymnasium.Space) -> None:
    with pytest.raises(EnvSpecError, match=r"Fake takes actions of .*; a policy can only give those of a Box of"):
        Adapter(Fake(action_space=space))


def test_observations_without_numbers_or_names_are_refused() -> None:
    with pytest.raises(EnvSpecError, match=r"Fake observes task\.name: Text.*; allowed are Box, Discrete"):
        Adapter(Fake(Dict({"task": Dict({"name": Text(5)})})))
    part = Box(-1, 1, (2,))
    for space in (Dict({}), Dict({"action": part})):
        with pytest.raises(EnvSpecError, match="Fake must observe something, and not under the name `action`"):
            Adapter(Fake(space))


def test_an_environment_without_seeds_is_refused() -> None:
    class Old(Fake):
        def reset(self) -> tuple[Any, dict]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return np.zeros(2), {}

    with pytest.raises(EnvSpecError, match="Old takes no seed"):
        Adapter(Old())


# What somebody else's environment does otherwise


def test_a_reset_without_options_is_called_without_also_under_wrappers() -> None:
    class Seeded(Fake):
        def reset(self, seed: int | None = None) -> tuple[Any, dict]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return Fake.reset(self, seed=seed)

    wrapped = gymnasium.wrappers.TimeLimit(gymnasium.wrappers.OrderEnforcing(Seeded()), 5)
    for env in (Seeded(), wrapped):
        assert finish(Adapter(env, 0.0))[0] == [False, False, False]


def test_wrappers_reach_for_what_they_were_put_around() -> None:
    class Reaching(gymnasium.Wrapper):
        def step(self, action: Any) -> Any:
            self.env.gain = len(self.env.actions) + 1  # pyright: ignore[reportAttributeAccessIssue]
            return self.env.step(action)

    fake = Fake()
    finish(Adapter(Reaching(fake), 0.0))
    assert fake.gain == 2  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(Adapter(fake).env, "anything")


@pytest.mark.parametrize(
    "reset, step, said",
    [
        (np.zeros(2), None, r"reset of Old gives a ndarray, as in old versions of gym; .*\(observation, info\)"),
        ((np.zeros(2), 3), None, "reset of Old gives 2 values"),
        (None, (np.zeros(2), 0.0, False, {}), "step of Old gives 4 values, as in old versions of gym; it must return"),
        (None, (np.zeros(2), None, False, False, {}), "Old gives the reward None; it must be one number"),
        (None, (np.zeros(2), [1.0, 2.0], False, False, {}), r"the reward \[1.0, 2.0\]; it must be one number"),
        (None, (np.zeros(2), 0.0, np.zeros(2), False, {}), "the end of the episode as"),
        (None, (np.zeros(3), 0.0, False, False, {}), r"observation as float64 of shape \(3,\); its observation space"),
    ],
)
def test_answers_of_another_form_are_told_in_one_line_under_wrappers_too(reset: Any, step: Any, said: str) -> None:
    class Old(Fake):
        def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
            return super().reset(seed=seed) if reset is None else reset

        def step(self, action: np.ndarray) -> Any:
            return step

    for env in (Old(), gymnasium.wrappers.TimeLimit(Old(), 5)):
        with pytest.raises(EnvSpecError, match=said) as error:
            finish(Adapter(env))
        assert "\n" not in str(error.value)
        assert error.value.hopeless


def test_numbers_come_as_arrays_and_infos_as_nothing() -> None:
    class Arrays(Fake):
        def step(self, action: np.ndarray) -> Any:
            *_, done, _, _ = super().step(action)
            return (
                np.zeros(2),
                np.array([2.0]),
                np.array([done]),
                np.False_,
                {"success": np.array([done])} if done else None,
            )

    answers, info = finish(Adapter(Arrays()))
    assert answers == [False, False, True]
    assert info["measures"] == {"return": 4.0}


@pytest.mark.parametrize("share", [0.3, np.array([0.5]), np.nan])
def test_a_share_is_neither_success_nor_failure(share: Any) -> None:
    with pytest.raises(EnvSpecError, match=r"info\['success'\] = .*, which is neither true nor false"):
        finish(Adapter(Fake(infos=({}, {"success": share}))))


def test_measures_that_are_no_named_numbers_are_somebody_elses() -> None:
    for measures in ([1, 2], {"a": "b"}, {1: 2.0}, "many"):
        assert finish(Adapter(Fake(infos=({}, {"measures": measures})), 0.0))[1]["measures"] == {"return": -2.0}


def test_close_may_fail() -> None:
    closed = []

    class Closing(Fake):
        def close(self) -> None:
            closed.append(True)
            raise RuntimeError("already closed")

    Adapter(Closing()).close()
    assert closed == [True]


def test_several_environments_are_not_one() -> None:
    with pytest.raises(EnvSpecError, match=r"SyncVectorEnv is several environments; give a single one: gymnasium.make"):
        Adapter(gymnasium.make_vec("Pendulum-v1", 2))  # pyright: ignore[reportArgumentType]

    class Bare(gymnasium.Env):
        observation_space = Box(-1, 1, (1,))

    with pytest.raises(EnvSpecError, match="Bare must have an action_space, a space of Gymnasium's"):
        Adapter(Bare())
    with pytest.raises(EnvSpecError, match=r"an environment is a gymnasium.Env; got builtins.int"):
        Adapter(3)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def register() -> Iterator[Callable[..., str]]:
    """Registers environments for one test."""
    names = []

    def add(entry_point: Any, **options: Any) -> str:
        names.append(f"Mine{len(names)}-v0")
        gymnasium.register(names[-1], entry_point=entry_point, **options)
        return names[-1]

    yield add
    for name in names:
        gymnasium.registry.pop(name)


def test_an_episode_without_an_end_ends(register: Callable[..., str]) -> None:
    endless = register(lambda: Fake(infos=({},) * 3000))
    for arguments, cap in (({}, 1000), ({"max_episode_steps": -1}, 1000), ({"max_episode_steps": 1500}, None)):
        env = EnvSpec(endless, arguments, success="none")()
        assert capped_steps(env) == cap
        env.reset(seed=0)
        steps = 1
        while not env.step(np.zeros(2))[3]:
            steps += 1
        assert steps == (cap or 1500)
    assert capped_steps(MOUNTAIN_CAR()) is None


def test_a_picture_is_made_as_is_asked_whatever_stands_among_the_arguments() -> None:
    task = EnvSpec("Pendulum-v1", {"render_mode": "rgb_array_list"}, "none")
    assert task().render_mode == "rgb_array_list"
    assert task(render_mode="rgb_array").render_mode == "rgb_array"


@pytest.mark.parametrize(
    "fails, said",
    [
        (RuntimeError("no GPU\nat all"), "could not be made: RuntimeError: no GPU at all"),
        (SystemExit(3), "could not be made: SystemExit: 3"),
        (KeyError("x"), "could not be made: KeyError: 'x'"),
        (ImportError("No module named 'mujoco'"), "could not be made: ImportError: No module named 'mujoco'"),
    ],
)
def test_constructors_that_print_and_fail_are_told_in_one_line(
    fails: BaseException, said: str, register: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    def make(**_: Any) -> gymnasium.Env:
        os.write(1, b"hello from the simulator")
        raise fails

    with pytest.raises(ValueError, match=said) as error:
        EnvSpec(register(make))()
    assert "\n" not in str(error.value)
    assert capfd.readouterr().out == ""


def test_a_checker_that_asserts_is_left_out(register: Callable[..., str]) -> None:
    class Odd(Fake):
        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
            return super().reset(seed=seed)[0].astype(np.float64), {}

    env = EnvSpec(register(Odd, max_episode_steps=5), success="none")()
    assert env.reset(seed=0)[0]["observation"].dtype == np.float32


# Success


@pytest.mark.parametrize("key", ["is_success", "success"])
def test_success_is_what_the_environment_says(key: str) -> None:
    assert finish(Adapter(Fake(infos=({key: False}, {key: np.True_}))))[0] == [False, False, True]
    assert finish(Adapter(Fake(infos=({}, {key: 1.0}))))[0] == [False, False, True]  # said only at the end


def test_an_environment_that_says_nothing_of_success_is_told_how_to() -> None:
    with pytest.raises(EnvSpecError, match=r"Fake gives no info\['is_success'\].*--success 'return>=NUMBER' or"):
        finish(Adapter(Fake()))


def test_the_return_counts_when_the_episode_ends() -> None:
    assert finish(Adapter(Fake(), -2.0))[0] == [False, False, True]  # the sum of costs has been above it all the time
    assert finish(Adapter(Fake(), -1.5))[0] == [False, False, False]


def test_the_return_is_a_measure_unless_the_environment_measures_itself() -> None:
    assert finish(Adapter(Fake(), 0.0))[1]["measures"] == {"return": -2.0}
    assert finish(Adapter(Fake(infos=({}, {"measures": {"score": 0.5}})), 0.0))[1]["measures"] == {"score": 0.5}


def test_a_users_functions_say_success_and_mode(my_task: str) -> None:
    task = EnvSpec(
        f"{my_task}:Walk-v0", {"max_episode_steps": 2}, f"{my_task}:far", f"{my_task}:side", ("left", "right")
    )
    env = task()
    env.reset(seed=0)
    answers = [env.step(np.ones(1))[-1]["is_success"] for _ in range(2)]
    assert answers == [True, True]
    assert env.get_wrapper_attr("modes") == ("left", "right")
    assert env.get_wrapper_attr("mode")({"observation": np.array([[0.1], [-0.1]])}) == "left"


def test_success_that_means_nothing_is_refused() -> None:
    for text in ("return>=much", "return>=nan", "score>=1"):
        with pytest.raises(EnvSpecError, match=r"success must be 'return>=NUMBER'.*got '(return|score)>="):
            EnvSpec("Pendulum-v1", success=text)()


# The user's modules


def test_functions_that_fail_are_named(my_task: str) -> None:
    env = Adapter(Fake(), load(f"{my_task}:broken"), load(f"{my_task}:broken"))
    env.reset(seed=0)
    for call in (lambda: env.step(np.zeros(2)), lambda: env.mode({})):
        with pytest.raises(EnvSpecError, match=rf"{my_task}:broken failed: KeyError: 'here'"):
            call()


def test_answers_that_are_no_answers_are_refused(my_task: str) -> None:
    env = Adapter(Fake(), load(f"{my_task}:silent"), load(f"{my_task}:silent"))
    env.reset(seed=0)
    with pytest.raises(EnvSpecError, match=f"{my_task}:silent must give True or False; got 3"):
        env.step(np.zeros(2))
    with pytest.raises(EnvSpecError, match=f"{my_task}:silent must give a text, or None; got 3"):
        env.mode({})
    env = Adapter(Fake(), mode=load(f"{my_task}:side"), modes=("up", "down"))
    with pytest.raises(EnvSpecError, match=f"{my_task}:side must give one of up, down, or None; got 'right'"):
        env.mode({"observation": np.ones((2, 1))})


def test_modules_and_functions_that_do_not_exist_are_named_with_the_nearest(my_task: str, tmp_path: Path) -> None:
    with pytest.raises(EnvSpecError, match=f"there is no module '{my_task}s'; did you mean '{my_task}'?"):
        load(f"{my_task}s:far")
    with pytest.raises(EnvSpecError, match=r"there is no module 'gymnasium\.space'; did you mean 'spaces'?"):
        load("gymnasium.space:Box")
    with pytest.raises(EnvSpecError, match=f"{my_task} has no function 'farr'; did you mean 'far'?"):
        load(f"{my_task}:farr")
    with pytest.raises(EnvSpecError, match=f"there is no module '{my_task}s'"):
        EnvSpec(f"{my_task}s:Walk-v0")()
    for name in ("far", ":far", f"{my_task}:"):
        with pytest.raises(EnvSpecError, match="a function is named module:function, such as my_task:mode; got"):
            load(name)
    (tmp_path / f"{my_task}_wrong.py").write_text("import nothing_such")
    importlib.invalidate_caches()
    with pytest.raises(
        EnvSpecError, match=f"importing {my_task}_wrong failed: ModuleNotFoundError: No module named 'noth"
    ):
        load(f"{my_task}_wrong:far")


def test_modes_need_a_function_and_differ() -> None:
    with pytest.raises(EnvSpecError, match="the modes left, right need a mode function"):
        EnvSpec("Pendulum-v1", modes=("left", "right"))
    with pytest.raises(EnvSpecError, match="each mode must be named once; got left, left"):
        EnvSpec("Pendulum-v1", mode="my_task:side", modes=("left", "left"))


def test_it_runs_in_spawned_processes(my_task: str) -> None:
    task = EnvSpec(f"{my_task}:Walk-v0", success=f"{my_task}:far")
    traces = []
    for workers in (1, 2):
        with EnvironmentPool(task, workers) as pool:
            starts = pool.reset({0: 5, 1: 6})
            stretches = pool.step({0: np.ones((1, 1)), 1: np.ones((1, 1))})
            traces.append([(starts[slot], stretches[slot]) for slot in (0, 1)])
    assert str(traces[0]) == str(traces[1])
    assert "is_success" in traces[0][0][1].info
    assert pickle.loads(pickle.dumps(task)) == task  # noqa: S301


# Tasks of ours


def test_a_task_of_ours_stays_as_it_is_unless_more_is_asked() -> None:
    env = EnvSpec(AVOID, {"rows": 1})()
    assert not isinstance(env, Adapter)
    env = EnvSpec(AVOID, {"rows": 1}, success="return>=1")()
    assert isinstance(env, Adapter)
    assert env.modes == ("left", "right")
    assert env.get_wrapper_attr("scene") == env.unwrapped.scene  # pyright: ignore[reportAttributeAccessIssue]
    env = EnvSpec(AVOID, mode=f"{EXAMPLES}:mountain_car_mode", modes=("left", "right"))()
    assert isinstance(env.unwrapped, AvoidEnv)
    assert env.get_wrapper_attr("mode")({"observation": np.array([[0.0, 0], [-0.1, 0]])}) == "left"


# Other people's environments


def test_gymnasium_checks_an_adapted_environment() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version.*")
        check_env(MOUNTAIN_CAR(), skip_render_check=True, skip_close_check=True)


@pytest.mark.parametrize(
    "task",
    [
        MOUNTAIN_CAR,
        EnvSpec("Pendulum-v1", {"g": 9.0}, "return>=-300"),
        pytest.param(REACH, marks=needs_panda),
        pytest.param(PUSH, marks=needs_panda),
    ],
    ids=lambda task: task.env,
)
def test_the_same_seed_gives_the_same_episode_whatever_came_before(task: EnvSpec) -> None:
    env = task()
    traces = []
    for seed in (3, 4, 3):
        observation, _ = env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        trace = [observation]
        for _ in range(25):
            trace.append(env.step(rng.uniform(env.action_space.low, env.action_space.high))[0])
            assert trace[-1] in env.observation_space
        traces.append(trace)
    assert str(traces[0]) == str(traces[2]) != str(traces[1])
    env.close()
    env.close()


@needs_panda
def test_it_is_quiet_while_an_environment_is_made(capfd: pytest.CaptureFixture[str]) -> None:
    REACH().close()
    assert capfd.readouterr() == ("", "")


@needs_panda
@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("task, expert", [(REACH, PandaReachExpert), (PUSH, PandaPushExpert)], ids=["reach", "push"])
def test_the_panda_reaches_and_pushes(task: EnvSpec, expert: type, noise: float) -> None:
    env = task()
    shown = [show(env, expert(None), seed, noise) for seed in range(4)]
    assert all(success and mode is None and steps < 50 for success, mode, steps in shown)
    env.close()


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_the_car_swings_up_to_either_side_first(noise: float) -> None:
    env = MOUNTAIN_CAR()
    for seed in range(10):
        mode = MOUNTAIN_CAR_MODES[seed % 2]
        assert show(env, MountainCarExpert(mode), seed, noise)[:2] == (True, mode)
    assert mountain_car_mode({"observation": np.zeros((5, 2))}) is None


def test_the_flag_is_a_success_of_its_own() -> None:
    env = EnvSpec("MountainCarContinuous-v0", success=f"{EXAMPLES}:mountain_car_success")()
    success, _, steps = show(env, MountainCarExpert("left"), 0, 0.0)
    assert success
    assert steps < 200


@pytest.mark.parametrize("expert, mode", [(PandaReachExpert, "up"), (PandaPushExpert, "up"), (MountainCarExpert, "up")])
def test_experts_refuse_modes_that_they_do_not_know(expert: type, mode: str) -> None:
    with pytest.raises(ValueError, match=r"mode.*'up'"):
        expert(mode)
    with pytest.raises(ValueError, match="unknown mode None; choose from left, right"):
        MountainCarExpert(None)

"""The wrappers and the time limit under which something was recorded: kept and put on again, or named and refused."""

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.wrappers import (
    AddRenderObservation,
    AddWhiteNoise,
    ClipAction,
    DelayObservation,
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    ObstructView,
    RecordEpisodeStatistics,
    RepeatAction,
    RescaleAction,
    ReshapeObservation,
    TimeAwareObservation,
    TimeLimit,
    TransformAction,
    TransformObservation,
)

from diffusion_policy.commands.environment import choose_env_spec
from diffusion_policy.config import ConfigError, SuccessAndModes
from diffusion_policy.datasets.recorder import Recorder
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.protocols import layers
from diffusion_policy.envs.spaces import EnvSpecError
from diffusion_policy.envs.wrappers import KEPT, UNSEEN, describe_env, lost

MINE = """
import gymnasium

class Half(gymnasium.ActionWrapper, gymnasium.utils.RecordConstructorArgs):
    def __init__(self, env, share):
        gymnasium.utils.RecordConstructorArgs.__init__(self, share=share)
        gymnasium.ActionWrapper.__init__(self, env)
        self.share = share
    def action(self, action):
        return action * self.share

class Gain(gymnasium.wrappers.RescaleAction):
    def __init__(self, env, min_action=-10.0, max_action=10.0, gain=1.0):
        super().__init__(env, min_action, max_action)

class Forgetful(gymnasium.ActionWrapper, gymnasium.utils.RecordConstructorArgs):
    def __init__(self, env, gain=1.0):
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        gymnasium.ActionWrapper.__init__(self, env)

class Open(gymnasium.wrappers.RescaleAction):
    def __init__(self, env, **kwargs):
        super().__init__(env, -10.0, 10.0)

class Silent(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    def __init__(self, env, gain=1.0):
        gymnasium.Wrapper.__init__(self, env)

class Same(gymnasium.wrappers.RescaleAction):
    pass

def Plain(env):
    raise RuntimeError("called")
"""


def pendulum(**arguments: Any) -> gymnasium.Env:
    return gymnasium.make("Pendulum-v1", **{"max_episode_steps": 6, **arguments})


def rescaled(env: gymnasium.Env) -> gymnasium.Env:
    return RescaleAction(env, np.array([-1], np.float32), np.array([1], np.float32))


def play(env: gymnasium.Env) -> list[np.ndarray]:
    """An episode of one seed under one force; what was observed."""
    observation, _ = env.reset(seed=3)
    trace, ended = [observation], False
    while not ended:
        observation, _, terminated, truncated, _ = env.step(np.full(1, 0.5, np.float32))
        trace.append(observation)
        ended = terminated or truncated
    return trace


def record(env: gymnasium.Env, path: Path) -> dict[str, Any]:
    """Record one episode; what the store says of its environment."""
    with Recorder(env, path) as recorder:
        play(recorder)
    return EpisodeStore.open(path).attributes["environment"]


def choose(environment: dict[str, Any], env: str | None = None, env_kwargs: str | None = None) -> EnvSpec:
    environment = json.loads(json.dumps(environment))  # as a file gives it
    return replace(choose_env_spec("a.zarr", environment, env, env_kwargs, SuccessAndModes())[0], success="none")


@pytest.mark.parametrize(
    "wrap",
    [
        rescaled,
        ClipAction,
        TimeAwareObservation,
        lambda env: FrameStackObservation(env, 3),
        lambda env: ReshapeObservation(env, (3, 1)),
        lambda env: DelayObservation(env, 2),
        lambda env: TimeLimit(env, 4),
        lambda env: TimeLimit(RepeatAction(rescaled(env), 2), 2),
        lambda env: RecordEpisodeStatistics(NormalizeReward(env)),  # what these change is not recorded
        lambda env: gymnasium.make("Pendulum-v1", max_episode_steps=5, g=3.0),
    ],
)
def test_an_environment_is_made_again_as_it_was_recorded(
    wrap: Callable[[gymnasium.Env], gymnasium.Env], tmp_path: Path
) -> None:
    task = choose(record(wrap(pendulum()), tmp_path / "a.zarr"))
    (episode,) = EpisodeStore.open(tmp_path / "a.zarr").episodes()
    rows = [*episode.data["observation"], (episode.final or {})["observation"]]
    again = [observation["observation"] for observation in play(task())]
    np.testing.assert_array_equal(again, rows)
    assert again[0].dtype == rows[0].dtype


def test_a_limit_as_it_is_registered_is_not_written_and_none_is() -> None:
    assert describe_env(gymnasium.make("Pendulum-v1")) == {"id": "Pendulum-v1", "arguments": {}}
    assert describe_env(gymnasium.make("Pendulum-v1", max_episode_steps=-1)) == {
        "id": "Pendulum-v1",
        "arguments": {"max_episode_steps": -1},
    }
    assert describe_env(pendulum(render_mode="rgb_array")) == {
        "id": "Pendulum-v1",
        "arguments": {"max_episode_steps": 6},
    }


class Unknown(gymnasium.Wrapper):
    """Says nothing of its arguments."""


@pytest.mark.parametrize(
    "wrap, name",
    [
        (lambda env: TransformAction(env, lambda action: -action, env.action_space), "TransformAction"),
        (lambda env: TransformObservation(env, np.negative, env.observation_space), "TransformObservation"),
        (NormalizeObservation, "NormalizeObservation"),
        (Unknown, "Unknown"),
        (lambda env: pendulum(g=np.float64), "the argument g of Pendulum-v1"),
    ],
)
def test_what_cannot_be_kept_is_named_at_once_and_refused_later(
    wrap: Callable[[gymnasium.Env], gymnasium.Env], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match=f"cannot keep {name}: to act in this environment"):
        Recorder(wrap(rescaled(pendulum())), tmp_path / "a.zarr").close()
    environment = EpisodeStore.append_to(tmp_path / "a.zarr").attributes["environment"]
    with pytest.raises(ConfigError, match=f"recorded under what no file can keep: .*{name}; register an environment"):
        choose(environment)
    task = choose(environment, env="Pendulum-v1")  # named by the user, who answers for it
    assert task.wrappers == ()
    assert name in " ".join(capsys.readouterr().err.split())


def test_a_wrapper_of_somebodys_module_is_imported_only_where_the_user_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_half.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    environment = record(importlib.import_module("my_half").Half(pendulum(), 0.5), tmp_path / "a.zarr")
    assert environment["wrappers"] == [{"entry_point": "my_half:Half", "kwargs": {"share": 0.5}}]
    del sys.modules["my_half"]
    with pytest.raises(ConfigError, match=r"module my_half, which would be imported; .*--env my_half:Pendulum-v1"):
        choose(environment)
    assert choose(environment, env="Pendulum-v1").wrappers == ()
    assert "made as it is registered, without what" in " ".join(capsys.readouterr().err.split())
    assert "my_half" not in sys.modules
    forged = {**environment, "wrappers": [{"entry_point": "my_half:Plain", "kwargs": {}}]}
    with pytest.raises(EnvSpecError, match="my_half:Plain is no wrapper of environments"):
        choose(forged, env="my_half:Pendulum-v1")()
    (episode,) = EpisodeStore.open(tmp_path / "a.zarr").episodes()
    again = play(choose(environment, env="my_half:Pendulum-v1")())
    np.testing.assert_array_equal([row["observation"] for row in again[:-1]], episode.data["observation"])


@pytest.mark.parametrize(
    "wrapped, said",
    [
        ({"entry_point": "gymnasium.wrappers:no_such", "kwargs": {}}, "what no file can keep: no_such"),
        ({"entry_point": "gymnasium.wrappers.stateful_observation:NormalizeObservation", "kwargs": {}}, "no file can"),
        ({"entry_point": "my:Wrapper", "kwargs": None, "name": "Mine"}, "what no file can keep: Mine"),
        ({"entry_point": "os:system", "kwargs": {"command": "true"}}, "the module os, which would be imported"),
        ({"entry_point": 3}, "does not say its wrappers"),
        ("RescaleAction", "does not say its wrappers"),
    ],
)
def test_a_file_makes_no_other_wrappers(wrapped: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose({"id": "Pendulum-v1", "arguments": {}, "wrappers": [wrapped]})


def test_what_changes_nothing_that_is_observed_is_not_made_from_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    video = {"entry_point": "gymnasium.wrappers.rendering:RecordVideo", "kwargs": {"video_folder": str(folder)}}
    order = {"entry_point": "gymnasium.wrappers.common:OrderEnforcing", "kwargs": None}
    play(choose({"id": "Pendulum-v1", "arguments": {}, "wrappers": [video, order]})())
    assert not folder.exists()


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("stateful_observation:FrameStackObservation", {"stack_size": 10**9}),
        ("transform_observation:ResizeObservation", {"shape": [10**6, 10**6]}),
        ("transform_observation:FlattenObservation", {"to": 1}),
        ("transform_action:RescaleAction", {"min_action": {"array": ["a"], "dtype": "O"}, "max_action": 1}),
    ],
)
def test_wrappers_that_cannot_be_put_on_are_told_in_one_line(name: str, kwargs: dict[str, Any]) -> None:
    task = choose(
        {
            "id": "Pendulum-v1",
            "arguments": {},
            "wrappers": [{"entry_point": f"gymnasium.wrappers.{name}", "kwargs": kwargs}],
        }
    )
    with pytest.raises(EnvSpecError) as error:
        task()
    assert "\n" not in str(error.value)


def test_wrappers_that_come_with_an_id_are_not_put_on_twice(tmp_path: Path) -> None:
    gymnasium.register("Registered-v0", entry_point=lambda: rescaled(pendulum()), max_episode_steps=4)
    try:
        environment = record(FrameStackObservation(gymnasium.make("Registered-v0"), 2), tmp_path / "a.zarr")
        assert [one["entry_point"].rpartition(":")[2] for one in environment["wrappers"]] == ["FrameStackObservation"]
        again = play(choose(environment)())
        (episode,) = EpisodeStore.open(tmp_path / "a.zarr").episodes()
        np.testing.assert_array_equal([row["observation"] for row in again[:-1]], episode.data["observation"])
    finally:
        gymnasium.registry.pop("Registered-v0")


PENDULUM = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
LISTED = {
    "repeated": (RepeatAction.wrapper_spec(num_repeats=2),),
    "limited": (TimeLimit.wrapper_spec(max_episode_steps=3), FrameStackObservation.wrapper_spec(stack_size=2)),
    "with a function": (TransformAction.wrapper_spec(func=np.negative, action_space=None),),
    "unseen": (RecordEpisodeStatistics.wrapper_spec(), rescaled(pendulum()).spec.additional_wrappers[0]),  # pyright: ignore
}


@pytest.mark.parametrize("listed", LISTED.values(), ids=LISTED)
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: env,
        lambda env: ClipAction(FrameStackObservation(env, 2)),
        lambda env: TimeLimit(env, 2),
        lambda env: gymnasium.make(DelayObservation(env, 1).spec or ""),
        lambda env: RepeatAction(env, 2),
    ],
)
def test_wrappers_that_a_registration_lists_are_not_put_on_twice(
    listed: Any, limit: int | None, wrap: Callable[[gymnasium.Env], gymnasium.Env]
) -> None:
    gymnasium.register("Listed-v0", PENDULUM, max_episode_steps=limit, additional_wrappers=listed)
    try:
        env = wrap(gymnasium.make("Listed-v0"))
        task = choose(describe_env(env) or {})
        again, count = task(), 6
        assert names(again) == names(env)
        observed, _ = env.reset(seed=3)
        given, _ = again.reset(seed=3)
        ended = False
        while count and not ended:
            np.testing.assert_array_equal(given["observation"], observed)
            observed, _, *ends, _ = env.step(np.full(1, 0.5, np.float32))
            given, _, *again_ends, _ = again.step(np.full(1, 0.5, np.float32))
            assert again_ends == ends
            count, ended = count - 1, any(ends)
    finally:
        gymnasium.registry.pop("Listed-v0")


def names(env: gymnasium.Env) -> list[str]:
    """The wrappers around an environment, without those that stand around every one."""
    told = [type(layer).__name__ for layer in layers(env)]
    return [name for name in told if name not in ("Adapter", "Capped", "Contract", "PassiveEnvChecker")]


@pytest.mark.parametrize("listed", [(), (RepeatAction.wrapper_spec(num_repeats=3),)])
def test_a_change_to_the_wrappers_that_a_registration_lists_is_named(listed: Any) -> None:
    wrappers = (RepeatAction.wrapper_spec(num_repeats=2),)
    gymnasium.register("Listed-v0", PENDULUM, max_episode_steps=4, additional_wrappers=wrappers)
    try:
        spec = replace(gymnasium.registry["Listed-v0"], additional_wrappers=listed)
        environment = describe_env(gymnasium.make(spec)) or {}
        assert environment["arguments"] == {}
        assert lost(environment["wrappers"]) == ["a change to the registered RepeatAction"]
    finally:
        gymnasium.registry.pop("Listed-v0")


@pytest.mark.filterwarnings("ignore:.*precision lowered")
@pytest.mark.parametrize("kind", ["Gain", "Forgetful", "Open", "Silent"])
def test_a_wrapper_that_has_not_saved_all_its_arguments_is_lost(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_gains.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_gains")
    assert (describe_env(getattr(module, kind)(pendulum())) or {})["wrappers"] == [{"entry_point": None, "name": kind}]
    (same,) = (describe_env(module.Same(pendulum(), -1.0, 1.0)) or {})["wrappers"]
    assert same == {"entry_point": "my_gains:Same", "kwargs": {"min_action": -1.0, "max_action": 1.0}}


class Grey(gymnasium.Env):
    """Looks always the same."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space, action_space = Box(-1, 1, (1,)), Box(-1, 1, (1,))

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self) -> Any:
        return np.full((24, 24, 3), 200, np.uint8)


@pytest.mark.parametrize("wrap", [lambda env: AddWhiteNoise(env, 0.5), lambda env: ObstructView(env, 0.5, 4)])
def test_what_changes_pictures_is_kept_where_they_are_observed(
    wrap: Callable[[gymnasium.Env], gymnasium.Env], tmp_path: Path
) -> None:
    gymnasium.register("Grey-v0", f"{__name__}:Grey", max_episode_steps=3)
    try:
        grey = gymnasium.make("Grey-v0", render_mode="rgb_array")
        task = choose(record(AddRenderObservation(wrap(grey)), tmp_path / "a.zarr"))
        (episode,) = EpisodeStore.open(tmp_path / "a.zarr").episodes()
        again = [row["observation"] for row in play(task())]
        np.testing.assert_array_equal(again[:-1], episode.data["observation"])
        assert len(np.unique(again[0])) > 1  # there is something to see
        assert describe_env(wrap(grey)) == {"id": "Grey-v0", "arguments": {}}
        (kept,) = (describe_env(wrap(AddRenderObservation(grey))) or {})["wrappers"]
        assert kept["entry_point"].endswith(":AddRenderObservation")
    finally:
        gymnasium.registry.pop("Grey-v0")


def test_wrappers_of_which_nobody_knows_whether_they_come_with_the_id_are_named(tmp_path: Path) -> None:
    gymnasium.register("Bare-v0", entry_point=lambda: pendulum().unwrapped, order_enforce=False)
    try:
        env = rescaled(gymnasium.make("Bare-v0", disable_env_checker=True, max_episode_steps=5))
        with pytest.warns(UserWarning, match="cannot keep RescaleAction"):
            Recorder(env, tmp_path / "a.zarr").close()
    finally:
        gymnasium.registry.pop("Bare-v0")


def test_only_wrappers_within_the_recorder_count(tmp_path: Path) -> None:
    outside = rescaled(Recorder(pendulum(), tmp_path / "a.zarr"))
    play(outside)
    outside.close()
    assert EpisodeStore.open(tmp_path / "a.zarr").attributes["environment"].keys() == {"id", "arguments"}
    assert EpisodeStore.open(tmp_path / "a.zarr").read("action").max() == 1.0  # what the environment got


def test_an_environment_that_a_task_made_is_recorded_as_that_task(tmp_path: Path) -> None:
    wrappers = ({"entry_point": "gymnasium.wrappers.transform_action:ClipAction", "kwargs": {}},)
    task = EnvSpec("Pendulum-v1", {"max_episode_steps": 4}, "return>=-300", fresh=True, wrappers=wrappers)
    environment = record(task(), tmp_path / "a.zarr")
    assert environment == task.described
    assert choose_env_spec("a.zarr", environment, None, None, SuccessAndModes())[0] == task
    with pytest.warns(UserWarning, match="cannot keep FrameStackObservation"):
        Recorder(FrameStackObservation(task(), 2), tmp_path / "b.zarr").close()


def test_an_environment_of_no_known_making_is_not_named(tmp_path: Path) -> None:
    with Recorder(TimeLimit(gymnasium.make("Pendulum-v1").unwrapped.__class__(), 3), tmp_path / "a.zarr") as env:
        play(env)
    with pytest.raises(ConfigError, match="names no environment; give one with --env"):
        choose(EpisodeStore.open(tmp_path / "a.zarr").attributes.get("environment", {}))


def test_attributes_of_the_users_go_before_what_was_found(tmp_path: Path) -> None:
    mine = {"id": "Mine-v0", "arguments": {}}
    with (
        warnings.catch_warnings(),
        Recorder(NormalizeObservation(pendulum()), tmp_path / "a.zarr", {"environment": mine}),
    ):
        pass
    assert EpisodeStore.append_to(tmp_path / "a.zarr").attributes["environment"] == mine


def test_an_id_is_the_same_with_the_module_that_registers_it() -> None:
    environment = {"id": "PandaReach-v3", "arguments": {"max_episode_steps": 7}}
    assert choose_env_spec("a.zarr", environment, "panda_gym:PandaReach-v3", None, SuccessAndModes())[0].arguments == {
        "max_episode_steps": 7
    }


def test_every_wrapper_of_gymnasiums_has_one_place() -> None:
    assert not KEPT & UNSEEN
    for name in KEPT | UNSEEN:
        assert hasattr(gymnasium.wrappers, name)

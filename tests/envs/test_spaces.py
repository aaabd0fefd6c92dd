"""One idea of what an observation is called and shaped: what the recorder stores is what an adapter observes."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

from diffusion_policy.datasets.recorder import Recorder
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.adapters import Adapter
from diffusion_policy.envs.spaces import EnvSpecError, observe, observed_parts

ROW, ACTION = Box(-1, 1, (1,)), Box(-1, 1, (2,))


class Fake(gymnasium.Env):
    """Observes samples of its space, and takes only actions of its own."""

    def __init__(self, observation_space: Any = ROW, action_space: Any = ACTION) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert action in self.action_space
        self.steps += 1
        return self.observation_space.sample(), 0.0, self.steps == 3, False, {"success": True}


def record(env: gymnasium.Env, path: Path) -> EpisodeStore:
    """One episode of seed 0."""
    with Recorder(env, path) as recorder:
        recorder.reset(seed=0)
        recorder.action_space.seed(0)
        for _ in range(3):
            recorder.step(recorder.action_space.sample())
    return EpisodeStore.open(path)


@pytest.mark.parametrize(
    "space, names",
    [
        (Box(-1, 1, (2,)), {"observation": ("float32", (2,))}),
        (Box(-1e7, 1e7, (2,), np.float64), {"observation": ("float64", (2,))}),
        (Box(-1, 1, ()), {"observation": ("float32", (1,))}),
        (Box(-1, 1, (2, 3)), {"observation": ("float32", (2, 3))}),
        (Box(0, 255, (4, 4, 3), np.uint8), {"observation": ("uint8", (4, 4, 3))}),
        (Box(-5, 5, (2,), np.int64), {"observation": ("int64", (2,))}),
        (Box(0, 1, (2,), np.bool_), {"observation": ("float32", (2,))}),
        (Discrete(4, start=-1), {"observation": ("float32", (4,))}),
        (MultiDiscrete([2, 3]), {"observation": ("float32", (5,))}),
        (MultiBinary((2, 2)), {"observation": ("float32", (4,))}),
        (Tuple((ROW, Discrete(2))), {"0": ("float32", (1,)), "1": ("float32", (2,))}),
        (Dict({"a": Dict({"b": ROW}), "t": Tuple((ROW,))}), {"a.b": ("float32", (1,)), "t.0": ("float32", (1,))}),
        (Dict({"arm pos": ROW, "cam/x": ROW, "observation": ROW}),
         dict.fromkeys(("arm_pos", "cam.x", "observation"), ("float32", (1,)))),
    ],
    ids=str,
)  # fmt: skip
def test_the_recorder_stores_what_an_adapter_observes(space: Any, names: dict, tmp_path: Path) -> None:
    store = record(Fake(space), tmp_path / "s.zarr")
    kept = {key: (store.dtype(key).name, store.shape(key)) for key in store.keys if key != "action"}
    assert kept == names
    assert store.observation_keys == tuple(sorted(names))
    env = Adapter(Fake(space))
    (episode,) = store.episodes()
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    for step, action in enumerate(episode.data["action"]):
        for key, value in observation.items():
            np.testing.assert_array_equal(episode.data[key][step], value)
            assert episode.data[key].dtype == value.dtype
        observation = env.step(action)[0]


@pytest.mark.parametrize(
    "space, row",
    [(Box(-1, 1, (2, 3)), 6), (Box(-1, 1, ()), 1), (Box(-1, 1, (2,), np.float64), 2)],
    ids=["matrix", "number", "doubles"],
)
def test_actions_of_every_shape_are_rows(space: Box, row: int, tmp_path: Path) -> None:
    store = record(Fake(action_space=space), tmp_path / "s.zarr")
    assert (store.shape("action"), store.dtype("action")) == ((row,), space.dtype)
    env = Adapter(Fake(action_space=space))
    assert env.action_space.shape == (row,)
    env.reset(seed=0)
    env.step(store.read("action")[0])  # Fake asserts that it gets its own shape back


@pytest.mark.parametrize(
    "observation, action",
    [
        (Text(4), ROW),
        (Sequence(ROW), ROW),
        (Box(-1, 1, (0,)), ROW),
        (Dict({"action": ROW}), ROW),
        (Dict({"a b": ROW, "a_b": ROW}), ROW),
        (Dict({".x": ROW}), ROW),
        (Dict({"x" * 201: ROW}), ROW),
        (ROW, Discrete(3)),
        (ROW, Box(0, 3, (2,), np.int64)),
        (ROW, Dict({"arm": ROW})),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_alike_before_anything_is_begun(
    observation: Any, action: Any, tmp_path: Path
) -> None:
    said = []
    for take in (Adapter, lambda env: Recorder(env, tmp_path / "s.zarr")):
        with pytest.raises(EnvSpecError) as error:
            take(Fake(observation, action))
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    assert not (tmp_path / "s.zarr").exists()


def test_observations_that_are_not_of_their_space_are_told_in_one_line() -> None:
    parts = observed_parts(Dict({"a": Box(-1, 1, (2, 3)), "n": Box(0, 9, (1,), np.uint8)}), "Mine")
    for wrong in (
        {"a": np.zeros((3, 2)), "n": [1]},
        {"a": np.zeros((2, 3)), "n": [0.5]},
        {"n": [1]},
        None,
        {"a": "text", "n": [1]},
    ):
        with pytest.raises(EnvSpecError, match=r"^Mine gives .*observation space") as error:
            observe(parts, wrong, "Mine")
        assert "\n" not in str(error.value)
    observed = observe(parts, {"a": np.zeros((2, 3), np.float64), "n": 1}, "Mine")
    assert observed["a"].dtype == np.float32
    assert observed["n"].tolist() == [1]


@pytest.mark.parametrize(
    "space, wrong, said",
    [
        (Box(0, 255, (2,), np.uint8), [300, 5], "300, which uint8"),
        (Box(0, 255, (2,), np.uint8), np.array([5, -5]), "-5, which uint8"),
        (Box(0, 1, (1,), np.uint64), [-1], "-1, which uint64"),
        (Box(-1, 1, (1,), np.int64), np.array([2**64 - 1], np.uint64), "18446744073709551615, which int64"),
        (Box(-1, 1, (2,)), [0.0, 1e300], r"1e\+300, which float32"),
        (Discrete(4), -1, "ValueError: got -1"),
        (Discrete(4), np.nan, "ValueError: got nan"),
        (Discrete(4), 2**70, "OverflowError"),
        (Discrete(4, start=2), 1, "ValueError: got 1"),
        (MultiDiscrete([2, 3]), [2, 0], r"ValueError: got \[2, 0\]"),
        (MultiBinary(2), [256, 1], r"ValueError: got \[256, 1\]"),
    ],
    ids=str,
)
def test_numbers_that_a_space_cannot_hold_are_told_and_not_changed(space: Any, wrong: Any, said: str) -> None:
    with pytest.raises(EnvSpecError, match=f"^Mine gives .*{said}") as error:
        observe(observed_parts(space, "Mine"), wrong, "Mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "space, given, kept",
    [
        (Box(0, 255, (2,), np.uint8), [255, 0], [255, 0]),
        (Box(-1, 1, (2,)), np.array([np.inf, 1e-300]), [np.inf, 0.0]),
        (Box(0, 1, (1,), np.uint8), np.array([True]), [1]),
        (Discrete(3), np.array([2]), [0, 0, 1]),
        (MultiBinary(2), np.array([True, False]), [1, 0]),
    ],
    ids=str,
)
def test_numbers_of_another_type_that_fit_are_taken(space: Any, given: Any, kept: list) -> None:
    np.testing.assert_array_equal(observe(observed_parts(space, "Mine"), given, "Mine")["observation"], kept)


@pytest.mark.parametrize(
    "space, said",
    [
        (Dict({"日本": ROW, "世界": ROW}), "'世界' and '日本', which would both be called '__'; rename one"),
        (Dict({"a": Dict({"b": ROW}), "a.b": ROW}), "'a/b' and 'a.b', which would both be called 'a.b'; rename one"),
    ],
    ids=["letters", "path"],
)
def test_two_names_that_would_be_one_are_both_said(space: Any, said: str) -> None:
    with pytest.raises(EnvSpecError, match=f"^Mine observes {said}$"):
        observed_parts(space, "Mine")

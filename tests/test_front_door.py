"""`import diffusion_policy as dp`: the verbs as functions, and the classes behind them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import diffusion_policy as dp
from diffusion_policy.config import ConfigError, SampleConfig
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.policy_planner import PolicyPlanner

SMALL = {"widths": [16, 32], "level_dim": 32, "noise_levels": 20, "batch_size": 32, "device": "cpu"}


def test_every_name_of_the_front_door_is_there_and_no_other() -> None:
    assert {name for names in dp.HOMES.values() for name in names} == set(dp.__all__)
    for name in dp.__all__:
        assert callable(getattr(dp, name))
    assert set(dp.__all__) <= set(dir(dp))
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        getattr(dp, "lode")  # noqa: B009


def test_importing_it_costs_no_torch() -> None:
    code = "import sys, diffusion_policy as dp; dir(dp); dp.PolicyConfig; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_options_are_the_flags_and_reach_what_they_name(demonstrations: Path, tmp_path: Path) -> None:
    dp.train(demonstrations, tmp_path / "run", steps=2, prediction="velocity", **SMALL)
    (config,) = (tmp_path / "run").glob("step-*/config.json")
    told = json.loads(config.read_text())
    assert told["policy"]["network"] == {
        "kind": "unet", "widths": [16, 32], "kernel_size": 5, "groups": 8, "level_dim": 32,
    }  # fmt: skip
    assert (told["policy"]["prediction"], told["training"]["batch_size"]) == ("velocity", 32)
    loaded = dp.load(tmp_path / "run", device="cpu")
    assert loaded.policy.config.network.widths == (16, 32)
    dp.collect(tmp_path / "a.zarr", env_kwargs={"rows": 1}, episodes=2, workers=1)
    assert dp.EpisodeStore.open(tmp_path / "a.zarr").attributes["environment"]["arguments"] == {"rows": 1}
    with pytest.raises(ConfigError, match=r"unknown option 'widhts'; did you mean widths\?"):
        dp.train(demonstrations, tmp_path / "no", widhts=(16, 32))
    with pytest.raises(ConfigError, match=r"unknown option 'sampling_step'; did you mean sampling_steps\?"):
        loaded.controller(sampling_step=3)


def test_one_robot_acts_as_one_of_many(run: Path) -> None:
    loaded = dp.load(run, device="cpu")
    one = loaded.controller(seed=3, action_horizon=2, sampling_steps=2)
    many = Controller(PolicyPlanner(loaded.policy, SampleConfig(sampling_steps=2)), 1, action_horizon=2)
    many.reset(np.ones(1, bool), [(3, 0)])
    planned = []
    for step in range(5):
        observation = {key: np.full(2, 0.1 * step) for key in ("desired_xy", "actual_xy")}
        action = one.act(observation)
        np.testing.assert_array_equal(action, many.act({key: value[None] for key, value in observation.items()})[0])
        planned.append(one.plan is not None)
    assert planned == [True, False, True, False, True]
    first = loaded.controller(seed=3, sampling_steps=2).act(observation)
    one.reset(seed=3)
    np.testing.assert_array_equal(one.act(observation), first)
    one.reset(seed=4)
    assert not np.array_equal(one.act(observation), first)

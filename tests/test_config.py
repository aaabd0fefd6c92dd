import dataclasses
import json
from typing import get_args

import pytest

from diffusion_policy.config import (
    ClipName,
    ConfigError,
    GuidanceScheduleName,
    PolicyConfig,
    PredictionName,
    SampleConfig,
    SamplerName,
    ScheduleName,
    SpacingName,
    TrainConfig,
    from_dict,
)
from diffusion_policy.guidance import CLIPS, GUIDANCE_SCHEDULES
from diffusion_policy.prediction import PREDICTIONS
from diffusion_policy.samplers import SAMPLERS
from diffusion_policy.schedules import SCHEDULES, SPACINGS


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (PolicyConfig, {"prediction_horizon": 10}, "prediction-horizon must be a multiple of 4.*got 10"),
        (PolicyConfig, {"action_horizon": 16}, r"action-horizon must be at most 15 .*got 16"),
        (PolicyConfig, {"observation_horizon": 0}, "observation-horizon must be at least 1; got 0"),
        (PolicyConfig, {"observation_horizon": 20}, "prediction-horizon must be at least the observation-horizon 20"),
        (PolicyConfig, {"kernel_size": -1}, "kernel-size must be odd; got -1"),
        (TrainConfig, {"seed": -1}, r"seed must be from 0 to below 2\^32; got -1"),
        (TrainConfig, {"seed": 2**32}, r"seed must be from 0 to below 2\^32"),
        (PolicyConfig, {"widths": ()}, "widths must be positive numbers"),
        (PolicyConfig, {"widths": (12, 24)}, r"widths must be multiples of the 8 groups; got \[12\]"),
        (PolicyConfig, {"kernel_size": 4}, "kernel-size must be odd; got 4"),
        (PolicyConfig, {"level_dim": 7}, "level-dim must be even"),
        (PolicyConfig, {"schedule": "cubic"}, "unknown schedule 'cubic'; choose from cosine, linear"),
        (TrainConfig, {"steps": 0}, "steps must be at least 1; got 0"),
        (TrainConfig, {"learning_rate": 0.0}, "learning-rate must be above 0"),
        (TrainConfig, {"validation_share": 1.0}, "validation-share must be from 0 to below 1"),
        (SampleConfig, {"sampler": "dmp"}, "unknown sampler 'dmp'; choose from ddim, ddpm"),
        (SampleConfig, {"sampling_steps": 0}, "sampling-steps must be at least 1; got 0"),
        (SampleConfig, {"eta": 1.5}, "eta must be from 0 to 1; got 1.5"),
        (SampleConfig, {"spacing": "odd"}, "unknown spacing 'odd'; choose from trailing, leading, even, log-snr"),
        (SampleConfig, {"clip": "hard"}, "unknown clip 'hard'; choose from static, dynamic, none"),
        (SampleConfig, {"corrector_steps": 1, "sampling_steps": 1}, "sampling-steps must be at least 2; got 1"),
        (SampleConfig, {"guidance": float("inf")}, "guidance must be at least -1; got inf"),
        (PolicyConfig, {"schedule_options": (float("nan"),)}, "schedule-options must be finite numbers"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(kind, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize("widths, horizon", [((64,), 1), ((64,), 7), ((64, 128), 6), ((64, 128, 256), 12)])
def test_only_the_real_down_samplings_bind_the_horizon(widths, horizon) -> None:
    config = PolicyConfig(widths=widths, prediction_horizon=horizon, observation_horizon=1, action_horizon=1)
    assert (config.widths, config.prediction_horizon) == (widths, horizon)


@pytest.mark.parametrize("config", [PolicyConfig(widths=(32, 64)), TrainConfig(steps=7), SampleConfig("ddpm", 3)])
def test_options_survive_json(config) -> None:
    assert from_dict(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown option 'batch_sise'; did you mean batch_size"):
        from_dict(TrainConfig, {"batch_sise": 3})
    with pytest.raises(ConfigError, match="unknown option 'zzz'; known are"):
        from_dict(TrainConfig, {"zzz": 3})


@pytest.mark.parametrize("options", [{"steps": "3"}, {"steps": 1.5}, {"learning_rate": True}, {"steps": None}])
def test_wrong_types_are_refused(options) -> None:
    with pytest.raises(ConfigError, match="must be"):
        from_dict(TrainConfig, options)


def test_options_that_are_no_object_or_hold_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="the options of TrainConfig must be a JSON object; got 3"):
        from_dict(TrainConfig, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"widths\[0\] must be a whole number; got 'a'"):
        from_dict(PolicyConfig, {"widths": ["a"]})


def test_the_names_that_options_allow_are_those_that_exist() -> None:
    assert set(get_args(ScheduleName)) == set(SCHEDULES)
    assert set(get_args(PredictionName)) == set(PREDICTIONS)
    assert set(get_args(SamplerName)) == set(SAMPLERS)
    assert set(get_args(SpacingName)) == set(SPACINGS)
    assert set(get_args(ClipName)) == set(CLIPS)
    assert set(get_args(GuidanceScheduleName)) == set(GUIDANCE_SCHEDULES)

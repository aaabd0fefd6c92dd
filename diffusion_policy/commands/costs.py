"""What --cost names: costs of ours, of the environment's plane, and of the user."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import gymnasium
import torch

from diffusion_policy.basics.images import is_image
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.config import OF_NOISE, OF_SEQUENCES, ConfigError, CostConfig
from diffusion_policy.control.arm_costs import ArmBarriers, arm_clearance
from diffusion_policy.control.costs import COSTS, GOAL, Barriers, Cost, Costs, Weighed, apart, clearance
from diffusion_policy.control.preference import Preference
from diffusion_policy.envs import modules
from diffusion_policy.envs.protocols import as_armed, as_obstructed
from diffusion_policy.networks.sequences import TARGET
from diffusion_policy.policy import Lead


def with_costs(loaded: Checkpoint, env: gymnasium.Env, config: CostConfig) -> Checkpoint:
    """With the policy led by the costs that the options name, in an environment of which it then takes all numbers.
    Raises ConfigError for unknown costs."""
    if not config.leads:
        return loaded
    spaces = env.observation_space
    watched = {
        key: part.shape
        for key, part in spaces.items()  # pyright: ignore[reportAttributeAccessIssue]
        if not is_image(part.shape)
    }
    armed = as_armed(env)
    return led_by(loaded, config, watched, 2 if armed is None else len(armed.arm.origins), env)


def led_by(
    loaded: Checkpoint,
    config: CostConfig,
    watched: Mapping[str, tuple[int, ...]],
    columns: int,
    env: gymnasium.Env | None = None,
) -> Checkpoint:
    """The same, of places in the first so many columns of what is predicted; `watched`: shapes of the observations that
    costs see; without an environment nothing stands in the way."""
    predicted = tuple(loaded.policy.shapes.target) or ("action",)
    unknown = [key for key in config.cost_key if key not in predicted]
    if unknown:
        raise ConfigError(f"--cost-key must name what is predicted, {', '.join(predicted)}; got {unknown[0]}")
    leads: list[Lead] = [find_preference(loaded, config, watched)] if config.classifier is not None else []
    if config.cost:
        leads.append(find_costs(config, predicted, watched, columns, env))
    return dataclasses.replace(loaded, policy=loaded.policy.with_leads(leads, watched))


def find_costs(
    config: CostConfig,
    predicted: tuple[str, ...],
    watched: Collection[str],
    columns: int,
    env: gymnasium.Env | None,
) -> Costs:
    """The costs of --cost and its companions; raises ConfigError where `find_cost` does."""
    return Costs(
        tuple(find_cost(text, env, watched, config.cost_margin) for text in config.cost),
        config.cost_key or predicted,
        config.cost_from,
        config.cost_steps,
        config.cost_size,
        columns,
    )


def find_preference(loaded: Checkpoint, config: CostConfig, watched: Collection[str]) -> Preference:
    """The classifier of --classifier and its mode. Raises ConfigError for another run, for one of other sequences than
    the policy's, or of observations that are not there, and for a mode that it does not know; CheckpointError where
    there is none."""
    assert config.classifier is not None
    assert config.classifier_mode is not None
    found = checkpoint.load(checkpoint.find(Path(config.classifier)), loaded.policy.device)
    classifier, led = found.policy, loaded.policy
    if classifier.config.objective != "classifying":
        raise ConfigError(f"--classifier needs a run of train-classifier; {config.classifier} is none")
    for name in (*OF_SEQUENCES, *OF_NOISE):
        own, other = getattr(classifier.config, name), getattr(led.config, name)
        if own != other:
            raise ConfigError(f"a classifier has the {name.replace('_', '-')} of the policy, {other}; got {own}")
    numbers = [one.normalizer.state_dict() for one in (classifier, led)]
    scales = [{name: of[name].tolist() for name in of if name.startswith(f"{TARGET}_")} for of in numbers]
    if scales[0] != scales[1]:
        raise ConfigError(f"{config.classifier} normalizes other actions than the policy: train both on one dataset")
    lacking = [key for key in classifier.keys if key not in watched]
    if lacking:
        raise ConfigError(f"{config.classifier} observes {lacking[0]}; there are {', '.join(watched)}")
    if config.classifier_mode not in classifier.modes:
        known = ", ".join(classifier.modes)
        raise ConfigError(f"classifier-mode must be one of {known}; got {config.classifier_mode}")
    return Preference(classifier.eval(), config.classifier_mode, config.classifier_weight)


def find_cost(text: str, env: gymnasium.Env | None, watched: Collection[str], margin: float) -> Weighed:
    """One of --cost, such as `clearance=0.5`; raises ConfigError for others, and for one that lacks what it takes."""
    name, _, weight = text.partition("=")
    try:
        weighs = float(weight or 1)
    except ValueError:
        weighs = math.nan
    if not math.isfinite(weighs):
        raise ConfigError(f"--cost must be a name and a number, as clearance=0.5; got {text!r}")
    if ":" in name:
        return Weighed(name, partial(modules.call, modules.load(name)), weighs)
    if name == "goal" and GOAL not in watched:
        raise ConfigError(f"the cost goal needs an observation `goal`; there are {', '.join(watched)}")
    if name == "clearance":
        return Weighed(name, find_clearance(env, margin), weighs)
    if name == "apart":
        return Weighed(name, partial(apart, margin), weighs)
    if name not in COSTS:
        known = ", ".join(sorted({*COSTS, "clearance", "apart"}))
        raise ConfigError(f"unknown cost {name!r}; choose from {known}, or a function, as module:function")
    return Weighed(name, COSTS[name], weighs)


def find_clearance(env: gymnasium.Env | None, margin: float) -> Cost:
    """The cost of what stands in the way in an environment; raises ConfigError for one that does not say it."""
    armed, obstructed = (None, None) if env is None else (as_armed(env), as_obstructed(env))
    if armed is not None:
        origins, balls, boxes = (torch.from_numpy(part) for part in armed.arm)
        return partial(arm_clearance, ArmBarriers(origins, balls, boxes, margin))
    if obstructed is None:
        raise ConfigError("the cost clearance needs an environment that says what stands in it, as Maze-v0 does")
    boxes, room, radius = obstructed.barriers
    return partial(clearance, Barriers(torch.from_numpy(boxes), torch.from_numpy(room), radius, margin))

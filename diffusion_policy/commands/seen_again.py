"""What an episode's policy saw: the images that a recording leaves out, drawn again from its seed and its actions.

Knows episodes and environments. Samples nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np

from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.config import ConfigError
from diffusion_policy.envs.wrappers import look
from diffusion_policy.evaluation.episode import Episode


def see_again(loaded: PolicyInEnv, episode: Episode, steps: Sequence[int]) -> Episode:
    """The episode with the images that its policy planned from at these steps, black ones at all others; itself where
    it lacks none. Raises ConfigError where the environment does not repeat it."""
    shapes = loaded.policy.watched
    lacking = {key: shape for key, shape in shapes.items() if key not in episode.observations}
    if not lacking or not len(steps):
        return episode
    before = loaded.policy.config.observation_horizon - 1
    wanted = {max(0, step - i) for step in steps for i in range(before + 1)}
    rows = len(episode.actions) + 1
    images = {key: np.zeros((rows, *shape), np.uint8) for key, shape in lacking.items()}
    for step in range(max(wanted) + 1):
        observation = _observe(loaded.env, episode, step, step in wanted)
        _require_repeated(loaded.env_id, episode, observation, step)
        for key, seen in images.items() if step in wanted else ():
            seen[step] = observation[key]
    return replace(episode, observations={**episode.observations, **images})


def _observe(env: gymnasium.Env, episode: Episode, step: int, looking: bool) -> Mapping[str, Any]:
    """What is observed at the next step of an episode."""
    look(env, looking)
    try:
        return env.step(episode.actions[step - 1])[0] if step else env.reset(seed=episode.seed)[0]
    finally:
        look(env, True)


def _require_repeated(env_id: str, episode: Episode, observation: Mapping[str, Any], step: int) -> None:
    for key, rows in episode.observations.items():
        if not np.array_equal(observation[key], rows[step], equal_nan=rows.dtype.kind == "f"):
            raise ConfigError(
                f"{env_id} does not repeat the episode of seed {episode.seed}, so its images cannot be drawn again: "
                f"{key} differs at step {step}"
            )

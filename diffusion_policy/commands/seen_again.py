"""What an episode's policy saw: the images that a recording leaves out, drawn again from its seed and its actions, and
where its encoders look in them.

Knows episodes and environments. Samples nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch

from diffusion_policy.basics.images import as_observed
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.config import ConfigError
from diffusion_policy.envs.wrappers import look
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.networks.vision import center_crop
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.report.evaluation_figures import Sight


def see_again(loaded: PolicyInEnv, episode: Episode, steps: Sequence[int]) -> Episode:
    """The episode with the images that its policy planned from at these steps, black ones at all others; itself where
    it lacks none. Raises ConfigError where the environment does not repeat it."""
    shapes = loaded.policy.shapes.observations
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


@torch.no_grad()
def list_sights(policy: DiffusionPolicy, episode: Episode, steps: Sequence[int]) -> list[Sight]:
    """The images that a policy was given at some steps of an episode, which holds them, camera by camera."""
    sights = []
    share = policy.config.images.image_crop
    for key in policy.images:
        images = torch.as_tensor(
            as_observed(episode.observations[key][list(steps)], key, policy.shapes.observations[key])
        )
        points = policy.encoder_of(key).keypoints(policy.prepare(key, images[:, None].to(policy.device)))
        cropped = center_crop(images, share).numpy()
        size = np.array(cropped.shape[2:0:-1]) - 1  # width and height
        places = None if points is None else (points[:, 0].cpu().numpy() + 1) / 2 * size
        for i, step in enumerate(steps):
            sights.append(Sight(episode.seed, key, step, cropped[i], None if places is None else places[i]))
    return sights


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

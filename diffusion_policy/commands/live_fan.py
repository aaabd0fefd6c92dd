"""What is drawn over the picture of a live session: the plan, others that might have been made now, and how one of them
comes out of noise.

Knows policies and where actions lead in a plane. Knows no simulator and no picture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffusion_policy.basics.images import as_observed
from diffusion_policy.config import SampleConfig
from diffusion_policy.diffusion.samplers import Denoise
from diffusion_policy.envs.protocols import Drawable
from diffusion_policy.policy import DiffusionPolicy

Lead = Callable[[np.ndarray], np.ndarray | None]
"""Where actions (steps, A) lead from the present observation, (steps + 1, 2) in the plane; None where nobody knows."""


class Paths(NamedTuple):
    """What is drawn over the picture, in the plane, (steps, 2) each."""

    plan: np.ndarray | None
    """That is followed."""
    fan: list[np.ndarray]
    denoising: list[np.ndarray]


NO_PATHS = Paths(None, [], [])


def lead(plane: Drawable | None, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray | None:
    """Where actions would lead from an observation, in the plane, (steps + 1, 2)."""
    if plane is None or not np.isfinite(actions).all():
        return None
    return np.asarray(plane.planned_path(observation, actions))


def sample_fan(
    policy: DiffusionPolicy,
    sampling: SampleConfig,
    recent: Sequence[Mapping[str, np.ndarray]],
    rng: np.random.Generator,
    count: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Plans (count, steps, A) that might be made after the `recent` observations, and the first of them as it is
    predicted after each denoising step, (steps, A) each."""
    horizon = policy.config.observation_horizon
    rows = [*[recent[0]] * (horizon - len(recent)), *recent]
    observed = {
        key: torch.as_tensor(np.stack([as_observed(row[key], key, shape) for row in rows]))[None]
        for key, shape in policy.watched.items()
    }
    seen: list[torch.Tensor] = []
    bound = 1.0 if policy.choose_clip(sampling) == "static" else math.inf

    def watch(denoise: Denoise) -> Denoise:
        def watched(xt: torch.Tensor, level: int) -> torch.Tensor:
            x0 = denoise(xt, level)
            seen.append(x0[:1].clamp(-bound, bound))
            return x0

        return watched

    plans = policy.sample(observed, [rng], count, sampling, [watch])[0, :, horizon - 1 :].cpu().numpy()
    return plans, [policy.sequences.unnormalize(x0, 1, observed)[0, 0, horizon - 1 :].cpu().numpy() for x0 in seen]


def paths_of(lead: Lead, plan: np.ndarray, plans: np.ndarray, denoising: Sequence[np.ndarray]) -> Paths:
    """The paths on which they lead."""
    fan, steps = ([path for path in map(lead, some) if path is not None] for some in (plans, denoising))
    return Paths(lead(plan), fan, steps)

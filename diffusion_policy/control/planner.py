"""Planners: batches of observed steps → sequences of actions, in numpy. What a planner promises needs no torch, so
that a remote policy or another runtime is one too.

Knows no policy and no time: when to plan is the controller's.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from diffusion_policy.basics.streams import derive_rng


class Planner(Protocol):
    """Plans sequences of actions for several environments at once. A row's plan depends on nothing but its observation,
    its noise and the plan before."""

    observation_horizon: int
    """To: observed steps that it is given."""
    steps: int
    """T - To + 1: steps of a plan, the first one is *now*."""
    action_horizon: int
    """Ta: steps executed before planning again, unless one says otherwise."""
    observation_shapes: dict[str, tuple[int, ...]]
    """Shape of each observation key at one step."""
    action_shape: tuple[int, ...]
    """(A,)"""
    noise_shape: tuple[int, ...]
    """What a plan takes of standard normal noise."""

    def plan(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, previous: np.ndarray | None = None
    ) -> np.ndarray:
        """Raw {key: (B, To, ...)}, (B, *noise_shape) float32 → raw actions (B, steps, A). `previous`: what is left of
        the plans before, from *now* on, (B, steps, A), NaN where there is none."""
        ...


def planning_rng(seed: int, repeat: int = 0, plan: int = 0) -> np.random.Generator:
    """The source of the noise of an episode's plan: by the environment's seed, the repeat, and the number of the
    plan."""
    return derive_rng("planning", seed, repeat, plan)

"""Planners: batches of observed steps → sequences of actions, in numpy. What a planner promises needs no torch, so
that a remote policy or another runtime is one too.

Knows no policy and no time: when to plan is the controller's.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from diffusion_policy.basics.streams import derive_rng


class Steering(NamedTuple):
    """What plans are to agree with while they are sampled."""

    actions: np.ndarray
    """From *now* on, (B, steps, A); NaN where nothing is asked."""
    weights: np.ndarray
    """How much each step is to agree, 0 to 1, (B, steps)."""
    strength: float | None
    """Largest weight β of the guidance by gradients; None: steps of weight 1 are given, as a policy has learned to."""
    deviation: float = 1.0
    """How far plans spread for one observation, as the guidance assumes; in normalized numbers."""

    def filled(self) -> tuple[np.ndarray, np.ndarray]:
        """Actions and weights without NaN: 0 where nothing is asked."""
        weights = np.where(np.isnan(self.actions).any(axis=-1), 0.0, self.weights)
        return np.nan_to_num(self.actions), weights


class Planner(Protocol):
    """Plans sequences of actions for several environments at once. A row's plans depend on nothing but its observation,
    its noise and its steering."""

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
    guides: bool
    """Whether it can be steered by gradients."""
    longest_prefix: int
    """Steps that it has learned to be given; 0: none."""

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        """N plans for each observation: raw {key: (B, To, ...)}, (B, N, *noise_shape) float32 → raw actions
        (B, N, steps, A)."""
        ...


def planning_rng(seed: int, repeat: int = 0, plan: int = 0) -> np.random.Generator:
    """The source of the noise of an episode's plan: by the environment's seed, the repeat, and the number of the
    plan."""
    return derive_rng("planning", seed, repeat, plan)

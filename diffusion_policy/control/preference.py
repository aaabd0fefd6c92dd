"""A mode that samples are led to by a classifier of noised sequences: classifier guidance."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffusion_policy.policy import DiffusionPolicy, Wrap


@dataclass(frozen=True)
class Preference:
    """Leads samples to a mode."""

    classifier: DiffusionPolicy
    """Of the objective classifying; it takes sequences as those that are led, under some of their observations."""
    mode: str
    weight: float = 1.0
    """1 is Bayes' rule."""

    def __call__(self, policy: DiffusionPolicy, observations: Mapping[str, Tensor], number: int) -> Wrap:
        """See `policy.Lead`."""
        return policy.prefer(self.classifier.classify(observations, number, self.mode), self.weight)

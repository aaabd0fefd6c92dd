"""An episode in the making: what an environment answers, part by part → Episode.

Knows answers and plans. Knows neither slots nor processes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_policy.basics.images import is_image
from diffusion_policy.basics.names import is_label
from diffusion_policy.basics.text import error_line, error_message
from diffusion_policy.evaluation.episode import Episode, FailedEpisode, Plan
from diffusion_policy.evaluation.host import StepsResult

ModeOf = Callable[[Mapping[str, np.ndarray]], str | None]
"""An episode's observations {key: (steps + 1, ...)} → its mode."""


class Recording:
    """An episode in the making."""

    def __init__(self, seed: int, repeat: int, keep_images: bool = False) -> None:
        self.name = seed, repeat
        self._keep_images = keep_images
        self.observations: list[dict[str, np.ndarray]] = []  # parts (n, ...); none before the environment is reset
        self.actions: list[np.ndarray] = []
        self.asked = np.zeros(0)
        """The actions that the environment takes now, (Ta, A)."""
        self.plans: list[Plan] = []
        self.success = False
        self.rewards = 0.0
        self.measures: Mapping[str, float] | None = None

    def begin(self, observation: Mapping[str, np.ndarray]) -> None:
        self._keep({key: value[None] for key, value in observation.items()})

    def ask(self, plan: np.ndarray, actions: np.ndarray) -> None:
        self.plans.append(Plan(len(self.actions), plan))
        self.asked = actions

    def add(self, steps: StepsResult) -> None:
        self.actions.extend(self.asked[: len(steps.rewards)])
        self._keep(steps.observations)
        self.success = steps.info["is_success"]
        self.rewards = sum(steps.rewards, self.rewards)
        self.measures = steps.info.get("measures")

    def _keep(self, rows: Mapping[str, np.ndarray]) -> None:
        """Images of all steps of all episodes would fill the memory."""
        kept = {key: part for key, part in rows.items() if self._keep_images or not is_image(part.shape[1:])}
        self.observations.append(kept)

    def finish(self, mode_of: ModeOf, on_mode_failure: Callable[[FailedEpisode], None]) -> Episode:
        observations = {key: np.concatenate([part[key] for part in self.observations]) for key in self.observations[0]}
        measures = {"return": self.rewards} if self.measures is None else dict(self.measures)
        seed, repeat = self.name
        try:
            mode = _require_label(mode_of(observations))
        except Exception as error:
            mode = None
            hopeless = getattr(error, "hopeless", False)  # its message says all
            reason = error_message(error) if hopeless else f"the mode function failed: {error_line(error)}"
            on_mode_failure(FailedEpisode(seed, repeat, reason))
        actions = np.stack(self.actions)
        return Episode(seed, self.success, mode, observations, actions, repeat, measures, tuple(self.plans))


def _require_label(mode: Any) -> str | None:
    if mode is None or is_label(mode):
        return mode
    raise ValueError(f"a mode is printable text on one line, or None; got {mode!r:.60}")

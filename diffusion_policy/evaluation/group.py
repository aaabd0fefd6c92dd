"""Slots whose episodes are planned for together: a controller, and what it is shown of their environments.

Knows which slots these are. Knows neither processes nor seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_policy.basics.images import is_image
from diffusion_policy.basics.text import one_line
from diffusion_policy.control.controller import Controller
from diffusion_policy.evaluation.host import EnvFailure, StepsResult


class Planned(NamedTuple):
    """A plan, and the steps of it that are to be taken now."""

    plan: np.ndarray
    """(T - To + 1, A)"""
    actions: np.ndarray
    """(Ta, A)"""


class Group:
    """Successive slots and their controller."""

    def __init__(self, slots: Sequence[int], controller: Controller) -> None:
        self.slots = slots
        self._controller = controller
        self._latest: dict[str, np.ndarray] = {}  # (slots, ...) of each key that the controller reads

    def begin(self, episodes: Mapping[int, tuple[int, int]]) -> None:
        """Begin episodes (seed, repeat) in these slots."""
        self._controller.reset(self._mask(episodes), list(episodes.values()))

    def plan(self, slots: Sequence[int]) -> dict[int, Planned]:
        """Plan in these slots for what was looked at last."""
        actions = self._controller.act_until_next_plan(self._latest, self._mask(slots))
        return {slot: Planned(self._controller.planned[self._row(slot)], actions[self._row(slot)]) for slot in slots}

    def look(self, slot: int, observation: Mapping[str, np.ndarray]) -> None:
        """Keep what the controller reads of one slot's observation; what is not given stays as it was."""
        for key in self._controller.observation_shapes.keys() & observation.keys():
            value = observation[key]
            dtype = value.dtype if is_image(value.shape) else np.float64
            rows = self._latest.setdefault(key, np.zeros((len(self.slots), *value.shape), dtype))
            rows[self._row(slot)] = value

    def look_on(self, results: Mapping[int, StepsResult]) -> None:
        """Show the controller what these slots observed since it planned, but the last: that it is given to plan.
        Images that were not sent lie further back than its history."""
        mask = self._mask(results)
        for step in range(self._controller.action_horizon if results else 0):
            if step:
                self._controller.observe(self._latest, mask)
            for slot, steps in results.items():
                unseen = {key: len(steps.rewards) - len(rows) for key, rows in steps.observations.items()}
                given = steps.observations.items()
                self.look(slot, {key: rows[step - unseen[key]] for key, rows in given if step >= unseen[key]})

    @property
    def image_steps(self) -> int:
        """Images of the last so many steps are planned from: To, or 0 where none are."""
        shapes = self._controller.observation_shapes.values()
        return self._controller.observation_horizon if any(map(is_image, shapes)) else 0

    def refuse(self, observations: Mapping[str, np.ndarray]) -> EnvFailure | None:
        """Why nothing can be planned for observations {key: (steps, ...)}."""
        for key, shape in self._controller.observation_shapes.items():
            rows = observations.get(key)
            if rows is None or rows.shape[1:] != shape:
                given = ", ".join(f"{name} {rows.shape[1:]}" for name, rows in observations.items()) or "nothing"
                needed = f"the policy observes {key} {shape}; the environment gives {given}"
                return EnvFailure(one_line(needed), blamed=True, hopeless=True)
            if rows.dtype.kind == "f" and not np.isfinite(rows).all():
                return EnvFailure(f"the environment observes NaN or infinity in {key}", blamed=True)
        return None

    def _row(self, slot: int) -> int:
        return slot - self.slots[0]

    def _mask(self, chosen: Iterable[int]) -> np.ndarray:
        """Whether each slot is chosen, (slots,) bool."""
        return np.isin(np.arange(len(self.slots)), [self._row(slot) for slot in chosen])

"""A controller for one robot: one observation in, one action out."""

from collections.abc import Mapping

import numpy as np

from diffusion_policy.control.chunking import Chunking
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.latency import Latency, check_latency
from diffusion_policy.control.planner import Planner


class SingleController:
    """Steers one robot for an episode; `reset` begins the next one."""

    def __init__(
        self,
        planner: Planner,
        seed: int = 0,
        *,
        action_horizon: int | None = None,
        delay_steps: int = 0,
        chunking: Chunking | None = None,
        sampling_steps: int | None = None,
    ) -> None:
        """`seed`: of the planning noise; `sampling_steps`: of the planner, so that `latency` can say how many would
        fit; the other options, and what is raised, are those of `Controller`."""
        self._controller = Controller(
            planner, 1, action_horizon=action_horizon, delay_steps=delay_steps, chunking=chunking
        )
        self._planner, self._delay_steps, self._sampling_steps = planner, delay_steps, sampling_steps
        self._chunking = chunking
        self.reset(seed)

    def reset(self, seed: int = 0) -> None:
        """Begin an episode: forget what was observed and planned."""
        self._controller.reset(np.ones(1, bool), [(seed, 0)])

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """What is observed now, {key: (...)}, to be called once a control step → the raw action (A,), float64. Raises
        ValueError for observations of other keys or shapes, FloatingPointError when a plan is not finite."""
        return self._controller.act({key: np.asarray(value)[None] for key, value in observation.items()})[0]

    def latency(self, control_rate: float, plans: int = 50) -> Latency:
        """How long planning takes, whether that fits a control rate [1/s], and what would make it fit; `print` says it
        in a sentence. Costs `plans` plans; to be asked before the first step."""
        return check_latency(
            self._planner,
            control_rate,
            action_horizon=self._controller.action_horizon,
            delay_steps=self._delay_steps,
            chunking=self._chunking,
            sampling_steps=self._sampling_steps,
            plans=plans,
        )

    @property
    def plan(self) -> np.ndarray | None:
        """What the last call of `act` planned, from its step on, (T - To + 1, A); None where it followed an older
        plan."""
        return self._controller.planned.get(0)

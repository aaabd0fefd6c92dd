"""Receding horizon for B environments: a history of observations in, queued actions out.

Knows when to plan. Knows neither the planner nor a simulator.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from diffusion_policy.basics.images import as_observed, is_channels_first, is_image, observed_type
from diffusion_policy.config import ConfigError
from diffusion_policy.control.chunking import Chunking, Handover
from diffusion_policy.control.planner import Planner, planning_rng


class Controller:
    """Has T - To + 1 actions planned, hands out Ta of them, then has it plan again; each environment at its own time.

    Plans are made in batches padded to one fixed size, so that neither the number of environments that plan together
    nor their neighbours change a result. With `delay_steps` d, a plan is ready d steps after its observation, and the
    plan before it runs on meanwhile; its own first d actions, whose time has passed, are left out.
    """

    def __init__(
        self,
        planner: Planner,
        environments: int,
        *,
        action_horizon: int | None = None,
        plan_batch: int | None = None,
        delay_steps: int = 0,
        chunking: Chunking | None = None,
        dtype: np.dtype | type | None = np.float64,
    ) -> None:
        """`environments`: B; `action_horizon`: Ta, by default the planner's; `plan_batch`: observations in one planning
        call, by default B; `chunking`: how a plan is joined to the one before, by default receding horizon; `dtype`:
        float32 or float64, of the actions, such as that of an environment's action space. Raises ValueError for another
        type, for horizons and delays that a plan is too short for. The first plan of an episode is always waited
        for."""
        self.action_horizon = planner.action_horizon if action_horizon is None else action_horizon
        """Ta: an environment plans at its first step and then every Ta steps."""
        require_horizons(planner.steps, self.action_horizon, delay_steps)
        if dtype not in (np.float32, np.float64):
            raise ValueError(f"actions are of float32 or float64; got {dtype!r}")
        for name, value in (("environments", environments), ("plan_batch", plan_batch)):
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self._planner, self._chunking = planner, chunking or Chunking()
        self._chunking.require(planner, delay_steps)
        self._plan_batch = plan_batch or environments
        self.observation_shapes = dict(planner.observation_shapes)
        """What `act` reads of one environment's observation."""
        self.observation_horizon = planner.observation_horizon
        self._history = {  # the last To observations, oldest first
            key: np.zeros((environments, planner.observation_horizon, *shape), observed_type(shape))
            for key, shape in self.observation_shapes.items()
        }
        self._fresh = np.ones(environments, bool)  # no observation yet in this episode
        self.planned: dict[int, np.ndarray] = {}
        """What the last call planned, by environment: raw actions from its step on, (T - To + 1, A)."""
        self._delay = delay_steps
        self._queue = np.full((environments, planner.steps, *planner.action_shape), np.nan, dtype)
        self._position = np.full(environments, self.action_horizon)  # next action in the queue
        self._episodes: list[tuple[int, int] | None] = [None] * environments
        self._plans = np.zeros(environments, np.int64)  # made in this episode

    def reset(self, mask: np.ndarray, episodes: Sequence[tuple[int, int]]) -> None:
        """Begin new episodes where `mask` (B,) is true, with (seed, repeat) for each of those: the planning noise
        derives from them."""
        mask = self._mask(mask)
        self._fresh[mask] = True
        self._queue[mask] = np.nan
        self._position[mask] = self.action_horizon
        self._plans[mask] = 0
        for environment, episode in zip(np.flatnonzero(mask), episodes, strict=True):
            self._episodes[environment] = episode

    def act(self, observations: Mapping[str, np.ndarray], active: np.ndarray | None = None) -> np.ndarray:
        """Observations of now {key: (B, ...)} → raw actions (B, A). Environments that are not `active` (B,) are left
        out: they neither plan nor move on. Raises FloatingPointError when a plan is not finite."""
        active = self._mask(np.ones(len(self._position), bool) if active is None else active)
        self.observe(observations, active)
        self._plan_where_needed(active)
        actions = self._queue[np.arange(len(self._queue)), np.minimum(self._position, self.action_horizon - 1)]
        self._position[active] += 1
        return actions

    def act_until_next_plan(self, observations: Mapping[str, np.ndarray], active: np.ndarray) -> np.ndarray:
        """As `act`, but all actions up to the next plan at once, (B, Ta, A); what each but the last of them leads to is
        to be told to `observe`. Raises RuntimeError when an environment is in the middle of its plan."""
        active = self._mask(active)
        self.observe(observations, active)
        self._plan_where_needed(active)
        if self._position[active].any():
            raise RuntimeError("an environment has taken some steps of its plan; act step by step until the next one")
        self._position[active] = self.action_horizon
        return self._queue[:, : self.action_horizon].copy()

    def observe(self, observations: Mapping[str, np.ndarray], active: np.ndarray) -> None:
        """Take observations {key: (B, ...)} of the `active` (B,) into the history, as precise as they are. Raises
        ValueError for observations of other keys or shapes; keys that the policy does not observe are left alone."""
        for key, history in self._history.items():
            now = _observed(observations, key, (len(history), *history.shape[2:]))[:, None]  # (B, 1, ...)
            fresh, going_on = active & self._fresh, active & ~self._fresh
            history[fresh] = now[fresh]  # before the first step: that step repeated
            history[going_on, :-1] = history[going_on, 1:]
            history[going_on, -1:] = now[going_on]
        self._fresh &= ~active

    def _mask(self, chosen: np.ndarray) -> np.ndarray:
        """Which environments, (B,) bool; raises ValueError for what is not that, such as their numbers."""
        mask = np.asarray(chosen)
        if mask.dtype != bool or mask.shape != self._position.shape:
            raise ValueError(
                f"environments are chosen by {len(self._position)} booleans; got {mask.dtype} of shape {mask.shape}"
            )
        return mask

    def _plan_where_needed(self, active: np.ndarray) -> None:
        """Fill the queues of those active environments that have come to the end of theirs."""
        self.planned = {}
        waiting = np.flatnonzero(active & (self._position == self.action_horizon))
        for start in range(0, len(waiting), self._plan_batch):
            self._plan(waiting[start : start + self._plan_batch])

    def _plan(self, rows: np.ndarray) -> None:
        """Fill the queues of some environments."""
        executing = np.full_like(self._queue[rows], np.nan)
        executing[:, : -self.action_horizon or None] = self._queue[rows, self.action_horizon :]
        padded = np.resize(np.arange(len(rows)), self._plan_batch)  # repeats rows; what the copies yield is dropped
        observations = {key: history[rows[padded]] for key, history in self._history.items()}
        noise = np.zeros((self._plan_batch, self._chunking.samples, *self._planner.noise_shape), np.float32)
        for i, row in enumerate(rows):
            episode = self._episodes[row]
            if episode is None:
                raise RuntimeError("reset the controller before it acts: each episode needs its seed and repeat")
            seed, repeat = episode
            rng = planning_rng(seed, repeat, int(self._plans[row]))
            noise[i] = rng.standard_normal(noise.shape[1:], np.float32)
        handover = Handover(executing[padded], self._delay, self.action_horizon, self._plans[rows[padded]])
        joined = self._chunking.plan(self._planner, observations, noise, handover)
        plans, self._queue[rows] = joined.plans[: len(rows)], joined.executed[: len(rows)]
        self._position[rows] = 0
        self._plans[rows] += 1
        self.planned |= dict(zip(rows.tolist(), plans, strict=True))


def require_horizons(steps: int, action_horizon: int, delay_steps: int = 0) -> None:
    """Raise ConfigError when plans of so many steps are too short to execute Ta of them and bridge a delay of so many
    control steps."""
    if not 1 <= action_horizon <= steps:
        raise ConfigError(f"action-horizon must be from 1 to the {steps} steps of a plan; got {action_horizon}")
    if not 0 <= delay_steps <= steps - action_horizon:
        raise ConfigError(
            f"delay-steps must be from 0 to {steps - action_horizon} (prediction-horizon - observation-horizon + 1 - "
            f"action-horizon = {steps} - {action_horizon}); got {delay_steps}"
        )


def _observed(observations: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One key of the observations, (B, ...) as it is planned from; a single number a step is a row (1,)."""
    if key not in observations:
        raise ValueError(f"the policy observes {key!r}; got {', '.join(map(repr, observations)) or 'nothing'}")
    values = np.asarray(observations[key])
    if is_image(shape[1:]):
        _require_images(key, values, shape)
        return as_observed(values, f"the observation {key}", shape[1:])
    if values.dtype.kind not in "biuf" or values.shape not in (shape, shape[: -1 if shape[1:] == (1,) else None]):
        raise ValueError(f"the observation {key} must be numbers of shape {shape}; got {values.dtype} {values.shape}")
    return as_observed(values, key, shape[1:]).reshape(shape)


def _require_images(key: str, images: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ValueError for images of another shape than (B, H, W, C), with what would make them fit."""
    if images.shape != shape:
        height, width, channels = shape[1:]
        advice = f"resize them to {height} x {width} px"
        if images.ndim == 4 and is_channels_first(images.shape[1:]):
            advice = "move the channels to the last axis"
        elif images.ndim == 4 and images.shape[1:3] == (height, width):
            advice = f"give {channels} channels" + (" (RGB)" if channels == 3 else "")
        raise ValueError(
            f"the observation {key} must be images (height, width, channels) of shape {shape[1:]}, {shape[0]} of them; "
            f"got {images.shape}; {advice}"
        )

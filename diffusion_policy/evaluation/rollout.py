"""Episodes of a controller in many environments at once: environment factory + controller + seeds → list of Episode.

All slots plan together, then each takes the steps of its plan, and a slot whose episode has ended takes the next seed;
so an evaluation depends on seeds and slots alone, not on processes or timing. An episode whose
environment fails is begun again, once.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.basics.names import is_label
from diffusion_policy.basics.text import error_line, error_message, one_line
from diffusion_policy.control.controller import Controller
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine
from diffusion_policy.evaluation.episode import Episode, FailedEpisode, Plan
from diffusion_policy.evaluation.host import EnvFailure, StepsResult
from diffusion_policy.evaluation.pool import EnvironmentPool, require_patience

ModeOf = Callable[[Mapping[str, np.ndarray]], str | None]
"""An episode's observations {key: (steps + 1, ...)} → its mode."""
ATTEMPTS = 2
"""How often an episode is begun before it is given up."""
HOPELESS = 3
"""So many lost episodes before any has finished: the environment cannot be run at all."""


class RolloutError(ValueError):
    """An episode could not be run, for a reason that is not the policy's."""


class _Recording:
    """An episode in the making."""

    def __init__(self, seed: int, repeat: int, observation: dict[str, np.ndarray]) -> None:
        self.name = seed, repeat
        self.observations = [{key: np.array([value]) for key, value in observation.items()}]  # parts (n, ...)
        self.actions: list[np.ndarray] = []
        self.plans: list[Plan] = []
        self.success = False
        self.rewards = 0.0
        self.measures: Mapping[str, float] | None = None

    def add(self, actions: np.ndarray, steps: StepsResult) -> None:
        self.actions.extend(actions[: len(steps.rewards)])
        self.observations.append(steps.observations)
        self.success = steps.info["is_success"]
        self.rewards = sum(steps.rewards, self.rewards)
        self.measures = steps.info.get("measures")

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


def lost_is_an_error(lost: FailedEpisode) -> None:
    """What `rollout` does with an episode that it lost, unless told otherwise: raise RolloutError."""
    raise RolloutError(f"the episode of seed {lost.seed} failed {ATTEMPTS} times: {lost.reason}")


def mode_failure_is_a_warning(failure: FailedEpisode) -> None:
    """What `rollout` does with an episode whose mode cannot be told, unless told otherwise: give a warning."""
    warnings.warn(f"episodes count as without a mode: {failure.reason}", stacklevel=2)


def rollout(
    make_env: Callable[[], gymnasium.Env],
    make_controller: Callable[[int], Controller],
    seeds: Sequence[int],
    mode_of: ModeOf,
    parallel: int = 25,
    *,
    workers: int = 1,
    on_episode: Callable[[Episode], None] = lambda _: None,
    repeats: int = 1,
    on_lost: Callable[[FailedEpisode], None] = lost_is_an_error,
    hang_after: float = HANG_AFTER,
    engine: Engine = "local",
    on_mode_failure: Callable[[FailedEpisode], None] = mode_failure_is_a_warning,
) -> list[Episode]:
    """`repeats` episodes a seed, which differ in their planning noise, in the order of the seeds.

    `make_env` must be picklable for more than one worker and for a cluster; `make_controller(slots)` makes the
    controller; `parallel`: how many environments run at once; `on_lost` hears of an episode whose environment raised an
    error, crashed its worker or did not answer within `hang_after` [s] at each attempt; `on_mode_failure` of one whose
    mode `mode_of` could not tell, and which counts without. Where an environment limits no episode, it ends after
    `bounds.MOST_STEPS`. Raises ValueError for arguments that cannot be, RolloutError when no episode can be run.
    """
    for name, value in (("parallel", parallel), ("workers", workers), ("repeats", repeats)):
        _require_whole(name, value, 1)
    _require_seeds(seeds)
    require_patience(hang_after)
    if not callable(mode_of):
        raise ValueError(f"mode_of must be a function of an episode's observations; got {mode_of!r:.60}")
    names = list(itertools.product(seeds, range(repeats)))
    slots = min(parallel, len(names))
    scheduler = _EpisodeScheduler(
        names, make_controller(slots), slots, mode_of, _Hearers(on_episode, on_lost, on_mode_failure)
    )
    with EnvironmentPool(make_env, min(workers, slots), hang_after, engine) as pool:
        while scheduler.running or scheduler.waiting:
            scheduler.begin_episodes(pool)
            if scheduler.running:
                scheduler.take_steps(pool)
    return [scheduler.finished[name] for name in names if name in scheduler.finished]


def _require_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        _require_whole("each seed", seed, 0)
    if not len(seeds):
        raise ValueError("rollout needs at least one seed; got none")


def _require_whole(name: str, value: Any, lowest: int) -> None:
    if not isinstance(value, int | np.integer) or value < lowest:
        raise ValueError(f"{name} must be a whole number of at least {lowest}; got {value!r:.60}")


class _Hearers(NamedTuple):
    """Who hears of what has come of an episode; see `rollout`."""

    on_episode: Callable[[Episode], None]
    on_lost: Callable[[FailedEpisode], None]
    on_mode_failure: Callable[[FailedEpisode], None]


class _EpisodeScheduler:
    """Which slot runs which episode, what is waiting for a slot, and what has come of the others. An episode's name is
    (seed, repeat)."""

    def __init__(
        self,
        names: Sequence[tuple[int, int]],
        controller: Controller,
        slots: int,
        mode_of: ModeOf,
        hearers: _Hearers,
    ) -> None:
        self.waiting = list(reversed(names))
        self.running: dict[int, _Recording] = {}
        self.finished: dict[tuple[int, int], Episode] = {}
        self._controller = controller
        self._slots = slots
        self._mode_of = mode_of
        self._hearers = hearers
        self._failures: Counter[tuple[int, int]] = Counter()
        self._lost = 0
        self._latest: dict[str, np.ndarray] = {}

    def begin_episodes(self, pool: EnvironmentPool) -> None:
        """Fill the free slots."""
        free = [slot for slot in range(self._slots) if slot not in self.running]
        begun = {slot: self.waiting.pop() for slot in free[: len(self.waiting)]}
        if not begun:
            return
        self._controller.reset(_mask(begun, self._slots), list(begun.values()))
        for slot, answer in pool.reset({slot: seed for slot, (seed, _) in begun.items()}).items():
            if not isinstance(answer, EnvFailure):
                answer = self._refuse({key: value[None] for key, value in answer.items()}) or answer
            if not isinstance(answer, EnvFailure):
                self.running[slot] = _Recording(*begun[slot], answer)
                self._look(slot, answer)
            elif slot in begun:
                self._try_again(begun[slot], answer)
            elif slot in self.running:  # its worker fell
                self._try_again(self.running.pop(slot).name, answer)

    def take_steps(self, pool: EnvironmentPool) -> None:
        """Plan in all slots that run an episode, and take the steps of those plans."""
        actions = self._controller.act_until_next_plan(self._latest, _mask(self.running, self._slots))
        for slot, plan in self._controller.planned.items():
            self.running[slot].plans.append(Plan(len(self.running[slot].actions), plan))
        going_on: dict[int, StepsResult] = {}
        for slot, answer in sorted(pool.step({slot: actions[slot] for slot in self.running}).items()):
            if slot not in self.running:
                continue  # its worker fell after its episode had ended
            recording = self.running[slot]
            if isinstance(answer, StepsResult) and not answer.ended:
                answer = self._refuse(answer.observations) or answer
            if isinstance(answer, EnvFailure):
                del self.running[slot]
                self._try_again(recording.name, answer)
                continue
            recording.add(actions[slot], answer)
            if not answer.ended:
                going_on[slot] = answer
                continue
            del self.running[slot]
            self.finished[recording.name] = recording.finish(self._mode_of, self._hearers.on_mode_failure)
            self._hearers.on_episode(self.finished[recording.name])
        self._look_on(going_on)

    def _try_again(self, name: tuple[int, int], failure: EnvFailure) -> None:
        """Begin an episode again later, or count it as lost."""
        if failure.hopeless and not self.finished:
            raise RolloutError(failure.reason)
        self._failures[name] += ATTEMPTS if failure.hopeless else failure.blamed
        if self._failures[name] < ATTEMPTS:
            self.waiting.append(name)
            return
        self._lost += 1
        self._hearers.on_lost(FailedEpisode(*name, failure.reason))
        if self._lost >= HOPELESS and not self.finished:
            raise RolloutError(f"the first {self._lost} episodes failed {ATTEMPTS} times each: {failure.reason}")

    def _look_on(self, results: Mapping[int, StepsResult]) -> None:
        """Show the controller what these slots observed since it planned, but the last: that it is given to plan."""
        mask = _mask(results, self._slots)
        for step in range(self._controller.action_horizon):
            if step:
                self._controller.observe(self._latest, mask)
            for slot, steps in results.items():
                self._look(slot, {key: rows[step] for key, rows in steps.observations.items()})

    def _look(self, slot: int, observation: Mapping[str, np.ndarray]) -> None:
        """Put what the controller reads of one slot's observation into its arrays (slots, ...)."""
        for key in self._controller.observation_shapes:
            value = observation[key]
            rows = self._latest.setdefault(key, np.zeros((self._slots, *value.shape)))
            rows[slot] = value

    def _refuse(self, observations: Mapping[str, np.ndarray]) -> EnvFailure | None:
        """Why nothing can be planned for observations {key: (steps, ...)}."""
        for key, shape in self._controller.observation_shapes.items():
            rows = observations.get(key)
            if rows is None or rows.shape[1:] != shape:
                given = ", ".join(f"{name} {rows.shape[1:]}" for name, rows in observations.items()) or "nothing"
                needed = f"the policy observes {key} {shape}; the environment gives {given}"
                return EnvFailure(one_line(needed), blamed=True, hopeless=True)
            if not np.isfinite(rows).all():
                return EnvFailure(f"the environment observes NaN or infinity in {key}", blamed=True)
        return None


def _mask(chosen: Iterable[int], slots: int) -> np.ndarray:
    """Whether each slot is chosen, (slots,) bool."""
    return np.isin(np.arange(slots), list(chosen))

"""Episodes of a controller in many environments at once: environment factory + controller + seeds → list of Episode.

The slots are two fixed groups, which take turns: a group plans while the environments of the other one step. Each slot
takes the steps of its plan, and one whose episode has ended takes the next seed in its group's turn; so an evaluation
depends on seeds and slots alone, not on processes or timing. An episode whose environment fails is begun again, once.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np

from diffusion_policy.basics.text import one_line
from diffusion_policy.control.controller import Controller
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine, available_cores
from diffusion_policy.evaluation.episode import Episode, FailedEpisode
from diffusion_policy.evaluation.host import EnvFailure, StepsResult
from diffusion_policy.evaluation.pool import EnvironmentPool, require_patience
from diffusion_policy.evaluation.recording import ModeOf, Recording

ATTEMPTS = 2
"""How often an episode is begun before it is given up."""
GROUPS = 2
"""Groups of slots: while the environments of one step, another plans."""
HOPELESS = 3
"""So many lost episodes before any has finished: the environment cannot be run at all."""


class MakeController(Protocol):
    """What makes the controller of a rollout."""

    def __call__(self, environments: int, /, *, plan_batch: int) -> Controller: ...


def planning_batch(parallel: int) -> int:
    """The size of every planning call, where so many environments run at once."""
    return -(-parallel // GROUPS)


class RolloutError(ValueError):
    """An episode could not be run, for a reason that is not the policy's."""


def lost_is_an_error(lost: FailedEpisode) -> None:
    """What `rollout` does with an episode that it lost, unless told otherwise: raise RolloutError."""
    raise RolloutError(f"the episode of seed {lost.seed} failed {ATTEMPTS} times: {lost.reason}")


def mode_failure_is_a_warning(failure: FailedEpisode) -> None:
    """What `rollout` does with an episode whose mode cannot be told, unless told otherwise: give a warning."""
    warnings.warn(f"episodes count as without a mode: {failure.reason}", stacklevel=2)


def rollout(
    make_env: Callable[[], gymnasium.Env],
    make_controller: MakeController,
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

    `make_env` must be picklable for more than one worker and for a cluster; `make_controller(slots, plan_batch=...)`
    makes the controller, such as partial(Controller, planner); `parallel`: how many environments run at once, half of
    which plan together; `workers`: processes that simulate, if more than one while this one plans; `on_lost` hears of
    an episode whose environment raised an error, crashed its worker or did not answer within `hang_after` [s] at each
    attempt; `on_mode_failure` of one whose mode `mode_of` could not tell, and which counts without. Where an
    environment limits no episode, it ends after `bounds.MOST_STEPS`. Raises ValueError for arguments that cannot be,
    RolloutError when no episode can be run.
    """
    for name, value in (("parallel", parallel), ("workers", workers), ("repeats", repeats)):
        _require_whole(name, value, 1)
    _require_seeds(seeds)
    require_patience(hang_after)
    if not callable(mode_of):
        raise ValueError(f"mode_of must be a function of an episode's observations; got {mode_of!r:.60}")
    names = list(itertools.product(seeds, range(repeats)))
    slots = min(parallel, len(names))
    controller = make_controller(slots, plan_batch=planning_batch(parallel))
    hearers = _Hearers(on_episode, on_lost, on_mode_failure)
    workers = min(workers, slots)
    adjacent = _adjacent(slots, workers, engine)
    with EnvironmentPool(make_env, workers, hang_after, engine, adjacent=adjacent) as pool:
        scheduler = _EpisodeScheduler(names, controller, pool, slots, mode_of, hearers)
        while scheduler.running or scheduler.waiting:
            scheduler.take_turns()
    return [scheduler.finished[name] for name in names if name in scheduler.finished]


def _adjacent(slots: int, workers: int, engine: Engine) -> int:
    """How many adjacent slots have the same worker. Where the workers would take every core from this process while it
    plans, two of them simulate a group each, since the group that is planned for rests; else all simulate both.
    """
    crowded = engine == "local" and workers == GROUPS >= available_cores()
    return planning_batch(slots) if crowded else 1


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
        pool: EnvironmentPool,
        slots: int,
        mode_of: ModeOf,
        hearers: _Hearers,
    ) -> None:
        self.waiting = list(reversed(names))
        self.running: dict[int, Recording] = {}
        self.finished: dict[tuple[int, int], Episode] = {}
        self._controller = controller
        self._pool = pool
        self._slots = slots
        self._groups = np.array_split(np.arange(slots), GROUPS)
        self._asked = [0] * GROUPS  # requests to the pool in a group's latest turn
        self._mode_of = mode_of
        self._hearers = hearers
        self._failures: Counter[tuple[int, int]] = Counter()
        self._lost = 0
        self._latest: dict[str, np.ndarray] = {}

    def take_turns(self) -> None:
        """Let each group see what its environments have done since its latest turn, and ask them for more; they do it
        during the turn of the other group."""
        for group, slots in enumerate(self._groups):
            going_on: dict[int, StepsResult] = {}
            for _ in range(self._asked[group]):
                for slot, answer in sorted(self._pool.collect().items()):
                    if self._hear(slot, answer):
                        going_on[slot] = answer
            if going_on:
                self._look_on(going_on)
            self._asked[group] = self._begin_episodes(slots.tolist()) + self._take_steps(slots.tolist())

    def _begin_episodes(self, group: Sequence[int]) -> int:
        """Fill the free slots of a group; they plan in its next turn. Returns the number of requests to the pool."""
        free = [slot for slot in group if slot not in self.running]
        begun = {slot: self.waiting.pop() for slot in free[: len(self.waiting)]}
        if not begun:
            return 0
        self._pool.begin_reset({slot: seed for slot, (seed, _) in begun.items()})
        self._controller.reset(_mask(begun, self._slots), list(begun.values()))
        self.running |= {slot: Recording(*name) for slot, name in begun.items()}
        return 1

    def _take_steps(self, group: Sequence[int]) -> int:
        """Plan in the slots of a group that run an episode, and have the steps of those plans taken. Returns the number
        of requests to the pool."""
        ready = [slot for slot in group if slot in self.running and self.running[slot].observations]
        if not ready:
            return 0
        actions = self._controller.act_until_next_plan(self._latest, _mask(ready, self._slots))
        for slot in ready:
            self.running[slot].ask(self._controller.planned[slot], actions[slot])
        self._pool.begin_step({slot: actions[slot] for slot in ready})
        return 1

    def _hear(self, slot: int, answer: dict[str, np.ndarray] | StepsResult | EnvFailure) -> bool:
        """Note what came of a slot's reset or steps; returns whether it has taken steps and goes on."""
        if slot not in self.running:
            return False  # its worker fell after its episode had ended
        recording = self.running[slot]
        if isinstance(answer, dict):
            recording.begin(answer)
            answer = self._refuse(recording.observations[0]) or answer
        elif isinstance(answer, StepsResult) and not answer.ended:
            answer = self._refuse(answer.observations) or answer
        if isinstance(answer, EnvFailure):
            del self.running[slot]
            self._try_again(recording.name, answer)
            return False
        if isinstance(answer, dict):
            self._look(slot, answer)
            return False
        recording.add(answer)
        if answer.ended:
            del self.running[slot]
            self.finished[recording.name] = recording.finish(self._mode_of, self._hearers.on_mode_failure)
            self._hearers.on_episode(self.finished[recording.name])
        return not answer.ended

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

"""Episodes of a controller in many environments at once: environment factory + controller + seeds → list of Episode.

All slots plan together, then each takes the steps of its plan, and a slot whose episode has ended takes the next seed;
so the course of an evaluation depends on seeds and slots alone, not on processes or timing. An episode whose
environment fails is begun again, once.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import gymnasium
import numpy as np

from diffusion_policy.controller import Controller, planning_generator
from diffusion_policy.engines import HANG_AFTER, Engine
from diffusion_policy.metrics import Episode, Lost, Plan
from diffusion_policy.pool import EnvironmentPool, Fault, Stretch

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
        self.observations = [{key: np.array([value]) for key, value in observation.items()}]  # stretches (n, ...)
        self.actions: list[np.ndarray] = []
        self.plans: list[Plan] = []
        self.success = False
        self.rewards = 0.0
        self.measures: Mapping[str, float] | None = None

    def add(self, actions: np.ndarray, stretch: Stretch) -> None:
        self.actions.extend(actions[: len(stretch.rewards)])
        self.observations.append(stretch.observations)
        if "is_success" not in stretch.info:
            raise RolloutError("the environment must give info['is_success'] at every step; its info has no such key")
        self.success = bool(stretch.info["is_success"])
        self.rewards = sum(stretch.rewards, self.rewards)
        self.measures = stretch.info.get("measures")

    def finish(self, mode_of: ModeOf) -> Episode:
        observations = {key: np.concatenate([some[key] for some in self.observations]) for key in self.observations[0]}
        measures = {"return": self.rewards} if self.measures is None else dict(self.measures)
        seed, repeat = self.name
        mode, actions = mode_of(observations), np.stack(self.actions)
        return Episode(seed, self.success, mode, observations, actions, repeat, measures, tuple(self.plans))


def lost_is_an_error(lost: Lost) -> None:
    """What `rollout` does with an episode that it lost, unless told otherwise: raise RolloutError."""
    raise RolloutError(f"the episode of seed {lost.seed} failed {ATTEMPTS} times: {lost.reason}")


def rollout(
    make_env: Callable[[], gymnasium.Env],
    make_controller: Callable[[int], Controller],
    seeds: Sequence[int],
    mode_of: ModeOf,
    parallel: int = 25,
    workers: int = 1,
    on_episode: Callable[[Episode], None] = lambda _: None,
    repeats: int = 1,
    on_lost: Callable[[Lost], None] = lost_is_an_error,
    hang_after: float = HANG_AFTER,
    engine: Engine = "local",
) -> list[Episode]:
    """`repeats` episodes a seed, which differ in their planning noise, in the order of the seeds.

    `make_env` must be picklable for more than one worker and for a cluster; `make_controller(slots)` makes the
    controller; `parallel`: how many environments run at once; `on_lost` hears of an episode whose environment raised an
    error, crashed its worker or did not answer within `hang_after` [s] at each attempt. Raises RolloutError when none
    can be run.
    """
    names = list(itertools.product(seeds, range(repeats)))
    slots = min(parallel, len(names))
    course = _Course(names, make_controller(slots), slots, mode_of, on_episode, on_lost)
    with EnvironmentPool(make_env, min(workers, slots), hang_after, engine) as pool:
        while course.running or course.waiting:
            course.begin_episodes(pool)
            if course.running:
                course.take_steps(pool)
    return [course.finished[name] for name in names if name in course.finished]


class _Course:
    """Which slot runs which episode, what is waiting for a slot, and what has come of the others. An episode's name is
    (seed, repeat)."""

    def __init__(
        self,
        names: Sequence[tuple[int, int]],
        controller: Controller,
        slots: int,
        mode_of: ModeOf,
        on_episode: Callable[[Episode], None],
        on_lost: Callable[[Lost], None],
    ) -> None:
        self.waiting = list(reversed(names))
        self.running: dict[int, _Recording] = {}
        self.finished: dict[tuple[int, int], Episode] = {}
        self._controller = controller
        self._slots = slots
        self._mode_of = mode_of
        self._on_episode, self._on_lost = on_episode, on_lost
        self._failures: Counter[tuple[int, int]] = Counter()
        self._lost = 0
        self._latest: dict[str, np.ndarray] = {}

    def begin_episodes(self, pool: EnvironmentPool) -> None:
        """Fill the free slots."""
        free = [slot for slot in range(self._slots) if slot not in self.running]
        begun = {slot: self.waiting.pop() for slot in free[: len(self.waiting)]}
        if not begun:
            return
        generators = [planning_generator(seed, repeat) for seed, repeat in begun.values()]
        self._controller.reset(_mask(begun, self._slots), generators)
        for slot, answer in pool.reset({slot: seed for slot, (seed, _) in begun.items()}).items():
            if not isinstance(answer, Fault):
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
        going_on: dict[int, Stretch] = {}
        for slot, answer in sorted(pool.step({slot: actions[slot] for slot in self.running}).items()):
            if slot not in self.running:
                continue  # its worker fell after its episode had ended
            recording = self.running[slot]
            if isinstance(answer, Fault):
                del self.running[slot]
                self._try_again(recording.name, answer)
                continue
            recording.add(actions[slot], answer)
            if not answer.ended:
                going_on[slot] = answer
                continue
            del self.running[slot]
            self.finished[recording.name] = recording.finish(self._mode_of)
            self._on_episode(self.finished[recording.name])
        self._look_on(going_on)

    def _try_again(self, name: tuple[int, int], fault: Fault) -> None:
        """Begin an episode again later, or count it as lost."""
        if fault.hopeless:
            raise RolloutError(fault.reason)
        self._failures[name] += fault.blamed
        if self._failures[name] < ATTEMPTS:
            self.waiting.append(name)
            return
        self._lost += 1
        self._on_lost(Lost(*name, fault.reason))
        if self._lost >= HOPELESS and not self.finished:
            raise RolloutError(f"the first {self._lost} episodes failed {ATTEMPTS} times each: {fault.reason}")

    def _look_on(self, stretches: Mapping[int, Stretch]) -> None:
        """Show the controller what these slots observed since it planned, but the last: that it is given to plan."""
        mask = _mask(stretches, self._slots)
        for step in range(self._controller.action_horizon):
            if step:
                self._controller.observe(self._latest, mask)
            for slot, stretch in stretches.items():
                self._look(slot, {key: rows[step] for key, rows in stretch.observations.items()})

    def _look(self, slot: int, observation: Mapping[str, np.ndarray]) -> None:
        """Put one slot's observation into the arrays (slots, ...) that the controller reads."""
        for key, value in observation.items():
            rows = self._latest.setdefault(key, np.zeros((self._slots, *np.shape(value)), np.float32))
            rows[slot] = value


def _mask(chosen: Iterable[int], slots: int) -> np.ndarray:
    """Whether each slot is chosen, (slots,) bool."""
    return np.isin(np.arange(slots), list(chosen))

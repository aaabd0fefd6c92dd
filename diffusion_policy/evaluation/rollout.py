"""Episodes of a controller in many environments at once: environment factory + controller + seeds → list of Episode.

The slots are two fixed groups: one plans while the environments of the other one step. Each slot takes the steps of its
plan. The groups take turns in which a slot whose episode has ended takes the next seed; so an evaluation depends on
seeds and slots alone, not on processes, threads or timing. An episode whose environment fails is begun again, once.
"""

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np

from diffusion_policy.control.controller import Controller
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine, available_cores
from diffusion_policy.evaluation.episode import Episode, FailedEpisode
from diffusion_policy.evaluation.group import Group, Planned
from diffusion_policy.evaluation.host import EnvFailure, Sight, StepsResult, look_always
from diffusion_policy.evaluation.pool import EnvironmentPool, Request, require_patience
from diffusion_policy.evaluation.recording import ModeOf, Recording

ATTEMPTS = 2
"""How often an episode is begun before it is given up."""
GROUPS = 2
"""Groups of slots: while the environments of one step, another is planned for."""
HOPELESS = 3
"""So many lost episodes before any has finished: the environment cannot be run at all."""


class MakeController(Protocol):
    """What makes a controller for each group of environments in a rollout."""

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
    planning_threads: int = 1,
    look: Callable[[gymnasium.Env, bool], None] = look_always,
    keep_images: bool = False,
) -> list[Episode]:
    """`repeats` episodes a seed, which differ in their planning noise, in the order of the seeds.

    `make_env` must be picklable for more than one worker and for a cluster; `make_controller(slots, plan_batch=...)`
    makes a controller, such as partial(Controller, planner); `parallel`: how many environments run at once, in two
    groups that plan for themselves; `workers`: processes that simulate, if more than one while this one plans;
    `planning_threads`: 2 where both groups may plan at the same time, and the planner bears calls of two threads;
    `look`: see `Sight`; `keep_images`: whether episodes hold the images of all steps, which else are drawn and sent
    only where something is planned from them; `on_lost` hears of an episode whose environment raised an error, crashed
    its worker or did not answer within `hang_after` [s] at each attempt; `on_mode_failure` of one whose mode `mode_of`
    could not tell, and which counts without. Where an environment limits no episode, it ends after `bounds.MOST_STEPS`.
    Raises ValueError for arguments that cannot be, RolloutError when no episode can be run.
    """
    counts = {"parallel": parallel, "workers": workers, "repeats": repeats, "planning_threads": planning_threads}
    for name, value in counts.items():
        _require_whole(name, value, 1)
    _require_seeds(seeds)
    require_patience(hang_after)
    if not callable(mode_of):
        raise ValueError(f"mode_of must be a function of an episode's observations; got {mode_of!r:.60}")
    names = list(itertools.product(seeds, range(repeats)))
    slots = min(parallel, len(names))
    groups = [
        Group(part.tolist(), make_controller(len(part), plan_batch=planning_batch(parallel)))
        for part in np.array_split(np.arange(slots), min(slots, GROUPS))
    ]
    workers = min(workers, slots)
    sight = Sight(None if keep_images else groups[0].image_steps, look)
    adjacent = _adjacent(slots, workers, engine)
    with (
        EnvironmentPool(make_env, workers, hang_after, engine, adjacent=adjacent, sight=sight) as pool,
        _planning(planning_threads, in_this_process=workers == 1 and engine == "local") as planning,
    ):
        hearers = _Hearers(on_episode, on_lost, on_mode_failure)
        scheduler = _EpisodeScheduler(names, groups, pool, planning, mode_of, hearers, keep_images=keep_images)
        while scheduler.running or scheduler.waiting:
            for group in groups:
                scheduler.take_turn(group)
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


class _AtOnce(Executor):
    """Calls in this thread: an environment of this process may be bound to it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def _planning(threads: int, *, in_this_process: bool) -> Iterator[Executor]:
    """Where plans are made; `in_this_process`: whether environments run here."""
    executor = _AtOnce() if in_this_process else ThreadPoolExecutor(min(threads, GROUPS), "planning")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


class _Turn(NamedTuple):
    """What a group's latest turn has begun."""

    reset: Request | None = None
    steps: Future[tuple[dict[int, Planned], Request]] | None = None


class _EpisodeScheduler:
    """Which slot runs which episode, what is waiting for a slot, and what has come of the others. An episode's name is
    (seed, repeat)."""

    def __init__(
        self,
        names: Sequence[tuple[int, int]],
        groups: Sequence[Group],
        pool: EnvironmentPool,
        planning: Executor,
        mode_of: ModeOf,
        hearers: _Hearers,
        *,
        keep_images: bool,
    ) -> None:
        self.waiting = list(reversed(names))
        self.running: dict[int, Recording] = {}
        self.finished: dict[tuple[int, int], Episode] = {}
        self._turns = dict.fromkeys(groups, _Turn())
        self._pool, self._planning = pool, planning
        self._mode_of, self._hearers, self._keep_images = mode_of, hearers, keep_images
        self._failures: Counter[tuple[int, int]] = Counter()
        self._lost = 0

    def take_turn(self, group: Group) -> None:
        """See what a group's environments have done since its latest turn, and begin more of it; it goes on during the
        turn of the other group."""
        reset, steps = self._turns[group]
        planned, taken = steps.result() if steps else ({}, None)
        for slot in planned.keys() & self.running.keys():
            self.running[slot].ask(*planned[slot])
        for request in (reset, taken):
            if request:
                self._hear(group, self._pool.collect(request))
        reset = self._begin_episodes(group)  # they plan in the next turn
        ready = [slot for slot in group.slots if slot in self.running and self.running[slot].observations]
        steps = self._planning.submit(_plan_and_step, group, ready, self._pool) if ready else None
        self._turns[group] = _Turn(reset, steps)

    def _begin_episodes(self, group: Group) -> Request | None:
        """Fill the free slots of a group."""
        free = [slot for slot in group.slots if slot not in self.running]
        begun = {slot: self.waiting.pop() for slot in free[: len(self.waiting)]}
        if not begun:
            return None
        group.begin(begun)
        self.running |= {slot: Recording(*name, self._keep_images) for slot, name in begun.items()}
        return self._pool.begin_reset({slot: seed for slot, (seed, _) in begun.items()})

    def _hear(self, group: Group, answers: Mapping[int, Any]) -> None:
        """Note what came of resets or steps, and of slots of either group whose worker fell."""
        going_on: dict[int, StepsResult] = {}
        for slot, answer in sorted(answers.items()):
            if slot not in self.running:
                continue  # its worker fell after its episode had ended
            recording = self.running[slot]
            if isinstance(answer, dict):
                recording.begin(answer)
                answer = group.refuse({key: value[None] for key, value in answer.items()}) or answer
            elif isinstance(answer, StepsResult) and not answer.ended:
                answer = group.refuse(answer.observations) or answer
            if isinstance(answer, EnvFailure):
                del self.running[slot]
                self._try_again(recording.name, answer)
            elif isinstance(answer, dict):
                group.look(slot, answer)
            else:
                recording.add(answer)
                if answer.ended:
                    self._finish(slot)
                else:
                    going_on[slot] = answer
        group.look_on(going_on)

    def _finish(self, slot: int) -> None:
        recording = self.running.pop(slot)
        self.finished[recording.name] = recording.finish(self._mode_of, self._hearers.on_mode_failure)
        self._hearers.on_episode(self.finished[recording.name])

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


def _plan_and_step(group: Group, slots: Sequence[int], pool: EnvironmentPool) -> tuple[dict[int, Planned], Request]:
    """Plan in these slots, and have the steps of those plans taken."""
    planned = group.plan(slots)
    return planned, pool.begin_step({slot: one.actions for slot, one in planned.items()})

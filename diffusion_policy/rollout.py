"""Episodes of a controller in many environments at once: environment factory + controller + seeds → list of Episode.

All slots step together, and a slot takes the next seed when its episode ends; so the course of an evaluation depends on
seeds and slots alone, not on processes or timing. An episode whose environment fails is begun again, once.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import gymnasium
import numpy as np

from diffusion_policy.controller import Controller, planning_generator
from diffusion_policy.engines import HANG_AFTER
from diffusion_policy.metrics import Episode, Lost, Plan
from diffusion_policy.pool import EnvironmentPool, Fault, Transition

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
        self.seed, self.repeat = seed, repeat
        self.observations = [observation]
        self.actions: list[np.ndarray] = []
        self.plans: list[Plan] = []
        self.success = False
        self.rewards = 0.0
        self.measures: Mapping[str, float] | None = None

    def add(self, action: np.ndarray, transition: Transition) -> None:
        self.actions.append(action)
        self.observations.append(transition.observation)
        if "is_success" not in transition.info:
            raise RolloutError("the environment must give info['is_success'] at every step; its info has no such key")
        self.success = bool(transition.info["is_success"])
        self.rewards += transition.reward
        self.measures = transition.info.get("measures")

    def finish(self, mode_of: ModeOf) -> Episode:
        observations = {key: np.stack([step[key] for step in self.observations]) for key in self.observations[0]}
        measures = {"return": self.rewards} if self.measures is None else dict(self.measures)
        mode = mode_of(observations)
        actions = np.stack(self.actions)
        return Episode(self.seed, self.success, mode, observations, actions, self.repeat, measures, tuple(self.plans))


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
) -> list[Episode]:
    """`repeats` episodes a seed, which differ in their planning noise, in the order of the seeds.

    `make_env` must be picklable for more than one worker; `make_controller(slots)` makes the controller; `parallel`:
    how many environments run at once; `on_lost` hears of an episode whose environment raised an error, crashed its
    worker or did not answer within `hang_after` [s] at each attempt. Raises RolloutError when none can be run.
    """
    episodes = list(itertools.product(seeds, range(repeats)))
    slots = min(parallel, len(episodes))
    controller = make_controller(slots)
    waiting = list(reversed(episodes))
    free = list(range(slots))
    running: dict[int, _Recording] = {}
    finished: dict[tuple[int, int], Episode] = {}
    failures: dict[tuple[int, int], int] = {}
    lost = 0
    latest: dict[str, np.ndarray] = {}
    step = 0

    def give_up(seed: int, repeat: int, fault: Fault) -> None:
        """Begin the episode again later, or count it as lost."""
        nonlocal lost
        if fault.hopeless:
            raise RolloutError(fault.reason)
        failures[seed, repeat] = failures.get((seed, repeat), 0) + fault.blamed
        if failures[seed, repeat] < ATTEMPTS:
            waiting.append((seed, repeat))
            return
        lost += 1
        on_lost(Lost(seed, repeat, fault.reason))
        if lost >= HOPELESS and not finished:
            raise RolloutError(f"the first {lost} episodes failed {ATTEMPTS} times each: {fault.reason}")

    with EnvironmentPool(make_env, min(workers, slots), hang_after) as pool:
        while running or waiting:
            if free and waiting and (step % controller.action_horizon == 0 or not running):
                step = 0  # only at planning time, so that all slots plan together, in few and full batches
                begun = {slot: waiting.pop() for slot in free[: len(waiting)]}
                free = free[len(begun) :]
                generators = [planning_generator(seed, repeat) for seed, repeat in begun.values()]
                controller.reset(_mask(begun, slots), generators)
                for slot, observation in pool.reset({slot: seed for slot, (seed, _) in begun.items()}).items():
                    if isinstance(observation, Fault):
                        fallen = begun.get(slot) or _name(running.pop(slot, None))
                        if fallen:
                            give_up(*fallen, observation)
                            free.append(slot)
                    else:
                        running[slot] = _Recording(*begun[slot], observation)
                        _store(latest, slots, slot, observation)
                free.sort()
                if not running:
                    continue
            actions = controller.act(latest, _mask(running, slots))
            for slot, plan in controller.planned.items():
                running[slot].plans.append(Plan(len(running[slot].actions), plan))
            transitions = pool.step({slot: actions[slot] for slot in running})
            for slot, transition in sorted(transitions.items()):
                recording = running.get(slot)
                if recording is None:
                    continue  # its worker fell after its episode had ended
                if isinstance(transition, Fault):
                    del running[slot]
                    give_up(recording.seed, recording.repeat, transition)
                    free.append(slot)
                    continue
                recording.add(actions[slot], transition)
                _store(latest, slots, slot, transition.observation)
                if transition.terminated or transition.truncated:
                    del running[slot]
                    episode = recording.finish(mode_of)
                    finished[episode.seed, episode.repeat] = episode
                    on_episode(episode)
                    free.append(slot)
            free.sort()
            step += 1
    return [finished[episode] for episode in episodes if episode in finished]


def _name(recording: _Recording | None) -> tuple[int, int] | None:
    """Seed and repeat of an episode in the making."""
    return (recording.seed, recording.repeat) if recording else None


def _mask(chosen: Iterable[int], slots: int) -> np.ndarray:
    """Whether each slot is chosen, (slots,) bool."""
    return np.isin(np.arange(slots), list(chosen))


def _store(latest: dict[str, np.ndarray], slots: int, slot: int, observation: Mapping[str, np.ndarray]) -> None:
    """Put one slot's observation into the arrays (slots, ...) that the controller reads."""
    for key, value in observation.items():
        latest.setdefault(key, np.zeros((slots, *np.shape(value)), np.float32))[slot] = value

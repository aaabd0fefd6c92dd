"""Episodes of a controller in many environments at once: environment factory + controller + seeds → list of Episode.

All slots step together, and a slot takes the next seed when its episode ends; so the course of an evaluation depends on
seeds and slots alone, not on processes or timing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import gymnasium
import numpy as np

from diffusion_policy.controller import Controller, planning_generator
from diffusion_policy.engines import EnvironmentPool, Transition
from diffusion_policy.metrics import Episode

ModeOf = Callable[[Mapping[str, np.ndarray]], str | None]
"""An episode's observations {key: (steps + 1, ...)} → its mode."""


class _Recording:
    """An episode in the making."""

    def __init__(self, seed: int, observation: dict[str, np.ndarray]) -> None:
        self.seed = seed
        self.observations = [observation]
        self.actions: list[np.ndarray] = []
        self.success = False

    def add(self, action: np.ndarray, transition: Transition) -> None:
        self.actions.append(action)
        self.observations.append(transition.observation)
        if "is_success" not in transition.info:
            raise ValueError("the environment must give info['is_success'] at every step; its info has no such key")
        self.success = bool(transition.info["is_success"])

    def finish(self, mode_of: ModeOf) -> Episode:
        observations = {key: np.stack([step[key] for step in self.observations]) for key in self.observations[0]}
        return Episode(self.seed, self.success, mode_of(observations), observations, np.stack(self.actions))


def rollout(
    make_env: Callable[[], gymnasium.Env],
    make_controller: Callable[[int], Controller],
    seeds: Sequence[int],
    mode_of: ModeOf,
    parallel: int = 25,
    workers: int = 1,
    on_episode: Callable[[Episode], None] = lambda _: None,
) -> list[Episode]:
    """One episode a seed, in the order of the seeds.

    `make_env` must be picklable for more than one worker; `make_controller(slots)` makes the controller; `parallel`:
    how many environments run at once.
    """
    slots = min(parallel, len(seeds))
    controller = make_controller(slots)
    waiting = list(reversed(seeds))
    free = list(range(slots))
    running: dict[int, _Recording] = {}
    finished: dict[int, Episode] = {}
    latest: dict[str, np.ndarray] = {}
    step = 0

    with EnvironmentPool(make_env, min(workers, slots)) as pool:
        while running or waiting:
            if free and waiting and (step % controller.action_horizon == 0 or not running):
                step = 0  # only at planning time, so that all slots plan together, in few and full batches
                seed_of = {slot: waiting.pop() for slot in free[: len(waiting)]}
                free = free[len(seed_of) :]
                controller.reset(_mask(seed_of, slots), [planning_generator(seed) for seed in seed_of.values()])
                for slot, observation in pool.reset(seed_of).items():
                    running[slot] = _Recording(seed_of[slot], observation)
                    _store(latest, slots, slot, observation)
            actions = controller.act(latest, _mask(running, slots))
            transitions = pool.step({slot: actions[slot] for slot in running})
            for slot, transition in sorted(transitions.items()):
                running[slot].add(actions[slot], transition)
                _store(latest, slots, slot, transition.observation)
                if transition.terminated or transition.truncated:
                    episode = running.pop(slot).finish(mode_of)
                    finished[episode.seed] = episode
                    on_episode(episode)
                    free.append(slot)
            free.sort()
            step += 1
    return [finished[seed] for seed in seeds]


def _mask(chosen: Iterable[int], slots: int) -> np.ndarray:
    """Whether each slot is chosen, (slots,) bool."""
    return np.isin(np.arange(slots), list(chosen))


def _store(latest: dict[str, np.ndarray], slots: int, slot: int, observation: Mapping[str, np.ndarray]) -> None:
    """Put one slot's observation into the arrays (slots, ...) that the controller reads."""
    for key, value in observation.items():
        latest.setdefault(key, np.zeros((slots, *np.shape(value)), np.float32))[slot] = value

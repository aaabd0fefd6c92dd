"""Environment + expert → store. Both are passed in; so is the map that spreads the work over processes.

Knows seeds, modes and noise. Knows no simulator.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping
from time import monotonic
from typing import Any, Protocol

import numpy as np

from diffusion_policy.datasets.store import Demonstration, EpisodeStore


class Expert(Protocol):
    """A feedback controller for one mode."""

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next action."""
        ...


class Demonstrator:
    """Runs one expert episode a call, in an environment that it keeps.

    The executed action is the expert's plus normal noise; the expert's own is recorded. So the demonstrations show how
    to come back from where the noise leads, as in DART (Laskey et al. 2017, arXiv 1703.09327).
    """

    def __init__(self, make_env: Callable[[], Any], make_expert: Callable[[Any], Expert], noise: float) -> None:
        """`make_expert` is called with the label of a mode, with None where the environment lists none; `noise`:
        standard deviation, as a share of the length of the expert's action."""
        self._env = make_env()
        self._make_expert = make_expert
        self._noise = noise

    def __call__(self, seed: int) -> Demonstration:
        """The episode of one seed; the modes take turns, seed by seed."""
        env = self._env
        modes = env.get_wrapper_attr("modes")
        expert = self._make_expert(modes[seed % len(modes)] if modes else None)
        rng = disturbance_generator(seed)
        observation, info = env.reset(seed=seed)
        observations, actions = [], []
        done = False
        while not done:
            action = expert.act(observation)
            observations.append(observation)
            actions.append(action)
            observation, _, terminated, truncated, info = env.step(disturb(action, self._noise, rng))
            done = terminated or truncated
        data = {key: np.stack([row[key] for row in observations]) for key in observation}
        path = {key: np.concatenate([rows, observation[key][None]]) for key, rows in data.items()}
        data["action"] = np.stack(actions)
        return Demonstration(data, seed, env.get_wrapper_attr("mode")(path), bool(info["is_success"]))


def disturbance_generator(seed: int) -> np.random.Generator:
    """Where the noise of an episode comes from, apart from the environment's own numbers."""
    return np.random.default_rng([seed, 1])


def disturb(action: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """The action that is executed: with normal noise of `noise` times its length."""
    disturbance = noise * np.linalg.norm(action) * rng.standard_normal(action.shape)
    return (action + disturbance).astype(action.dtype)


OrderedMap = Callable[[Callable[[], Callable[[int], Demonstration]], Iterable[int]], Generator[Demonstration]]
"""(make_function, seeds) → results in the order of the seeds; each process makes its own function."""


def in_this_process(
    make_demonstrator: Callable[[], Callable[[int], Demonstration]], seeds: Iterable[int]
) -> Generator[Demonstration]:
    """The simplest OrderedMap."""
    yield from map(make_demonstrator(), seeds)


def collect(
    store: EpisodeStore,
    make_demonstrator: Callable[[], Callable[[int], Demonstration]],
    episodes: int,
    first_seed: int,
    ordered_map: OrderedMap = in_this_process,
    on_episode: Callable[[Demonstration], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    writing_share: float = 0.03,
) -> None:
    """Add successes of the seeds from `first_seed` on, in their order, until the store holds `episodes`.

    Failures are left out. Finished episodes are committed as soon as that keeps the time spent on writing at about
    `writing_share` of all: slow episodes one by one, fast ones some at a time. It ends early when `should_stop`; that,
    or an error, keeps what has finished. Raises ValueError when, after a hundred attempts, fewer than one in ten has
    succeeded.
    """
    finished: list[Demonstration] = []
    missing = episodes - len(store.episode_ends)
    successes, due = 0, monotonic()
    try:
        with contextlib.closing(ordered_map(make_demonstrator, itertools.count(first_seed))) as demonstrations:
            for attempts, demonstration in enumerate(demonstrations, start=1):
                on_episode(demonstration)
                if demonstration.success:
                    finished.append(demonstration)
                    successes += 1
                if successes == missing or should_stop():
                    break
                if attempts >= 100 and successes < attempts / 10:
                    raise ValueError(f"only {successes} of {attempts} episodes succeeded; lower the noise")
                if finished and monotonic() >= due:
                    started = monotonic()
                    store.append(finished)
                    finished.clear()
                    due = monotonic() + (monotonic() - started) / writing_share
    finally:
        store.append(finished)

"""Collects demonstrations: environment and expert → store. Both are passed in, and so is the map over processes.

Knows seeds, modes and noise. Knows no simulator.
"""

import contextlib
import itertools
import math
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np

from diffusion_policy.basics.bounds import MOST_SEED, MOST_STEPS
from diffusion_policy.basics.text import error_line_with_place, error_message
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore

MOST_HELD_BYTES = 2**26
"""So many bytes of finished episodes, which images come to soon, are written at once."""


class DemonstratorError(ValueError):
    """An environment and an expert of which no demonstration can be made."""

    hopeless = True
    """Trying again does not help."""


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
        """`make_env` makes an environment as `envs.adapters.EnvSpec` does; `make_expert` is called with the label of a
        mode, with None where the environment lists none; `noise`: standard deviation, as a share of the length of the
        expert's action, see `disturb`. Raises DemonstratorError for what cannot be."""
        if not (isinstance(noise, int | float) and 0 <= noise < math.inf):
            raise DemonstratorError(f"noise must be a finite number of at least 0; got {noise!r}")
        try:
            self._env = make_env()
        except (Exception, SystemExit) as error:
            reason = error_message(error) if isinstance(error, ValueError) else error_line_with_place(error)
            raise DemonstratorError(f"the environment cannot be made: {reason}") from error
        self._make_expert = make_expert
        self._noise = noise
        self._most_steps = _time_limit(self._env) or MOST_STEPS
        space = getattr(self._env, "observation_space", None)
        if not isinstance(getattr(space, "spaces", None), Mapping):
            raise DemonstratorError(
                f"the environment must observe a dict of arrays; got {space}; make it with "
                "diffusion_policy.envs.adapters.EnvSpec"
            )
        known = [name for name in ("modes", "mode") if self._env.has_wrapper_attr(name)]
        if len(known) < 2 or not callable(self._env.get_wrapper_attr("mode")):
            raise DemonstratorError(
                "the environment must have modes and mode(observations); make it with "
                "diffusion_policy.envs.adapters.EnvSpec"
            )

    def __call__(self, seed: int) -> Demonstration:
        """The episode of one seed; the modes take turns, seed by seed. Raises DemonstratorError, which names the seed,
        for whatever environment and expert raise."""
        try:
            return self._run(seed)
        except (Exception, SystemExit) as error:
            reason = error_message(error) if getattr(error, "hopeless", False) else error_line_with_place(error)
            raise DemonstratorError(f"the episode of seed {seed} failed: {reason}") from error

    def require_fit(self, store: EpisodeStore) -> None:
        """Raise DemonstratorError where the episodes cannot be added to those of a store."""
        modes = tuple(self._env.get_wrapper_attr("modes"))
        if not set(modes) <= set(store.modes):
            known = ", ".join(store.modes) or "none"
            raise DemonstratorError(f"{store.location} knows the modes {known}; the environment has {', '.join(modes)}")
        if len(store.episode_ends) == 0:
            return
        spaces = {**self._env.observation_space.spaces, "action": self._env.action_space}
        offered = {key: tuple(space.shape) for key, space in sorted(spaces.items())}
        stored = {key: store.shape(key) for key in sorted(store.keys)}
        if offered != stored:
            raise DemonstratorError(f"{store.location} holds {stored}; the environment gives {offered}")

    def close(self) -> None:
        """Close the environment; one that fails at that has done its work."""
        with contextlib.suppress(Exception, SystemExit):
            self._env.close()

    def _run(self, seed: int) -> Demonstration:
        env = self._env
        modes = env.get_wrapper_attr("modes")
        rng = disturbance_generator(seed)
        observation, info = env.reset(seed=seed)
        if env.has_wrapper_attr("modes_that_solve"):  # of a goal that the episode begins with
            modes = env.get_wrapper_attr("modes_that_solve")(observation)
        expert = self._make_expert(modes[seed % len(modes)] if modes else None)
        observations, actions = [_copy(observation)], []
        for _ in range(self._most_steps):
            action = _require_action(expert.act(observation), env.action_space)
            actions.append(action)
            executed = disturb(action, self._noise, rng, still_action(env, observation))
            observation, _, terminated, truncated, info = env.step(executed)
            observations.append(_copy(observation))
            if terminated or truncated:
                break
        path = {key: np.stack([row[key] for row in observations]) for key in observations[0]}
        data = {key: rows[:-1] for key, rows in path.items()} | {"action": np.stack(actions)}
        if "is_success" not in info:
            raise DemonstratorError("the environment must give info['is_success'] at every step")
        return Demonstration(data, seed, env.get_wrapper_attr("mode")(path), bool(info["is_success"]))


def _time_limit(env: Any) -> int | None:
    """Steps of the time limit that is put around an environment, as Gymnasium does."""
    layer = env
    while layer is not None:
        attributes = getattr(layer, "__dict__", {})
        if limit := attributes.get("_max_episode_steps"):
            return limit
        layer = attributes.get("env")
    return None


def _copy(observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Some environments change theirs in place."""
    return {key: np.array(value) for key, value in observation.items()}


def _require_action(action: Any, space: Any) -> np.ndarray:
    """A copy of an expert's action, of floats. Raises DemonstratorError for what is none."""
    row = np.array(action)
    fits = row.dtype.kind in "biuf" and row.shape == space.shape
    if not fits or not np.isfinite(row).all():
        raise DemonstratorError(
            f"the expert must give finite numbers of shape {space.shape}; got {row.dtype} of shape {row.shape}"
            + (", with NaN or infinity" if fits else "")
        )
    return row if row.dtype.kind == "f" else row.astype(space.dtype)


def disturbance_generator(seed: int) -> np.random.Generator:
    """Where the noise of an episode comes from, apart from the environment's own numbers."""
    return np.random.default_rng([seed, 1])


def still_action(env: Any, observation: Mapping[str, np.ndarray]) -> np.ndarray | float:
    """The action under which nothing would move: 0, unless the environment says which, as one does whose actions are
    places."""
    return env.get_wrapper_attr("still_action")(observation) if env.has_wrapper_attr("still_action") else 0.0


def disturb(action: np.ndarray, noise: float, rng: np.random.Generator, still: np.ndarray | float = 0.0) -> np.ndarray:
    """The action that is executed: with normal noise of `noise` times its length, or its distance from the action under
    which nothing would move."""
    disturbance = noise * np.linalg.norm(action - still) * rng.standard_normal(action.shape)
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
    imap: OrderedMap = in_this_process,
    *,
    on_episode: Callable[[Demonstration], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    writing_share: float = 0.03,
) -> None:
    """Add successes of the seeds from `first_seed` on, in their order, until the store holds `episodes`; nothing where
    it holds as many.

    Failures are left out. Finished episodes are committed as soon as that keeps the time spent on writing at about
    `writing_share` of all: slow episodes one by one, fast ones some at a time, but images before they fill the memory.
    It ends early when `should_stop`; that, an error or Ctrl-C keeps what has finished. Raises ValueError, before an
    episode is begun, for what cannot be, and when, after a hundred attempts, fewer than one in ten has succeeded.
    """
    _check_arguments(episodes, first_seed, writing_share)
    missing = episodes - len(store.episode_ends)
    if missing <= 0:
        return
    _require_fit(make_demonstrator, store)
    finished, successes = _Finished(store, writing_share), 0
    folder, seeds = Path.cwd(), itertools.count(first_seed)  # an environment may change the folder
    with contextlib.chdir(folder), contextlib.closing(imap(make_demonstrator, seeds)) as demonstrations:
        try:
            for attempts, demonstration in enumerate(demonstrations, start=1):
                if demonstration.success:
                    finished.add(demonstration)
                    successes += 1
                on_episode(demonstration)
                if successes == missing or should_stop():
                    break
                if attempts >= 100 and successes < attempts / 10:
                    raise ValueError(f"only {successes} of {attempts} episodes succeeded; lower the noise")
                finished.commit_if_due()
        finally:
            finished.commit()


class _Finished:
    """Finished episodes on their way to a store, which lies where it did when this was made."""

    def __init__(self, store: EpisodeStore, writing_share: float) -> None:
        self._store = store
        self._writing_share = writing_share
        self._folder = Path.cwd()
        self._episodes: list[Demonstration] = []
        self._due = monotonic()

    def add(self, episode: Demonstration) -> None:
        """Hold an episode."""
        self._episodes.append(episode)

    def commit_if_due(self) -> None:
        """Commit, where the time spent on writing stays at about its share of all, or the memory is needed."""
        started = monotonic()
        held = sum(rows.nbytes for episode in self._episodes for rows in episode.data.values())
        if self._episodes and (started >= self._due or held >= MOST_HELD_BYTES):
            self.commit()
            self._due = monotonic() + (monotonic() - started) / self._writing_share

    def commit(self) -> None:
        """Add the episodes to the store and let go of them; where one of them cannot be stored, those before it."""
        with uninterrupted(), contextlib.chdir(self._folder):
            try:
                self._store.append(self._episodes)
                self._episodes.clear()
            except ValueError:
                while self._episodes:
                    self._store.append(self._episodes[:1])
                    del self._episodes[0]


def _require_fit(make_demonstrator: Callable[[], Callable[[int], Demonstration]], store: EpisodeStore) -> None:
    demonstrator = make_demonstrator()
    if isinstance(demonstrator, Demonstrator):
        try:
            demonstrator.require_fit(store)
        finally:
            demonstrator.close()


def _check_arguments(episodes: int, first_seed: int, writing_share: float) -> None:
    _require_whole("episodes", episodes, 1, math.inf)
    _require_whole("first_seed", first_seed, 0, MOST_SEED)
    if not 0 < writing_share <= 1:
        raise ValueError(f"writing_share must be above 0 and at most 1; got {writing_share!r}")


def _require_whole(name: str, value: Any, lowest: int, highest: float) -> None:
    if not isinstance(value, int | np.integer) or not lowest <= value <= highest:
        most = f" and at most {highest}" if highest < math.inf else ""
        raise ValueError(f"{name} must be a whole number of at least {lowest}{most}; got {value!r:.60}")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM within the context act once it ends."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    heard: list[int] = []
    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not None:  # None: set outside Python
                before[number] = signal.signal(number, lambda number, _frame: heard.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in heard[:1]:
            signal.raise_signal(number)

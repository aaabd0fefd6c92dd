"""What a live session records: the episode in the making, and the store that keeps whole ones.

Knows stores and environments' modes. Knows no policy and no mouse.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.basics.files import plain
from diffusion_policy.commands.environment import describe_episodes
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore

ACTOR = "actor"
"""Column of a recorded store: who acted, 0 the policy, 1 a person."""
POLICY, PERSON = 0, 1


class LiveEpisode:
    """An episode in the making, and how it ended."""

    def __init__(self, seed: int, observation: Mapping[str, Any]) -> None:
        self.seed = seed
        self.observation = _copied(observation)
        """What was observed last."""
        self.actions: list[np.ndarray] = []
        self.ended, self.lingered = False, 0
        self.success: bool | None = None
        self.mode: str | None = None
        self._observations: list[Mapping[str, np.ndarray]] = []
        self._marks: list[Mapping[str, int]] = []

    def act(self, action: np.ndarray, marks: Mapping[str, int]) -> None:
        """Note what is done about the last observation; `marks`: further columns of the store, such as ACTOR."""
        self._observations.append(self.observation)
        self.actions.append(np.asarray(action, np.float64).reshape(-1))
        self._marks.append(marks)

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Note what came of it."""
        self.observation = _copied(observation)

    def path(self) -> dict[str, np.ndarray]:
        """All observations, {key: (steps + 1, ...)}."""
        return {
            key: np.stack([one[key] for one in [*self._observations, self.observation]]) for key in self.observation
        }

    def end(self, success: bool, mode: str | None) -> None:
        """Note how it ended."""
        self.ended, self.success, self.mode = True, success, mode

    def demonstration(self) -> Demonstration:
        """As it is stored."""
        path = self.path()
        data = {key: rows[:-1] for key, rows in path.items()}
        marks = {name: np.array([[each[name]] for each in self._marks], np.uint8) for name in self._marks[0]}
        final = {key: rows[-1] for key, rows in path.items()} | {name: np.zeros(1, np.uint8) for name in marks}
        data |= {"action": np.stack(self.actions)} | marks
        return Demonstration(data, self.seed, self.mode, self.success, final)


class Recording:
    """The store that whole episodes go into, and whether they do."""

    def __init__(self, store: EpisodeStore | None) -> None:
        self._store, self.on = store, False
        self._counts = Counter() if store is None else _count_modes(store)
        self._held: Demonstration | None = None
        """The last episode, which can be undone until the next one has ended."""

    def switch(self, on: bool) -> None:
        """Record, or do not. Raises ConfigError where there is no store."""
        if self._store is None:
            raise ConfigError("nothing is recorded without --record STORE")
        self.on = on

    def add(self, episode: LiveEpisode) -> None:
        """Hold an episode that has ended; the one before is written."""
        if self.on:
            self._keep()
            self._held = episode.demonstration()

    def undo(self) -> None:
        """Forget the last episode. Raises ConfigError where it is written."""
        if self._held is None:
            raise ConfigError("there is no episode to undo: the last one can be until the next one has ended")
        self._held = None

    def _keep(self) -> None:
        if self._held is not None and self._store is not None:
            self._store.append([self._held])
            self._counts[self._held.mode or "none"] += 1
        self._held = None

    def close(self) -> None:
        """Keep the last episode, and let other writers in."""
        try:
            self._keep()
        finally:
            if self._store is not None:
                self._store.close()

    def tell(self) -> dict[str, Any]:
        """What the page shows of it."""
        recorded = Counter(self._counts)
        if self._held is not None:
            recorded[self._held.mode or "none"] += 1
        return {
            "recording": self.on,
            "can_record": self._store is not None,
            "recorded": dict(recorded),
            "can_undo": self._held is not None,
        }


def open_record(path: Path, loaded: PolicyInEnv, modes: tuple[str, ...], marks: tuple[str, ...]) -> EpisodeStore:
    """A new store, or one of this kind to go on with, with the columns `marks`. Raises StoreError for another."""
    if not path.exists():
        return EpisodeStore.create(path, describe_episodes(loaded.env), modes)
    store = EpisodeStore.append_to(path)
    reason, missing = None, [name for name in marks if name not in store.keys]
    if len(store.episode_ends) and missing:
        reason = f"has no column {missing[0]}, which live writes in this environment"
    elif store.attributes.get("environment") != plain(describe_episodes(loaded.env)["environment"]):
        reason = "holds episodes of another environment"
    elif tuple(store.modes) != modes:
        reason = "has other modes"
    if reason is not None:
        store.close()
        raise ConfigError(f"{path} {reason}; choose another --record")
    return store


def _count_modes(store: EpisodeStore) -> Counter[str]:
    """Episodes of each mode."""
    return Counter(mode or "none" for mode in store.episode_modes()) if len(store.episode_ends) else Counter()


def _copied(observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An environment may go on in the same memory."""
    return {key: np.array(value) for key, value in observation.items()}

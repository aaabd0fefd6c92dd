"""A Gymnasium wrapper that records the user's own loop into a store.

Knows Gymnasium environments and stores. Knows no policy. What it records is what a policy will observe: the names and
shapes of `envs.spaces`.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from diffusion_policy.datasets.demonstration import SEEDS, Demonstration, is_seed
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.contract import control_rate, guard, name_of_env, to_truth
from diffusion_policy.envs.protocols import as_multimodal, layers
from diffusion_policy.envs.spaces import EnvSpecError, action_box, action_row, observe, observed_parts
from diffusion_policy.envs.wrappers import describe_env, lost


class Recorder(gymnasium.Wrapper):
    """Passes everything through, and appends each episode to a store when it ends (terminated or truncated).

    A Box observation is stored as `observation`, the parts of nested ones under their paths, `camera.depth`; an action
    as a row of numbers. An episode that is cut off by the next `reset` is dropped, unless `save` is called before;
    steps after its end are not recorded. Known as well: the seed that `reset` was given, `is_success` or `success` of
    the last info, the mode, where the environment has modes, and how the environment was made, with the wrappers within
    the recorder. Use it as a context manager, or close it.
    """

    def __init__(
        self, env: gymnasium.Env, store: EpisodeStore | Path | str, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """`store`: a new path, or a store that is open to append; `attributes`: of a new store, beside or instead of
        those that are taken from the environment. Raises StoreError when the path exists, and ValueError for what
        cannot be recorded: actions that are no Box of floats, observations that are no numbers, a store that holds
        others. Warns of wrappers and arguments that the store cannot keep."""
        super().__init__(guard(env))
        self._name = name_of_env(env)
        if any(isinstance(layer, gymnasium.wrappers.Autoreset) for layer in layers(env)):
            raise ValueError(f"{self._name} resets itself (Autoreset); leave that wrapper out and call reset")
        self._parts = observed_parts(env.observation_space, self._name)
        self._actions_box = action_box(env.action_space, self._name)
        self._task = as_multimodal(env)
        try:
            json.dumps(dict(attributes or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"attributes must be JSON with finite numbers: {error}") from error
        attributes = {**self._describe(), **(attributes or {})}
        modes = () if self._task is None else tuple(self._task.modes)
        if isinstance(store, EpisodeStore):
            self._require_same(store, attributes, modes)
        else:
            self._require_recorded(attributes)
            store = EpisodeStore.create(store, attributes, modes)
        self._warn(attributes, store)
        self.store = store
        self._seed: int | None = None
        self._info: dict[str, Any] = {}
        self._observations: list[dict[str, np.ndarray]] = []
        self._actions: list[np.ndarray] = []
        self._ended = True
        self._beyond = False
        self.instruction: str | None = None
        """What an episode is told, when it is saved: one of the store's instructions, which the attribute
        `instructions` lists."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; what was not saved of the last one is dropped. Raises ValueError for a seed that a store
        cannot keep."""
        if not is_seed(seed):
            raise ValueError(f"a seed is {SEEDS}; got {seed!r:.100}")
        observation, info = self.env.reset(seed=seed, options=options)
        self._seed, self._info = seed, info
        self._observations, self._actions = [observe(self._parts, observation, self._name)], []
        self._ended = False
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step, and save the episode when it was the last one. Raises ValueError, before the step is taken, for
        an action that is not finite or has other numbers than the action space."""
        if self._ended:
            return self.env.step(action)
        row = action_row(self._actions_box, action, self._name)
        if not self._beyond and not self._actions_box.contains(row):
            self._beyond = True
            warnings.warn(
                f"an action lies outside {self._name}'s action space: a policy's actions will be clipped to it",
                stacklevel=2,
            )
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._actions.append(row)
        self._observations.append(observe(self._parts, observation, self._name))
        self._info = info
        if terminated or truncated:
            self._ended = True
            self.save()
        return observation, reward, terminated, truncated, info

    def save(self) -> None:
        """Append the episode as it is now; a step or reset begins nothing new by itself. Does nothing without steps."""
        if not self._actions:
            return
        path = {key: np.stack([row[key] for row in self._observations]) for key in self._observations[0]}
        data = {key: rows[:-1] for key, rows in path.items()} | {"action": np.stack(self._actions)}
        final = {key: rows[-1] for key, rows in path.items()}
        known = Demonstration(data, self._seed, self._mode(path), self._success(), final)
        self.store.append([known._replace(instruction=self.instruction)])
        self._observations, self._actions = self._observations[-1:], []

    def discard(self) -> None:
        """Forget the steps since the last reset or save."""
        self._observations, self._actions = self._observations[-1:], []

    def close(self) -> None:
        """Close the store and the environment."""
        self.store.close()
        super().close()

    def _mode(self, path: Mapping[str, np.ndarray]) -> str | None:
        """The episode's mode; None, said, where the environment's own function fails: the episode is kept."""
        if self._task is None:
            return None
        try:
            label = self._task.mode(path)
        except Exception as error:
            warnings.warn(f"{self._name} could not say the mode of an episode: {error!r:.300}", stacklevel=4)
            return None
        if label is not None and label not in self.store.modes:
            warnings.warn(f"{self._name} gave {label!r:.60} as a mode, which is none of its own", stacklevel=4)
            return None
        return label

    def _success(self) -> bool | None:
        """What the last info says; None where it says nothing that is yes or no."""
        said = self._info.get("is_success", self._info.get("success"))
        try:
            return None if said is None else to_truth(said, "")
        except EnvSpecError:
            return None

    def _describe(self) -> dict[str, Any]:
        """Attributes of a store of this environment's episodes."""
        attributes: dict[str, Any] = {"observation_keys": sorted(self._parts), "action_key": "action"}
        environment, rate = describe_env(self.env), control_rate(self.env)
        if environment is not None:
            attributes["environment"] = environment
        return attributes | ({"control_frequency": rate} if rate else {})

    def _require_recorded(self, attributes: Mapping[str, Any]) -> None:
        """Raise ValueError where attributes name keys that will not be in the store."""
        recorded = [*sorted(self._parts), "action"]
        observed = attributes["observation_keys"]
        named = {"observation_keys": observed if isinstance(observed, list) else []}
        named["action_key"] = [attributes["action_key"]]
        for name, keys in named.items():
            others = [key for key in keys if key not in recorded]
            if others:
                raise ValueError(f"{name} names {others[0]!r:.100}; {self._name} is recorded as {', '.join(recorded)}")

    def _require_same(self, store: EpisodeStore, attributes: Mapping[str, Any], modes: tuple[str, ...]) -> None:
        """Raise ValueError where episodes of this environment cannot be appended to a store that is there."""
        others = [mode for mode in modes if mode not in store.modes]
        if others:
            known = ", ".join(store.modes) or "none"
            raise ValueError(f"{store.location} knows the modes {known}; {self._name} has {', '.join(others)} as well")
        recorded = store.attributes.get("environment")
        if recorded is not None and recorded != attributes.get("environment"):
            raise ValueError(
                f"{store.location} holds episodes of {recorded}; this is {attributes.get('environment')}; record it "
                "into a store of its own"
            )
        if not len(store.episode_ends):
            return
        there = {key: (store.shape(key), store.dtype(key)) for key in store.keys}
        boxes = {name: part.box for name, part in self._parts.items()} | {"action": self._actions_box}
        here = {name: (box.shape, box.dtype) for name, box in boxes.items()}
        if there != here:
            has, gives = (
                ", ".join(f"{key} {dtype}{list(shape)}" for key, (shape, dtype) in sorted(one.items()))
                for one in (there, here)
            )
            raise ValueError(f"{store.location} holds {has}; {self._name} gives {gives}; record it into another store")

    def _warn(self, attributes: Mapping[str, Any], store: EpisodeStore) -> None:
        """Say what of the environment the store cannot keep."""
        environment = attributes.get("environment") or {}
        names = lost(environment.get("wrappers", ()))
        if names:
            warnings.warn(
                f"{store.location} cannot keep {', '.join(names)}: to act in this environment, register one that is "
                "made with it, and name that with --env",
                stacklevel=3,
            )

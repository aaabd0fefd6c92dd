"""A Gymnasium wrapper that records the user's own loop into a store.

Knows Gymnasium environments and stores. Knows no policy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from diffusion_policy.datasets.store import Demonstration, EpisodeStore


class Recorder(gymnasium.Wrapper):
    """Passes everything through, and appends each episode to a store when it ends (terminated or truncated).

    A Box observation is stored as `observation`, a Dict one under its own keys; an episode that is cut off by the next
    `reset` is dropped, unless `save` is called before. Known as well: the seed that `reset` was given, `is_success` or
    `success` of the last info, and the mode, where the environment has modes. Use it as a context manager, or close it.
    """

    def __init__(
        self, env: gymnasium.Env, store: EpisodeStore | Path | str, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """`store`: a new path, or a store that is open to append; `attributes`: of a new store, beside those that are
        taken from the environment. Raises StoreError when the path exists, and ValueError for spaces that are no Box
        (or Dict of Box)."""
        super().__init__(env)
        space = env.observation_space
        spaces = space.spaces if isinstance(space, gymnasium.spaces.Dict) else {"observation": space}
        if "action" in spaces:
            raise ValueError("an observation cannot be recorded as 'action', where the actions are; rename it")
        for name, part in {**spaces, "action": env.action_space}.items():
            if not isinstance(part, gymnasium.spaces.Box):
                raise ValueError(f"only Box spaces, or a Dict of them, can be recorded; {name} is {part}")
        self._dict = isinstance(space, gymnasium.spaces.Dict)
        self._modes: tuple[str, ...] = tuple(env.get_wrapper_attr("modes")) if env.has_wrapper_attr("modes") else ()
        if not isinstance(store, EpisodeStore):
            store = EpisodeStore.create(store, {**_describe(env, list(spaces)), **(attributes or {})}, self._modes)
        self.store = store
        self._seed: int | None = None
        self._info: dict[str, Any] = {}
        self._observations: list[dict[str, np.ndarray]] = []
        self._actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; what was not saved of the last one is dropped."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._seed, self._info = seed, info
        self._observations, self._actions = [self._row(observation)], []
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step, and save the episode when it was the last one."""
        self._actions.append(np.array(action, dtype=self.env.action_space.dtype))
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._observations.append(self._row(observation))
        self._info = info
        if terminated or truncated:
            self.save()
        return observation, reward, terminated, truncated, info

    def save(self) -> None:
        """Append the episode as it is now; a step or reset begins nothing new by itself. Does nothing without steps."""
        if not self._actions:
            return
        path = {key: np.stack([row[key] for row in self._observations]) for key in self._observations[0]}
        data = {key: rows[:-1] for key, rows in path.items()} | {"action": np.stack(self._actions)}
        success = self._info.get("is_success", self._info.get("success"))
        mode = self.env.get_wrapper_attr("mode")(path) if self._modes else None
        final = {key: rows[-1] for key, rows in path.items()}
        self.store.append([Demonstration(data, self._seed, mode, None if success is None else bool(success), final)])
        self._observations, self._actions = self._observations[-1:], []

    def discard(self) -> None:
        """Forget the steps since the last reset or save."""
        self._observations, self._actions = self._observations[-1:], []

    def close(self) -> None:
        """Close the store and the environment."""
        self.store.close()
        super().close()

    def _row(self, observation: Any) -> dict[str, np.ndarray]:
        row = observation if self._dict else {"observation": observation}
        return {key: np.array(value) for key, value in row.items()}


def _describe(env: gymnasium.Env, observation_keys: list[str]) -> dict[str, Any]:
    """Attributes of a store of this environment's episodes."""
    attributes: dict[str, Any] = {"observation_keys": sorted(observation_keys), "action_key": "action"}
    if env.spec is not None:
        arguments = {key: value for key, value in env.spec.kwargs.items() if key != "render_mode"}
        attributes["environment"] = {"id": env.spec.id, "arguments": arguments}
    if env.metadata.get("render_fps"):
        attributes["control_frequency"] = env.metadata["render_fps"]
    return attributes

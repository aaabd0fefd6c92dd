"""diffusion-policy dataset replay: recorded episodes in their environment."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from diffusion_policy.basics import lines
from diffusion_policy.commands.environment import choose_env_spec
from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.options.acting import require_video
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError, SuccessAndModes, require_at_least

if TYPE_CHECKING:
    import gymnasium
    import numpy as np

    from diffusion_policy.datasets.store import Demonstration, EpisodeStore
    from diffusion_policy.envs.adapters import EnvSpec


class Replayed(NamedTuple):
    """How far an episode went as it was recorded."""

    steps: int
    """Actions that were taken before it ended."""
    differences: dict[str, np.ndarray]
    """Largest difference of each observation key from its recorded row, step by step, (steps,); where the observation
    after the last action is recorded, one more."""
    actions: np.ndarray
    """Those that were taken, with the noise of the collection, (steps, A)."""


@dataclass(frozen=True)
class Replay:
    """Take the recorded actions again, from the recorded seeds, and compare what is observed with what was recorded;
    film it if asked. Exit status 1 when the two differ.

    Where the demonstrations were collected under noise on the executed action, the same noise is drawn again.
    """

    store: tyro.conf.Positional[str]
    """Path or URL of the dataset."""
    episodes: int | None = None
    """Replay only so many episodes, the first ones; a video shows 4 unless this says otherwise."""
    video: Path | None = None
    """Film the episodes side by side into this .mp4 or .gif."""
    tolerance: float = 1e-4
    """Largest difference of an observation from its record, in its own units."""
    env: str | None = None
    """Gymnasium id, if not the environment that the store names."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON, if not those that the store names."""
    signals: Annotated[SuccessAndModes, tyro.conf.arg(name="")] = field(default_factory=SuccessAndModes)

    def __post_init__(self) -> None:
        if self.episodes is not None:
            require_at_least(self, 1, ("episodes",))
        require_at_least(self, 0, ("tolerance",))
        require_video(self.video, self.episodes or 4)

    def run(self) -> dict[str, float]:
        """Replay; returns the largest difference by key. Raises Failed when one is beyond the tolerance, and ValueError
        for a store that does not say how its episodes began."""
        import numpy as np

        from diffusion_policy.envs.contract import control_rate

        store = open_store(self.store)
        if len(store.seeds()) < len(store.episode_ends):
            raise ConfigError(f"{self.store} does not say the seeds of its episodes, so they cannot be begun again")
        noise = store.attributes.get("noise", None if "collection" in store.attributes else 0.0)
        if noise is None:
            raise ConfigError(f"{self.store} does not say one noise of all its episodes, so they cannot be taken again")
        task = self._choose_env_spec(store)
        env = task()
        keys = self._compared(store, env, task.env)
        count = min(len(store.episode_ends), self.episodes or (4 if self.video else len(store.episode_ends)))
        largest: dict[str, float] = {}
        scripts, wrong = [], []
        with console.status("replaying"):
            for i, episode in enumerate(store.episodes(range(count), (*keys, store.action_key))):
                replayed = replay(env, episode, store.action_key, noise)
                for key, differences in replayed.differences.items():
                    largest[key] = max(largest.get(key, 0.0), float(differences.max()))
                    beyond = np.flatnonzero(~(differences <= self.tolerance))
                    if len(beyond):
                        off = f"{key} is off by {differences[beyond[0]]:.2g}, more than {self.tolerance:g}"
                        wrong.append(f"episode {i}, step {beyond[0]}: {off}")
                steps = len(episode.data[store.action_key])
                if replayed.steps < steps:
                    wrong.append(f"episode {i} ends after {replayed.steps} of its {steps} steps")
                scripts.append((episode.seed, replayed.actions))
        with contextlib.suppress(Exception):  # what was compared stays
            env.close()
        for key, difference in largest.items():
            out.print(f"{key}: off by {difference:.2g} at most, in {count} episodes")
        if self.video:
            self._film(self.video, task, scripts, control_rate(env) or 30)
        if wrong:
            why = self._explain(task, scripts[0][0])
            raise Failed(f"{wrong[0]} ({len(wrong)} such things in {count} episodes){why}")
        return largest

    def _choose_env_spec(self, store: EpisodeStore) -> EnvSpec:
        """The environment; raises ConfigError where there is none."""
        from diffusion_policy.envs import ENV_IDS

        recorded: dict[str, Any] = store.attributes.get("environment", {})
        task, _ = choose_env_spec(self.store, recorded, self.env, self.env_kwargs, self.signals)
        ours = task.env in ENV_IDS and not task.wrappers
        return task if ours else replace(task, success=task.success or "none")  # whether it succeeds is not compared

    def _compared(self, store: EpisodeStore, env: gymnasium.Env, env_id: str) -> tuple[str, ...]:
        """The keys that are compared; raises ConfigError when the environment does not fit the store."""
        space: Any = env.observation_space
        offered = {key: part.shape for key, part in space.items() if key in store.keys}
        wrong = [key for key, shape in offered.items() if shape != store.shape(key)]
        if not offered or wrong or math.prod(env.action_space.shape or ()) != math.prod(store.shape(store.action_key)):
            stored = {key: store.shape(key) for key in store.keys}
            has = f"its observations have {offered}, its actions {env.action_space}"
            raise ConfigError(f"{env_id} does not fit {self.store}: {has}; the store has {stored}")
        return tuple(offered)

    def _film(self, path: Path, task: EnvSpec, scripts: Sequence[tuple[int | None, np.ndarray]], rate: float) -> None:
        """Film the episodes again, at so many frames a second; raises Failed where the environment gives no
        pictures."""
        from diffusion_policy.report.video import Camera, Script, tile, write_video

        try:
            camera = Camera(task)
            films = [camera(Script(seed or 0, actions)) for seed, actions in scripts]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, tile(films, columns=2), rate)
        except Exception as error:  # somebody else's simulator draws
            raise Failed(f"no video: {lines.describe(error)}") from error
        console.print(f"video in {path}")

    def _explain(self, task: EnvSpec, seed: int | None) -> str:
        """Whether the environment is one in which nothing can be repeated."""
        from diffusion_policy.envs.protocols import repeats_by_seed

        if repeats_by_seed(task, seed or 0):
            return ""
        return f"; {task.env} does not repeat an episode by its seed, so it cannot be replayed; perhaps with --fresh"


def replay(env: gymnasium.Env, episode: Demonstration, action_key: str, noise: float) -> Replayed:
    """Begin an episode again from its seed and take its actions; `noise`: see `Demonstrator`."""
    import numpy as np

    from diffusion_policy.datasets.collect import disturb, disturbance_generator

    path = {key: list(rows) for key, rows in episode.data.items() if key != action_key}
    for key, row in (episode.final or {}).items():
        path[key].append(row)
    differences: dict[str, list[float]] = {key: [] for key in sorted(path)}

    def compare(observation: Any, step: int) -> None:
        for key, recorded in path.items():
            if step < len(recorded):
                difference = np.abs(np.asarray(observation[key], np.float64) - recorded[step])
                differences[key].append(float(difference.max()))

    observation, _ = env.reset(seed=episode.seed)
    compare(observation, 0)
    rng = disturbance_generator(episode.seed or 0)
    taken = []
    for action in episode.data[action_key]:
        taken.append(disturb(action, noise, rng) if noise else action)
        observation, _, terminated, truncated, _ = env.step(taken[-1])
        compare(observation, len(taken))
        if terminated or truncated:
            break
    return Replayed(len(taken), {key: np.array(values) for key, values in differences.items()}, np.stack(taken))

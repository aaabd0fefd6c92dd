"""diffusion-policy dataset replay: recorded episodes in their environment."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from diffusion_policy.commands.common import MOST_FILMED, Failed, choose_task, console, open_store
from diffusion_policy.commands.terminal import out
from diffusion_policy.config import ConfigError, Signals, require_at_least

if TYPE_CHECKING:
    import gymnasium
    import numpy as np

    from diffusion_policy.datasets.store import Demonstration, EpisodeStore


class Replayed(NamedTuple):
    """How far an episode went as it was recorded."""

    steps: int
    """Actions that were taken before it ended."""
    differences: dict[str, np.ndarray]
    """Largest difference of each observation key from its recorded row, step by step, (steps,); where the observation
    after the last action is recorded, one more."""
    frames: list[np.ndarray]
    """(height, width, 3) uint8; empty when nothing is filmed."""


@dataclass(frozen=True)
class Replay:
    """Take the recorded actions again, from the recorded seeds, and compare what is observed with what was recorded;
    film it if asked. Exit status 1 when the two differ.

    Where the demonstrations were collected under noise on the executed action, the same noise is drawn again.
    """

    store: tyro.conf.Positional[str]
    """Path or URL of the data set."""
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
    signals: Annotated[Signals, tyro.conf.arg(name="")] = field(default_factory=Signals)

    def __post_init__(self) -> None:
        if self.episodes is not None:
            require_at_least(self, 1, ("episodes",))
        require_at_least(self, 0, ("tolerance",))
        if self.video and (self.episodes or 4) > MOST_FILMED:
            raise ConfigError(f"a --video shows at most {MOST_FILMED} episodes; got {self.episodes}")
        if self.video and self.video.suffix not in (".mp4", ".gif"):
            raise ConfigError(f"--video must end in .mp4 or .gif; got {self.video}")
        if self.video and self.video.exists():
            raise ConfigError(f"{self.video} already exists; choose another --video or delete it first")

    def run(self) -> dict[str, float]:
        """Replay; returns the largest difference by key. Raises Failed when one is beyond the tolerance, and ValueError
        for a store that does not say how its episodes began."""
        import numpy as np

        from diffusion_policy.video import tile, write_video

        store = open_store(self.store)
        if len(store.seeds()) < len(store.episode_ends):
            raise ConfigError(f"{self.store} does not say the seeds of its episodes, so they cannot be begun again")
        noise = store.attributes.get("noise", None if "collection" in store.attributes else 0.0)
        if noise is None:
            raise ConfigError(f"{self.store} does not say one noise of all its episodes, so they cannot be taken again")
        env = self._make_env(store)
        count = min(len(store.episode_ends), self.episodes or (4 if self.video else len(store.episode_ends)))
        largest: dict[str, float] = {}
        films, wrong = [], []
        with console.status("replaying"):
            for i, episode in enumerate(store.episodes(range(count))):
                replayed = replay(env, episode, store.action_key, noise, film=self.video is not None)
                for key, differences in replayed.differences.items():
                    largest[key] = max(largest.get(key, 0.0), float(differences.max()))
                    beyond = np.flatnonzero(~(differences <= self.tolerance))
                    if len(beyond):
                        off = f"{key} is off by {differences[beyond[0]]:.2g}, more than {self.tolerance:g}"
                        wrong.append(f"episode {i}, step {beyond[0]}: {off}")
                steps = len(episode.data[store.action_key])
                if replayed.steps < steps:
                    wrong.append(f"episode {i} ends after {replayed.steps} of its {steps} steps")
                films.append(np.stack(replayed.frames) if replayed.frames else None)
        env.close()
        for key, difference in largest.items():
            out.print(f"{key}: off by {difference:.2g} at most, in {count} episodes")
        if self.video:
            self.video.parent.mkdir(parents=True, exist_ok=True)
            write_video(self.video, tile(films, columns=2), env.metadata.get("render_fps") or 30)
            console.print(f"video in {self.video}")
        if wrong:
            raise Failed(f"{wrong[0]} ({len(wrong)} such things in {count} episodes)")
        return largest

    def _make_env(self, store: EpisodeStore) -> gymnasium.Env:
        """The environment; raises ConfigError when it does not fit the store."""
        from diffusion_policy.envs import ENV_IDS

        recorded: dict[str, Any] = store.attributes.get("environment", {})
        task, _ = choose_task(self.store, recorded, self.env, self.env_kwargs, self.signals)
        if task.env not in ENV_IDS:
            task = replace(task, success=task.success or "none")  # whether it succeeds is not compared
        env = task("rgb_array" if self.video else None)
        offered = {key: space.shape for key, space in observation_spaces(env).items() if key in store.keys}
        wrong = [key for key, shape in offered.items() if shape != store.shape(key)]
        if not offered or wrong or env.action_space.shape != store.shape(store.action_key):
            stored = {key: store.shape(key) for key in store.keys}
            has = f"its observations have {offered}, its actions {env.action_space}"
            raise ConfigError(f"{task.env} does not fit {self.store}: {has}; the store has {stored}")
        return env


def observation_spaces(env: gymnasium.Env) -> dict[str, gymnasium.Space]:
    """The parts of an observation by the keys under which they are recorded."""
    space = env.observation_space
    return dict(getattr(space, "spaces", {"observation": space}))


def replay(env: gymnasium.Env, episode: Demonstration, action_key: str, noise: float, film: bool = False) -> Replayed:
    """Begin an episode again from its seed and take its actions; `noise`: see `Demonstrator`."""
    import numpy as np

    from diffusion_policy.datasets.collect import disturb, disturbance_generator

    path = {key: list(rows) for key, rows in episode.data.items() if key in observation_spaces(env)}
    for key, row in (episode.final or {}).items():
        path[key].append(row)
    differences: dict[str, list[float]] = {key: [] for key in sorted(path)}

    def compare(observation: Any, step: int) -> None:
        rows = observation if isinstance(observation, dict) else {"observation": observation}
        for key, recorded in path.items():
            if step < len(recorded):
                difference = np.abs(np.asarray(rows[key], np.float64) - recorded[step])
                differences[key].append(float(difference.max()))

    observation, _ = env.reset(seed=episode.seed)
    compare(observation, 0)
    rng = disturbance_generator(episode.seed or 0)
    frames: list[Any] = [env.render()] if film else []
    steps = 0
    for action in episode.data[action_key]:
        observation, _, terminated, truncated, _ = env.step(disturb(action, noise, rng) if noise else action)
        steps += 1
        compare(observation, steps)
        frames += [env.render()] if film else []
        if terminated or truncated:
            break
    return Replayed(steps, {key: np.array(values) for key, values in differences.items()}, frames)

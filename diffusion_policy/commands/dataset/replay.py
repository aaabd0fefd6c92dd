"""diffusion-policy dataset replay: recorded episodes in their environment."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.basics.text import error_line
from diffusion_policy.commands.environment import choose_env_spec
from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.options.dataset import Replay
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError, SuccessAndModes
from diffusion_policy.datasets.collect import disturb, disturbance_generator, still_action
from diffusion_policy.datasets.demonstration import PUSHED, Demonstration
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs import ENV_IDS
from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.contract import control_rate
from diffusion_policy.envs.protocols import repeats_by_seed
from diffusion_policy.report.video import FrameRecorder, Script, tile, write_video


class Replayed(NamedTuple):
    """How far an episode went as it was recorded."""

    steps: int
    """Actions that were taken before it ended."""
    differences: dict[str, np.ndarray]
    """Largest difference of each observation key from its recorded row, step by step, (steps,); where the observation
    after the last action is recorded, one more."""
    actions: np.ndarray
    """Those that were taken, with the noise of the collection, (steps, A)."""


class Comparison(NamedTuple):
    """What came of all episodes."""

    largest: dict[str, float]
    """Largest difference by key."""
    wrong: list[str]
    """What differs by more than is tolerated, a sentence each."""
    scripts: list[Script]
    """Seeds and actions that were taken."""


def run(options: Replay) -> dict[str, float]:
    """Replay; returns the largest difference by key. Raises Failed when one is beyond the tolerance, and ValueError for
    a store that does not say how its episodes began."""
    store = open_store(options.store)
    noise = require_noise(store, options.store)
    chosen = options.env, options.env_kwargs, options.signals, options.image_size
    spec = choose_replay_spec(options.store, store, *chosen)
    env = spec()
    keys = choose_compared(options.store, store, env, spec.env)
    marks = (PUSHED,) if PUSHED in store.keys and PUSHED not in keys else ()
    count = min(len(store.episode_ends), options.episodes or (4 if options.video else len(store.episode_ends)))
    with console.status("replaying"):
        episodes = store.episodes(range(count), (*keys, *marks, store.action_key))
        largest, wrong, scripts = compare(env, map(before_push, episodes), store.action_key, noise, options.tolerance)
    with contextlib.suppress(Exception):  # what was compared stays
        env.close()
    for key, difference in largest.items():
        out.print(f"{key}: off by {difference:.2g} at most, in {count} episodes")
    if marks and store.read(PUSHED)[: store.episode_ends[count - 1]].any():
        out.print("a person pushed a body in some episodes, which no action repeats: they are replayed up to there")
    if options.video:
        film(options.video, spec, scripts, control_rate(env) or 30)
    if wrong:
        why = explain(spec, scripts[0].seed)
        raise Failed(f"{wrong[0]} ({len(wrong)} such things in {count} episodes){why}")
    return largest


def require_noise(store: EpisodeStore, source: str) -> float:
    """The noise under which all episodes were collected; raises ConfigError where that, or a seed, is not said."""
    if len(store.seeds()) < len(store.episode_ends):
        raise ConfigError(f"{source} does not say the seeds of its episodes, so they cannot be begun again")
    noise = store.attributes.get("noise", None if "collection" in store.attributes else 0.0)
    if noise is None:
        raise ConfigError(f"{source} does not say one noise of all its episodes, so they cannot be taken again")
    return noise


def choose_replay_spec(
    source: str,
    store: EpisodeStore,
    env: str | None,
    env_kwargs: str | None,
    signals: SuccessAndModes,
    image_size: int | None = None,
) -> EnvSpec:
    """The environment; raises ConfigError where there is none."""
    recorded: dict[str, Any] = store.attributes.get("environment", {})
    spec, _ = choose_env_spec(source, recorded, env, env_kwargs, signals, image_size)
    ours = spec.env in ENV_IDS and not spec.wrappers
    return spec if ours else replace(spec, success=spec.success or "none")  # whether it succeeds is not compared


def choose_compared(source: str, store: EpisodeStore, env: gymnasium.Env, env_id: str) -> tuple[str, ...]:
    """The keys that are compared; raises ConfigError when the environment does not fit the store."""
    space: Any = env.observation_space
    offered = {key: part.shape for key, part in space.items() if key in store.keys}
    wrong = [key for key, shape in offered.items() if shape != store.shape(key)]
    if not offered or wrong or math.prod(env.action_space.shape or ()) != math.prod(store.shape(store.action_key)):
        stored = {key: store.shape(key) for key in store.keys}
        has = f"its observations have {offered}, its actions {env.action_space}"
        raise ConfigError(f"{env_id} does not fit {source}: {has}; the store has {stored}")
    return tuple(offered)


def before_push(episode: Demonstration) -> Demonstration:
    """The steps of an episode until a person first pushed a body."""
    if PUSHED not in episode.data:
        return episode
    pushed = np.flatnonzero(episode.data[PUSHED])
    data, final = ({k: rows for k, rows in some.items() if k != PUSHED} for some in (episode.data, episode.final or {}))
    if len(pushed):
        end = int(pushed[0])
        final = {key: data[key][end] for key in final}
        data = {key: rows[:end] for key, rows in data.items()}
    return episode._replace(data=data, final=final)


def compare(
    env: gymnasium.Env, episodes: Iterable[Demonstration], action_key: str, noise: float, tolerance: float
) -> Comparison:
    """Replay each episode, and compare what is observed with what was recorded."""
    found = Comparison({}, [], [])
    for i, episode in enumerate(episodes):
        replayed = replay(env, episode, action_key, noise)
        for key, differences in replayed.differences.items():
            found.largest[key] = max(found.largest.get(key, 0.0), float(differences.max()))
        found.wrong.extend(what_differs(i, replayed, len(episode.data[action_key]), tolerance))
        found.scripts.append(Script(episode.seed or 0, replayed.actions))
    return found


def what_differs(episode: int, replayed: Replayed, steps: int, tolerance: float) -> Iterator[str]:
    """How an episode of so many steps went otherwise than recorded, a sentence each."""
    for key, differences in replayed.differences.items():
        beyond = np.flatnonzero(~(differences <= tolerance))
        if len(beyond):
            off = f"{key} is off by {differences[beyond[0]]:.2g}, more than {tolerance:g}"
            yield f"episode {episode}, step {beyond[0]}: {off}"
    if replayed.steps < steps:
        yield f"episode {episode} ends after {replayed.steps} of its {steps} steps"


def film(path: Path, spec: EnvSpec, scripts: Sequence[Script], rate: float) -> None:
    """Film the episodes again, at so many frames a second; raises Failed where the environment gives no pictures."""
    try:
        record = FrameRecorder(spec)
        films = [record(script) for script in scripts]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, tile(films, columns=2), rate)
    except Exception as error:  # somebody else's simulator draws
        raise Failed(f"no video: {error_line(error)}") from error
    console.print(f"video in {path}")


def explain(spec: EnvSpec, seed: int) -> str:
    """Whether the environment is one in which nothing can be repeated."""
    if repeats_by_seed(spec, seed):
        return ""
    return f"; {spec.env} does not repeat an episode by its seed, so it cannot be replayed; perhaps with --fresh"


def replay(
    env: gymnasium.Env,
    episode: Demonstration,
    action_key: str,
    noise: float,
    on_observation: Callable[[Mapping[str, np.ndarray]], None] = lambda _: None,
) -> Replayed:
    """Begin an episode again from its seed and take its actions; `noise`: see `Demonstrator`; `on_observation` hears
    what is observed at each step."""
    path = {key: list(rows) for key, rows in episode.data.items() if key != action_key}
    for key, row in (episode.final or {}).items():
        path[key].append(row)
    differences: dict[str, list[float]] = {key: [] for key in sorted(path)}

    def compare(observation: Any, step: int) -> None:
        on_observation(observation)
        for key, recorded in path.items():
            if step < len(recorded):
                difference = np.abs(np.asarray(observation[key], np.float64) - recorded[step])
                differences[key].append(float(difference.max()))

    observation, _ = env.reset(seed=episode.seed)
    compare(observation, 0)
    rng = disturbance_generator(episode.seed or 0)
    taken = []
    for action in episode.data[action_key]:
        taken.append(disturb(action, noise, rng, still_action(env, observation)) if noise else action)
        observation, _, terminated, truncated, _ = env.step(taken[-1])
        compare(observation, len(taken))
        if terminated or truncated:
            break
    return Replayed(len(taken), {key: np.array(values) for key, values in differences.items()}, np.array(taken))

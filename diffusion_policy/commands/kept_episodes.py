"""The episodes that an evaluation keeps beside its results, as a dataset: what was observed, done and planned.

`episodes.zarr` is a store like any other (`datasets.store`): data/<observation> and data/action, seed, mode and success
of each episode, the observation after its last action. What only a page needs lies in arrays of its own: PLANNED, PLAN,
and where the environment has a plane, PATH and PLAN_PATH with the scene among the attributes. Repeat and measures are
those of results.json, in whose order the episodes are; a SHA-256 of the results ties the two together.
Knows stores and results. Knows no policy, no simulator and no page.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.colors
import numpy as np

from diffusion_policy.basics.files import WRITING, plain, remove, sync_folder
from diffusion_policy.basics.names import is_label
from diffusion_policy.commands.afterwards import EPISODES
from diffusion_policy.config import ConfigError, decode
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.durable import sync_tree
from diffusion_policy.datasets.storage import KEY
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.protocols import Drawable
from diffusion_policy.envs.scene import Scene
from diffusion_policy.evaluation.episode import Episode, Plan, Trace
from diffusion_policy.evaluation.metrics import NONE
from diffusion_policy.evaluation.results import fingerprint

MOST_BYTES = 2**29
"""Of all arrays, as numbers in memory. Of longer evaluations the first episodes are kept that take no more."""
AT_ONCE = 100
"""Episodes that are written together."""
OWN = "evaluation."
PLANNED, PLAN, PATH, PLAN_PATH = (f"{OWN}{name}" for name in ("planned", "plan", "path", "plan_path"))
"""A row a step: whether it was planned there (1,); the plan, raw actions from that step on (H, A), zeros where there is
none; where the episode was in the plane (2,); where the plan would lead (H + 1, 2)."""
FARTHEST = 1e4
"""No path leads farther from its scene than so many times the scene's width."""


class KeptEpisodes(NamedTuple):
    """What was kept of an evaluation."""

    episodes: list[Episode]
    """The first of the results, in their order; all of them unless they were too large."""
    scene: Scene | None
    """The plane of the traces; None where the environment has none."""
    traces: list[Trace]
    """Of each episode; none without a scene."""


# Writing


def trace(episode: Episode, plane: Drawable) -> Trace:
    """An episode and its plans in the plane; raises ValueError where the environment gives no paths."""
    path = as_path(plane.path(episode.observations))
    if len(path) != len(episode.actions) + 1:
        raise ValueError(f"path() must give {len(episode.actions) + 1} points; got {len(path)}")
    plans = {}
    for plan in episode.plans:
        seen = {key: values[plan.step] for key, values in episode.observations.items()}
        plans[plan.step] = as_path(plane.planned_path(seen, plan.actions))
    return Trace(path, plans)


def as_path(xy: Any) -> np.ndarray:
    """What an environment gives as a path, (steps, 2) finite numbers; raises ValueError for anything else."""
    path = np.asarray(xy, dtype=float)
    if path.ndim != 2 or path.shape[1] != 2 or not len(path) or not np.isfinite(path).all():
        raise ValueError(f"path() must give (steps, 2) finite numbers; got an array {path.shape}")
    return path


def choose_kept(episodes: Sequence[Episode]) -> Sequence[Episode]:
    """The first episodes, as many as MOST_BYTES hold."""
    sizes = [_size(episode) for episode in episodes]
    return episodes[: int(np.searchsorted(np.cumsum(sizes), MOST_BYTES, side="right"))]


def _size(episode: Episode) -> int:
    """Of all arrays of an episode [bytes]."""
    plan = max((2 * plan.actions.nbytes for plan in episode.plans), default=0)
    observed = sum(rows.nbytes for rows in episode.observations.values())
    return observed + episode.actions.nbytes + len(episode.actions) * (plan + 64)


def keep_episodes(
    folder: Path, results: Mapping[str, Any], episodes: Sequence[Episode], scene: Scene | None, traces: Sequence[Trace]
) -> None:
    """Write the first episodes of results (`choose_kept`) into the folder of their evaluation, whole or not at all.
    Raises ValueError for what no store can hold, and OSError."""
    if not episodes:
        raise ValueError(f"one alone takes more than {MOST_BYTES // 2**20} MB")
    results = plain(results)
    keys = [key for key in episodes[0].observations if all(_can_be_stored(key, one) for one in episodes)]
    modes = [*results["modes"], *(episode.mode for episode in episodes if episode.mode is not None)]
    unfinished = folder / f"{WRITING}{EPISODES}"
    remove(unfinished)
    try:
        unfinished.mkdir()
        attributes = _to_attributes(results, keys, scene)
        labels = [label for label in dict.fromkeys(modes) if label != NONE]
        with EpisodeStore.create(unfinished / EPISODES, attributes, labels, sync=False) as store:
            for i in range(0, len(episodes), AT_ONCE):
                some = itertools.zip_longest(episodes[i : i + AT_ONCE], traces[i : i + AT_ONCE])
                store.append([_to_record(episode, keys, traced) for episode, traced in some])
        sync_tree(unfinished / EPISODES)
        (unfinished / EPISODES).rename(folder / EPISODES)
        sync_folder(folder)
    finally:
        remove(unfinished)


def _to_attributes(results: Mapping[str, Any], keys: Sequence[str], scene: Scene | None) -> dict[str, Any]:
    """What the store says of itself."""
    signals = {name: value for name, value in results["signals"].items() if value}
    environment = {"id": results["environment"], "arguments": results["env_kwargs"], "signals": signals}
    return {
        "environment": environment | {"wrappers": results["wrappers"]},
        "control_frequency": 1 / results["control_period"],
        "observation_keys": sorted(keys),
        "action_key": "action",
        "evaluation": {
            "sha256": fingerprint(results),
            "scene": None if scene is None else plain(scene._asdict()),
        },
    }


def _to_record(episode: Episode, keys: Sequence[str], traced: Trace | None) -> Demonstration:
    """An episode as a store holds it."""
    steps = len(episode.actions)
    rows = {key: episode.observations[key] for key in keys}
    rows |= {} if traced is None else {PATH: traced.path}
    data = {key: values[:steps] for key, values in rows.items()}
    data |= {"action": episode.actions, PLANNED: np.zeros((steps, 1), bool)}
    for plan in episode.plans:
        data[PLANNED][plan.step] = True
        parts = {PLAN: plan.actions} | ({} if traced is None else {PLAN_PATH: traced.plans[plan.step]})
        for name, part in parts.items():
            data.setdefault(name, np.zeros((steps, *part.shape), part.dtype))[plan.step] = part
    final = {key: values[steps] for key, values in rows.items()}
    return Demonstration(data, episode.seed, episode.mode, episode.success, final)


def _can_be_stored(key: str, episode: Episode) -> bool:
    """Whether a store holds this observation; it is left out otherwise."""
    rows = episode.observations[key]
    name = KEY.fullmatch(key) and key != "action" and not key.startswith(OWN)
    return bool(name) and rows.size > 0 and (rows.dtype.kind != "f" or bool(np.isfinite(rows).all()))


# Reading, what anybody may have made


def has_kept(folder: Path) -> bool:
    """Whether an evaluation has kept its episodes."""
    return (folder / EPISODES).is_dir()


def read_kept(folder: Path, results: Mapping[str, Any]) -> KeptEpisodes:
    """The episodes that an evaluation has kept; `results` is what its results.json holds. Raises ValueError where there
    are none, where they are damaged, too large or of another evaluation."""
    store, scene = _open(folder, results)
    kept = KeptEpisodes([], scene, [])
    for outcome, record in _records(store, results, None):
        episode = _to_episode(store, outcome, record)
        kept.episodes.append(episode)
        if scene is not None:
            leads = record.data.get(PLAN_PATH)
            plans = (
                {} if leads is None else {plan.step: _near(store, leads[plan.step], scene) for plan in episode.plans}
            )
            kept.traces.append(Trace(_whole_path(store, record, scene), plans))
    return kept


def read_paths(folder: Path, results: Mapping[str, Any]) -> tuple[Scene | None, dict[tuple[int, int], np.ndarray]]:
    """The scene and the paths (steps + 1, 2) by seed and repeat; no paths without a scene. Raises ValueError as
    `read_kept`."""
    store, scene = _open(folder, results)
    if scene is None:
        return None, {}
    records = _records(store, results, (PATH,))
    return scene, {(of["seed"], of["repeat"]): _whole_path(store, record, scene) for of, record in records}


def _to_episode(store: EpisodeStore, outcome: Mapping[str, Any], record: Demonstration) -> Episode:
    """An episode as it was rolled out."""
    data, final = record.data, record.final or {}
    keys = [key for key in store.observation_keys if not key.startswith(OWN)]
    for key in ("action", PLANNED, *keys):
        if key not in data or (key in keys and key not in final):
            raise ConfigError(f"{store.location} lacks {key}, or its last row")
    if PLAN not in data or data[PLAN].shape[2:] != data["action"].shape[1:]:
        raise ConfigError(f"{store.location} has no plans of its actions")
    made = np.flatnonzero(data[PLANNED].reshape(len(data[PLANNED]), -1).any(axis=1)).tolist()
    return Episode(
        **{name: outcome[name] for name in ("seed", "repeat", "success", "mode")},
        observations={key: np.concatenate([data[key], final[key].reshape(1, *data[key].shape[1:])]) for key in keys},
        actions=data["action"],
        measures={name: value for name, value in outcome["measures"].items() if value is not None},
        plans=tuple(Plan(step, data[PLAN][step]) for step in made),
    )


def _open(folder: Path, results: Mapping[str, Any]) -> tuple[EpisodeStore, Scene | None]:
    """The store of an evaluation's episodes, and its scene."""
    if not has_kept(folder):
        raise ConfigError(f"{folder} has no {EPISODES}")
    store = EpisodeStore.open(folder / EPISODES)
    own = store.attributes.get("evaluation")
    if not isinstance(own, dict) or own.get("sha256") != fingerprint(results):
        raise ConfigError(f"{store.location} holds the episodes of another evaluation")
    if len(store.episode_ends) > len(results["outcomes"]):
        raise ConfigError(f"{store.location} holds more episodes than there are results")
    row = sum(math.prod(store.shape(key)) * store.dtype(key).itemsize for key in store.keys)
    size = row * int(store.episode_ends[-1])
    if size > MOST_BYTES:
        raise ConfigError(f"{store.location} holds {size / 2**20:.0f} MB; at most {MOST_BYTES // 2**20} MB are read")
    scene = None if own.get("scene") is None else _to_scene(store.location, own["scene"])
    if scene is not None and (PATH not in store.keys or store.shape(PATH) != (2,)):
        raise ConfigError(f"{store.location} has a scene, but no paths of two columns in it")
    return store, scene


def _records(
    store: EpisodeStore, results: Mapping[str, Any], keys: Sequence[str] | None
) -> Iterator[tuple[Mapping[str, Any], Demonstration]]:
    """Each episode with its outcome; raises ConfigError where the two do not fit."""
    for outcome, record in zip(results["outcomes"], store.episodes(keys=keys), strict=False):
        there = record.seed, record.mode, record.success, len(next(iter(record.data.values())))
        said = tuple(outcome[name] for name in ("seed", "mode", "success", "steps"))
        if there != said:
            raise ConfigError(f"{store.location} has an episode {there!r:.200}; the results say {said!r:.200}")
        yield outcome, record


def _to_scene(location: str, tree: Any) -> Scene:
    """The plane that a file describes; raises ConfigError for one that cannot be drawn."""
    scene = decode(tree, Scene, f"{location}: the scene")
    (left, right), (bottom, top) = scene.x_range, scene.y_range
    width, height = abs(right - left), abs(top - bottom)
    if not (right > left and height > 0 and 0.01 <= height / width <= 100):
        raise ConfigError(f"{location}: the scene must be a plane; got {scene.x_range} by {scene.y_range}")
    if not all(matplotlib.colors.is_color_like(color) for _, color in scene.places):
        raise ConfigError(f"{location}: the scene has a place whose colour is none")
    if any(len(corners) < 3 for corners, _ in scene.places):
        raise ConfigError(f"{location}: the scene has a place of fewer than three corners")
    if not is_label(scene.unit) or len(scene.unit) > 10 or "$" in scene.unit:
        raise ConfigError(f"{location}: the scene's unit must be a short word; got {scene.unit!r:.60}")
    points = [(x, y) for x, y, _ in scene.circles] + [point for corners, _ in scene.places for point in corners]
    points += [(left, scene.finish_y)] if scene.finish_y is not None else []
    _require_near(location, np.array(points, float).reshape(-1, 2), scene)
    return scene


def _whole_path(store: EpisodeStore, record: Demonstration, scene: Scene) -> np.ndarray:
    """A path with its last point."""
    last = (record.final or {}).get(PATH)
    rows = record.data[PATH] if last is None else np.concatenate([record.data[PATH], last.reshape(1, -1)])
    return _near(store, rows, scene)


def _near(store: EpisodeStore, path: np.ndarray, scene: Scene) -> np.ndarray:
    """A path (steps, 2) that can be drawn."""
    if path.ndim != 2 or path.shape[1] != 2:
        raise ConfigError(f"{store.location}: a path must have two columns; got an array {path.shape}")
    path = path.astype(float)
    _require_near(store.location, path, scene)
    return path


def _require_near(location: str, points: np.ndarray, scene: Scene) -> None:
    """Raise ConfigError for points (N, 2) that no picture of the scene could hold."""
    width = scene.x_range[1] - scene.x_range[0]
    corner = np.array([scene.x_range[0], scene.y_range[0]])
    if not (np.abs(points - corner) <= FARTHEST * width).all():
        raise ConfigError(f"{location}: something lies far outside of its scene")

"""diffusion-policy dataset plot: pictures of a dataset."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from diffusion_policy import envs
from diffusion_policy.basics.images import is_image
from diffusion_policy.commands.options.dataset import Plot
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.stores import choose_keys, open_store
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.statistics import Measuring
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.protocols import Drawable, as_drawable
from diffusion_policy.envs.scene import Scene
from diffusion_policy.report.evaluation_figures import PlanePath, choose_drawn
from diffusion_policy.report.figures import Film, draw_columns, draw_frames, draw_lengths, draw_trajectories

FILMS = 6
"""Episodes of which frames are shown ..."""
FRAMES = 8
"""... and so many frames of each, from the first to the last."""


class InPlane(NamedTuple):
    """Episodes as paths in a plane."""

    paths: list[PlanePath]
    scene: Scene | None
    """What stands in the plane."""
    axes: tuple[str, str]
    """What its axes are."""


def run(options: Plot) -> None:
    """Draw; raises ConfigError for columns that are not there and a folder that holds something."""
    require_fresh(options.output)
    store = open_store(options.store)
    keys = choose_keys(store, action=options.action)
    plane = choose_plane(store, options.plane)
    actions = Measuring()
    for _, rows in store.blocks(keys.action):
        actions.add(rows)
    options.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "trajectories": draw_trajectories(*plane) if plane else None,
        "actions": draw_columns(actions.sample, keys.action),
        "lengths": draw_lengths(store.episode_ends, store.attributes.get("control_frequency")),
    } | {f"frames_{key}": draw_frames(list(films(store, key)), key) for key in store.keys if is_image(store.shape(key))}
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(options.output / f"{name}.png", dpi=150)
            console.print(f"{options.output}/{name}.png")


def films(store: EpisodeStore, key: str) -> Iterator[Film]:
    """Frames of some episodes: of each mode in turn, where there are modes. Only what is shown is read."""
    ends, modes, success = store.episode_ends, store.episode_modes(), store.read_meta("success")
    starts = np.concatenate([[0], ends[:-1]])
    for i in choose_films(modes):
        rows = np.unique(np.linspace(starts[i], ends[i] - 1, FRAMES).round().astype(int))
        frames = np.concatenate([store.read_rows(key, row, row + 1) for row in rows.tolist()])
        succeeded = None if success is None or success[i] < 0 else bool(success[i])
        yield Film(i, modes[i], succeeded, (rows - starts[i]).tolist(), frames)


def choose_films(modes: list[str | None]) -> list[int]:
    """Indices of at most FILMS episodes: modes take turns, and those of one mode are spread over the store."""
    of_mode = {mode: [i for i, other in enumerate(modes) if other == mode] for mode in dict.fromkeys(modes)}
    each = -(-FILMS // len(of_mode))
    chosen = [[places[j * len(places) // each] for j in range(min(each, len(places)))] for places in of_mode.values()]
    turns = [places[j] for j in range(each) for places in chosen if j < len(places)]
    return sorted(turns[:FILMS])


def choose_plane(store: EpisodeStore, wanted: str | None) -> InPlane | None:
    """Episodes in the plane that is wanted, else in that of the environment, else of the first key that can be read;
    None without two columns."""
    drawn = choose_drawn(len(store.episode_ends))
    task = find_drawable(store) if wanted is None else None
    if task is not None:
        episodes = store.episodes(drawn, store.observation_keys)
        paths = [PlanePath(e.mode, e.success is not False, task.path(e.data)) for e in episodes]
        return InPlane(paths, task.scene, (f"x [{task.scene.unit}]", f"y [{task.scene.unit}]"))
    for key, columns in choose_columns(store, wanted):
        try:
            paths = [
                PlanePath(e.mode, e.success is not False, e.data[key].reshape(len(e.data[key]), -1)[:, columns])
                for e in store.episodes(drawn, [key])
            ]
        except StoreError as error:
            if wanted is not None:
                raise
            console.print(str(error))
        else:
            return InPlane(paths, None, (f"{key}[{columns[0]}]", f"{key}[{columns[1]}]"))
    return None


def find_drawable(store: EpisodeStore) -> Drawable | None:
    """The environment that the store names, where it is ours and says how its paths are drawn."""
    recorded = store.attributes.get("environment")
    if recorded is None or recorded["id"] not in envs.ENV_IDS or recorded.get("wrappers"):
        return None
    return as_drawable(envs.make(recorded["id"], **recorded["arguments"]))


def choose_columns(store: EpisodeStore, wanted: str | None) -> list[tuple[str, list[int]]]:
    """Keys and two columns of each, of which the first that can be read is drawn; raises ConfigError for others than
    there are."""
    sizes = {key: math.prod(store.shape(key)) for key in store.keys}
    if wanted is None:
        flat = [key for key in store.observation_keys if key in sizes and not is_image(store.shape(key))]
        return [(key, [0, 1]) for key in flat if sizes[key] >= 2]
    key, _, columns = wanted.rpartition(":")
    chosen = [int(column) for column in columns.split(",") if column.isdigit()]
    if key not in sizes or len(chosen) != 2 or max(chosen) >= sizes[key]:
        known = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        what = f"a key and two of its columns, as state:0,1, of {known}"
        raise ConfigError(f"--plane must be {what}; got {wanted!r}")
    return [(key, chosen)]

"""Minari data sets ↔ source: the folder that holds `data/metadata.json`, as Minari keeps it under its root.

| in the data set                         | in the store                                                   |
|-----------------------------------------|----------------------------------------------------------------|
| observations, a Box                     | the observation key `observation`                              |
| observations, a Dict                    | its keys; a Dict within: `outer.inner`                         |
| the observation after the last action   | final observation                                              |
| actions, a Box                          | the action                                                     |
| rewards, terminations, truncations      | further keys of these names                                    |
| seed of an episode                      | seed, where every episode has one                              |
| spaces, author, description, ...        | `minari`, and `environment` where the data set describes one   |

Written back, the last observation stands once more for a final one that is unknown; rewards (1 at the end of a
success), terminations and truncations are made up where there are none; both are not read back. Further keys of other
names become `infos`, with the last row twice, since Minari has one more info than actions. Spaces are those that the
data set had; else a Box without bounds for each key. What only a store knows lies in the metadata, under
`diffusion_policy`. Images are written as they are, not as JPEG.

Not carried: infos, reset options and other metadata of episodes that another tool wrote; observations of text or of
graphs. Data sets of combined actions (Dict, Tuple, Discrete) are refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.datasets.convert import Source, foreign, from_header, header, library, place
from diffusion_policy.datasets.store import Demonstration, StoreError

HEADER = "diffusion_policy"
OUTCOMES = ("rewards", "terminations", "truncations")
CARRIED = (
    *("algorithm_name", "author", "author_email", "code_permalink", "description", "env_spec", "eval_env_spec"),
    *("num_episodes_average_score", "ref_max_score", "ref_min_score", "requirements"),
)
"""Metadata that goes into the store and back."""
SETS = ("author", "author_email")


def _minari() -> Any:
    library("h5py", "Minari data sets")
    return library("minari", "Minari data sets")


# Reading


def read(path: Path) -> Source:
    """The folder as a source; raises StoreError, or what minari raises."""
    metadata = json.loads((path / "data/metadata.json").read_text())
    for name in ("observation_space", "action_space"):
        if name not in metadata:  # minari would make the environment, and so run what the file names
            raise StoreError(f"data/metadata.json has no {name}")
    data_set = _minari().MinariDataset(path / "data")
    space = data_set.observation_space
    if not isinstance(data_set.action_space, library("gymnasium", "Minari data sets").spaces.Box):
        raise StoreError(f"actions must be a Box; they are {data_set.action_space}")
    head = metadata.get(HEADER)
    left_out = _left_out(space)
    if head is not None:
        return from_header(head, _episodes(path, head), left_out)
    own = {name: metadata[name] for name in CARRIED if metadata.get(name) is not None}
    attributes = {"minari": own | {name: metadata[name] for name in ("observation_space", "action_space")}}
    if "env_spec" in own:
        described = json.loads(own["env_spec"])
        attributes["environment"] = {"id": described["id"], "arguments": described.get("kwargs", {})}
    left_out += ["infos"] if data_set.total_episodes and _has_infos(data_set) else []
    return foreign(attributes, sorted(_leaves(space)), _episodes(path, None), left_out)


def _has_infos(data_set: Any) -> bool:
    return bool(data_set[0].infos)


def _leaves(space: Any, prefix: str = "") -> dict[str, Any]:
    """The spaces of numbers within a space, by key."""
    spaces = library("gymnasium", "Minari data sets").spaces
    if isinstance(space, spaces.Dict):
        leaves: dict[str, Any] = {}
        for name, inner in space.spaces.items():
            for key, leaf in _leaves(inner, f"{prefix}.{name}" if prefix else name).items():
                place(leaves, key, leaf)
        return leaves
    numeric = isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)
    return {prefix or "observation": space} if numeric else {}


def _left_out(space: Any, prefix: str = "") -> list[str]:
    """The keys of what is no space of numbers."""
    if isinstance(space, library("gymnasium", "Minari data sets").spaces.Dict):
        items = [(f"{prefix}.{name}" if prefix else name, inner) for name, inner in space.spaces.items()]
        return [key for name, inner in items for key in _left_out(inner, name)]
    return [] if _leaves(space) else [prefix or "observation"]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested arrays by key, as `_leaves` names them."""
    if not isinstance(value, dict):
        return {prefix or "observation": value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{name}" if prefix else name)
    return flat


def _episodes(path: Path, head: dict[str, Any] | None) -> Iterator[Demonstration]:
    data_set = _minari().MinariDataset(path / "data")
    metadata = list(data_set.storage.get_episode_metadata(data_set.episode_indices))
    with_seeds = all(known.get("seed") is not None for known in metadata)
    keys = sorted(_leaves(data_set.observation_space))
    made_up = {*head["made_up"]} if head else set()
    for episode, known in zip(data_set.iterate_episodes(), metadata, strict=True):
        steps = len(episode.actions)
        observations = _flat(episode.observations)
        data: dict[str, np.ndarray] = {}
        for key in keys:
            if len(observations[key]) not in (steps, steps + 1):
                found = len(observations[key])
                raise StoreError(f"episode {episode.id} has {steps} actions and {found} observations {key!r}")
            place(data, key, np.asarray(observations[key])[:steps])
        place(data, head["action_key"] if head else "action", np.asarray(episode.actions))
        for key in OUTCOMES:
            if key not in made_up:
                place(data, key, np.asarray(getattr(episode, key)))
        for key in head["in_infos"] if head else ():
            place(data, key, np.asarray(episode.infos[key])[:steps])
        with_final = json.loads(known["final"]) if head else [key for key in keys if len(observations[key]) > steps]
        final = {key: np.asarray(observations[key][steps]) for key in with_final}
        yield Demonstration(
            data,
            seed=int(known["seed"]) if with_seeds else None,
            mode=str(known["mode"]) if head and "mode" in known else None,
            success=bool(known["success"]) if head and "success" in known else None,
            final=final or None,
        )


# Writing


def write(source: Source, path: Path) -> None:
    """Write the folder. `minari.load_dataset` finds it by its name where that is an id such as `reach-v0`, and
    MINARI_DATASETS_PATH is the folder that holds it."""
    minari = _minari()
    storages = library("minari.dataset.minari_storage", "Minari data sets")
    buffers = library("minari.data_collector", "Minari data sets")
    episodes = iter(source.episodes)
    first = next(episodes, None)
    if first is None:
        return
    spaces = _spaces(source, first)
    path.mkdir()
    storage = storages.MinariStorage.new(path / "data", *spaces, data_format="hdf5", jpeg_encoding=False)
    carried = {name: value for name, value in source.attributes.get("minari", {}).items() if name in CARRIED}
    carried |= {name: {*carried[name]} for name in SETS if name in carried}
    storage.update_metadata({"dataset_id": _id(path.name), "minari_version": minari.__version__, **carried})
    known: list[dict[str, Any]] = []

    def buffered() -> Iterator[Any]:
        for episode in _chain(first, episodes):
            known.append(_known(episode))
            yield buffers.EpisodeBuffer(seed=episode.seed, **_fields(source, spaces[0], episode))

    storage.update_episodes(buffered())
    storage.update_episode_metadata(known)
    made_up = [key for key in OUTCOMES if key not in first.data]
    extra = {"made_up": made_up, "in_infos": _in_infos(source, first)}
    storage.update_metadata({HEADER: header(source) | extra})


def _chain(first: Demonstration, rest: Iterator[Demonstration]) -> Iterator[Demonstration]:
    yield first
    yield from rest


def _id(name: str) -> str:
    """An id as Minari allows them, such as `reach-v0`, out of the name of a folder."""
    if re.fullmatch(r"[-\w]+-v\d+", name, re.ASCII):
        return name
    return re.sub(r"[^-\w]", "-", name, flags=re.ASCII).strip("-") + "-v0"


def _in_infos(source: Source, episode: Demonstration) -> list[str]:
    return sorted(episode.data.keys() - {*source.observation_keys, source.action_key, *OUTCOMES})


def _known(episode: Demonstration) -> dict[str, Any]:
    """Metadata of an episode."""
    known = {"mode": episode.mode, "success": episode.success, "final": json.dumps(sorted(episode.final or {}))}
    return {name: value for name, value in known.items() if value is not None}


def _fields(source: Source, space: Any, episode: Demonstration) -> dict[str, Any]:
    """What Minari keeps of an episode."""
    steps = len(episode.data[source.action_key])
    last = {key: episode.data[key][-1] for key in source.observation_keys} | (episode.final or {})
    rows = {key: np.concatenate([episode.data[key], last[key][None]]) for key in source.observation_keys}
    done = np.arange(steps) == steps - 1
    made_up = {
        "rewards": done * float(episode.success or False),
        "terminations": done & bool(episode.success),
        "truncations": done & (not episode.success),
    }
    infos = {}
    for key in _in_infos(source, episode):
        infos[key] = np.concatenate([episode.data[key], episode.data[key][-1:]])
    return {
        "observations": _nested(space, rows),
        "actions": episode.data[source.action_key],
        "infos": infos,
        **{key: episode.data.get(key, made_up[key]) for key in OUTCOMES},
    }


def _nested(space: Any, rows: dict[str, np.ndarray], prefix: str = "") -> Any:
    """Arrays by key, as the space nests them."""
    if not hasattr(space, "spaces"):
        return rows[prefix or "observation"]
    items = space.spaces.items()
    return {name: _nested(inner, rows, f"{prefix}.{name}" if prefix else name) for name, inner in items}


def _spaces(source: Source, episode: Demonstration) -> tuple[Any, Any]:
    """Spaces of observations and actions: those that the data came with, where they fit, else without bounds."""
    spaces = library("gymnasium", "Minari data sets").spaces
    serialization = library("minari.serialization", "Minari data sets")
    own = source.attributes.get("minari", {})
    keys = source.observation_keys
    observed: Any = None
    acted: Any = None
    if "observation_space" in own and "action_space" in own:
        observed = serialization.deserialize_space(own["observation_space"])
        acted = serialization.deserialize_space(own["action_space"])
        leaves = _leaves(observed)
        if leaves.keys() != {*keys} or any(leaf.shape != episode.data[key].shape[1:] for key, leaf in leaves.items()):
            observed = None  # keys were added, dropped or changed since
    if observed is None and keys == ("observation",):
        observed = _unbounded(episode.data["observation"])
    elif observed is None:
        observed = spaces.Dict({key: _unbounded(episode.data[key]) for key in sorted(keys)})
    if acted is None or acted.shape != episode.data[source.action_key].shape[1:]:
        acted = _unbounded(episode.data[source.action_key])
    return observed, acted


def _unbounded(rows: np.ndarray) -> Any:
    """The space of all rows of a type and shape."""
    spaces = library("gymnasium", "Minari data sets").spaces
    dtype, shape = rows.dtype, rows.shape[1:]
    low, high = (-np.inf, np.inf) if dtype.kind == "f" else (0, 1)
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return spaces.Box(np.full(shape, low, dtype), np.full(shape, high, dtype), shape, dtype)

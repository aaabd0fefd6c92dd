"""Minari datasets ↔ source: the folder that holds `data/metadata.json`, as Minari keeps it under its root.

| in the dataset                         | in the store                                                   |
|-----------------------------------------|----------------------------------------------------------------|
| observations, a Box                     | the observation key `observation`                              |
| observations, a Dict or Tuple           | its keys and numbers, joined by dots: `outer.inner`, `joints.0` |
| Discrete, MultiDiscrete, MultiBinary    | one-hot, or 0 and 1, as the environment's adapter has them     |
| the observation after the last action   | final observation                                              |
| actions, a Box; a Dict or Tuple of them | the action; `action.<key>`, to be joined with --action         |
| rewards, terminations, truncations      | further keys of these names                                    |
| seed of an episode                      | seed, where every episode has one                              |
| spaces, author, description, ...        | `minari`, and `environment` where the dataset describes one   |

Written back, the last observation stands once more for a final one that is unknown; rewards (1 at the end of a
success), terminations and truncations are made up where there are none; both are not read back. Further keys of other
names become `infos`, with the last row twice, since Minari has one more info than actions. Spaces are those that the
dataset had; else a Box without bounds for each key. What only a store knows lies in the metadata, under
`diffusion_policy`. Images are written as they are, not as JPEG.

Not carried: infos, reset options and other metadata of episodes that another tool wrote; observations of text or of
graphs; bounds of wide Boxes that are not all the same. Datasets that Minari keeps as arrow are refused.

Reads and writes Minari's HDF5 itself, within bounds, and makes no environment; Minari's library is there to write.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.files import parse_json, read_bytes
from diffusion_policy.datasets.demonstration import Demonstration, is_seed
from diffusion_policy.datasets.formats.format import Contents, Format, Source, foreign, from_header, header
from diffusion_policy.datasets.formats.hdf5 import File, created, numbered, opened
from diffusion_policy.datasets.formats.minari_spaces import Leaf, leaves_of, to_gymnasium, unbounded
from diffusion_policy.datasets.formats.reading import library
from diffusion_policy.datasets.formats.survey import Survey
from diffusion_policy.datasets.storage import StoreError

DATA = "data/main_data.hdf5"
HEADER = "diffusion_policy"
OUTCOMES = ("rewards", "terminations", "truncations")
CARRIED = (
    *("algorithm_name", "author", "author_email", "code_permalink", "description", "env_spec", "eval_env_spec"),
    *("num_episodes_average_score", "ref_max_score", "ref_min_score", "requirements"),
)
"""Metadata that goes into the store and back."""
METADATA_BYTES = 2**26
"""Bounds of pictures are written out, number by number."""
LONG_LIST = re.compile(rb"\[[-+\d.,\s\[\]eEInfityNa]{1000,}\]")
WHAT = "Minari datasets"


# Reading


class _Described(NamedTuple):
    """What data/metadata.json says of the episodes."""

    observed: Any
    """Space of observations, and ..."""
    done: Any
    """... of actions."""
    head: Any
    """What we wrote beside the data; None in datasets of others."""
    jpeg: bool
    """Whether pictures are packed."""


def read(path: Path) -> Contents:
    """What is in the folder; raises StoreError, or what h5py raises."""
    metadata = parse_json(LONG_LIST.sub(_shortened, read_bytes(path / "data/metadata.json", METADATA_BYTES)))
    if metadata.get("data_format", "hdf5") != "hdf5":
        raise StoreError(f"it is kept as {metadata['data_format']}; Minari's hdf5 is read: write it anew as that")
    observed, done = (_space_of(metadata, name) for name in ("observation_space", "action_space"))
    head = metadata.get(HEADER)
    survey, leaves, left_out = Survey(), {}, {}
    described = _Described(observed, done, head, bool(metadata.get("jpeg_encoding", True)))
    with opened(path / DATA, WHAT) as file:
        for name in _episode_names(file):
            leaves |= _add(file, survey, name, described)
        survey.refuse_empty("episode")
        groups = [file.member(file.root, name) for name in survey.steps]
        seeds = [file.attribute(group, "seed") for group in groups]
        left_out |= survey.left_out
        if head is None and file.is_group(file.member(groups[0], "infos")):
            left_out["infos"] = "those of other tools are not carried"

    def episodes(keys: Sequence[str]) -> Iterator[Demonstration]:
        return _episodes(path, survey, leaves, keys, head=head, seeds=seeds if None not in seeds else None)

    if head is not None:
        return from_header(head, survey.whys(), episodes, left_out)
    own = {name: metadata[name] for name in CARRIED if metadata.get(name) is not None}
    spaces = {"observation_space": json.dumps(observed), "action_space": json.dumps(done)}
    keys = sorted(leaf.key for leaf in leaves_of(observed, "observation"))
    return foreign({"minari": own | spaces} | _environment(own), keys, survey.whys(), episodes, left_out)


def _shortened(found: re.Match[bytes]) -> bytes:
    """One number for a long list of the same ones, such as the bounds of a picture; null for others."""
    numbers = {*re.findall(rb"[^\[\],\s]+", found[0])}
    return numbers.pop() if len(numbers) == 1 else b"null"


def _space_of(metadata: Any, name: str) -> Any:
    text = metadata.get(name)
    if not isinstance(text, str):  # Minari would make the environment, and so run what the file names
        raise StoreError(f"data/metadata.json has no {name}")
    return parse_json(text)


def _environment(own: Mapping[str, Any]) -> dict[str, Any]:
    """The attribute `environment` that a dataset describes."""
    described = parse_json(own["env_spec"]) if isinstance(own.get("env_spec"), str) else None
    if not isinstance(described, dict) or not isinstance(described.get("id"), str):
        return {}
    arguments = described.get("kwargs")
    environment = {"id": described["id"], "arguments": dict(arguments) if isinstance(arguments, dict) else {}}
    if isinstance(described.get("max_episode_steps"), int):
        environment["arguments"].setdefault("max_episode_steps", described["max_episode_steps"])
    wrappers = described.get("additional_wrappers")
    if isinstance(wrappers, list) and wrappers:
        names = ("entry_point", "name", "kwargs")
        environment["wrappers"] = [{name: wrapper.get(name) for name in names} for wrapper in wrappers]
    return {"environment": environment}


def _episode_names(file: File) -> list[str]:
    names = numbered(file.names(file.root), "episode_")
    if not names:
        raise StoreError(f"{DATA} has no episode_0")
    return names


def _add(file: File, survey: Survey, name: str, described: _Described) -> dict[str, Leaf]:
    """Survey an episode; returns the spaces of which rows are observed otherwise than they are stored, by key."""
    group, head = file.member(file.root, name), described.head
    rewards = file.member(group, "rewards")
    if not file.is_array(rewards) or file.why_not(rewards) is not None or len(rewards) == 0:
        survey.left_out[name] = "it has no steps"
        return {}
    survey.begin(name, len(rewards))
    action_key = str(head["action_key"]) if head else "action"
    for leaf in _within("actions", described.done, ""):
        key = f"{action_key}.{leaf.key}" if leaf.key else action_key
        node = file.member(group, *leaf.place)
        wrong = None if leaf.kind == "Box" else f"actions must be a Box; they are {leaf.kind}"
        survey.add(file, key, leaf.place, wrong or ("it is missing" if node is None else node))
    observed = _within("observations", described.observed, "observation")
    decoded = {leaf.key: leaf for leaf in observed if _add_observed(file, survey, group, leaf, described.jpeg)}
    for key in OUTCOMES:
        if not head or key not in head["made_up"]:
            survey.add(file, key, (key,), file.member(group, key) or "it is missing")
    for key in head["in_infos"] if head else ():
        survey.add(file, key, ("infos", key), file.member(group, "infos", key) or "it is missing", longer=True)
    return decoded


def _within(folder: str, space: Any, name: str) -> list[Leaf]:
    """The spaces within a space that lies in a folder of an episode's group."""
    return [leaf._replace(place=(folder, *leaf.place)) for leaf in leaves_of(space, name)]


def _add_observed(file: File, survey: Survey, group: Any, leaf: Leaf, jpeg: bool) -> bool:
    """Survey what is observed of a space; returns whether its rows have to be decoded."""
    node = file.member(group, *leaf.place)
    why = leaf.why_not() or (None if node is not None else "it is missing")
    packed = why is None and jpeg and leaf.is_picture
    why = why or (None if packed else file.why_not(node))
    decoded = (leaf.shape, np.dtype(np.uint8)) if packed else None
    if why is None and leaf.kind != "Box":
        decoded = leaf.shape, np.dtype(np.float32)
    survey.add(file, leaf.key, leaf.place, why or node, longer=True, decoded=decoded)
    return decoded is not None


def _episodes(
    path: Path, survey: Survey, leaves: dict[str, Leaf], keys: Sequence[str], *, head: Any, seeds: list[Any] | None
) -> Iterator[Demonstration]:
    with opened(path / DATA, WHAT) as file:

        def decode(key: str, node: Any) -> np.ndarray:
            leaf = leaves.get(key)
            if leaf is None:
                return file.rows(node)
            return _unpack(file, node, leaf.shape) if leaf.kind == "Box" else leaf.encode(file.rows(node))

        survey.check(keys, file)
        for i, name in enumerate(survey.steps):
            group = file.member(file.root, name)
            data, final = survey.read(file, group, name, keys, decode)
            names = ("mode", "success", "final", "instruction")
            mode, success, known, instruction = (file.attribute(group, each) for each in names)
            if head:
                with_final = parse_json(str(known)) if known is not None else []
                final = {key: row for key, row in final.items() if key in with_final}
            yield Demonstration(
                data,
                seed=int(seeds[i]) if seeds is not None and is_seed(int(seeds[i])) else None,
                mode=str(mode) if head and mode is not None else None,
                success=bool(success) if head and success is not None else None,
                final=final or None,
                instruction=str(instruction) if head and instruction is not None else None,
            )


def _unpack(file: File, node: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Pictures out of JPEG; raises StoreError for those of another size."""
    image = library("PIL.Image", "pictures of Minari datasets")
    pictures = np.empty((len(node), *shape), np.uint8)
    whole = file.rows(node) if node.dtype == np.uint8 else None  # of different lengths, they are read one by one
    for i in range(len(node)):
        packed = node[i] if whole is None else whole[i]
        with image.open(io.BytesIO(np.asarray(packed, np.uint8).tobytes()), formats=("JPEG",)) as picture:
            if picture.size != (shape[1], shape[0]):
                raise StoreError(f"{node.name} has a picture of {picture.size}; its space is {shape}")
            pictures[i] = np.asarray(picture).reshape(shape)
    return pictures


# Writing


def write(source: Source, path: Path) -> None:
    """Write the folder. `minari.load_dataset` finds it by its name where that is an id such as `reach-v0`, and
    MINARI_DATASETS_PATH is the folder that holds it."""
    library("h5py", WHAT)
    minari = library("minari", WHAT)
    first: Demonstration | None = None
    spaces: tuple[Any, Any] = (None, None)
    count = steps = 0
    (path / "data").mkdir(parents=True)
    with created(path / DATA, WHAT) as (file, check):
        for i, episode in enumerate(source.episodes):
            if first is None:
                first, spaces = episode, _spaces(source, episode)
            group = file.create_group(f"episode_{i}")
            _put(group, _fields(source, spaces[0], episode))
            known = {"id": i, "seed": episode.seed, "total_steps": len(episode.data[source.action_key])}
            group.attrs.update({name: value for name, value in (known | _known(episode)).items() if value is not None})
            count, steps = i + 1, steps + known["total_steps"]
            check()
    if first is None:
        return
    serialize = library("minari.serialization", WHAT).serialize_space
    made_up = [key for key in OUTCOMES if key not in first.data]
    carried = {name: value for name, value in source.attributes.get("minari", {}).items() if name in CARRIED}
    metadata = {
        "total_episodes": count,
        "total_steps": steps,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": serialize(to_gymnasium(spaces[0])),
        "action_space": serialize(to_gymnasium(spaces[1])),
        "dataset_id": _id(path.name),
        "minari_version": minari.__version__,
        **carried,
        "dataset_size": round((path / DATA).stat().st_size / 1e6, 1),
        HEADER: header(source) | {"made_up": made_up, "in_infos": _in_infos(source, first)},
    }
    (path / "data/metadata.json").write_text(json.dumps(metadata))


def _put(group: Any, fields: dict[str, Any]) -> None:
    """Arrays in groups, as Minari has them."""
    for name, rows in fields.items():
        if isinstance(rows, dict):
            _put(group.create_group(name), rows)
        else:
            group.create_dataset(name, data=rows, chunks=True, maxshape=(None, *rows.shape[1:]))


def _id(name: str) -> str:
    """An id as Minari allows them, such as `reach-v0`, out of the name of a folder."""
    if re.fullmatch(r"[-\w]+-v\d+", name, re.ASCII):
        return name
    return re.sub(r"[^-\w]", "-", name, flags=re.ASCII).strip("-") + "-v0"


def _in_infos(source: Source, episode: Demonstration) -> list[str]:
    return sorted(episode.data.keys() - {*source.observation_keys, source.action_key, *OUTCOMES})


def _known(episode: Demonstration) -> dict[str, Any]:
    """Metadata of an episode."""
    known = {name: getattr(episode, name) for name in ("mode", "success", "instruction")}
    return known | {"final": json.dumps(sorted(episode.final or {}))}


def _fields(source: Source, space: dict[str, Any], episode: Demonstration) -> dict[str, Any]:
    """What Minari keeps of an episode."""
    steps = len(episode.data[source.action_key])
    last = {key: episode.data[key][-1] for key in source.observation_keys} | (episode.final or {})
    rows = {key: np.concatenate([episode.data[key], last[key][None]]) for key in source.observation_keys}
    done = np.arange(steps) == steps - 1
    outcomes = {
        "rewards": done * float(episode.success or False),
        "terminations": done & bool(episode.success),
        "truncations": done & (not episode.success),
    }
    outcomes |= {
        key: episode.data[key].reshape(steps, *_inner(episode.data[key])) for key in OUTCOMES if key in episode.data
    }
    infos = {}
    for key in _in_infos(source, episode):
        infos[key] = np.concatenate([episode.data[key], episode.data[key][-1:]])
    return {
        "observations": _nested(space, rows),
        "actions": episode.data[source.action_key],
        "infos": infos,
        **outcomes,
    }


def _inner(rows: np.ndarray) -> tuple[int, ...]:
    """Shape of a row; Minari has one number a step without an axis of its own."""
    return () if rows.shape[1:] == (1,) else rows.shape[1:]


def _nested(space: dict[str, Any], rows: dict[str, np.ndarray]) -> Any:
    """Arrays by key, in groups as the space nests them."""
    tree: dict[str, Any] = {}
    for leaf in leaves_of(space, "observation"):
        decoded = leaf.decode(rows[leaf.key])
        if not leaf.place:
            return decoded
        group = tree
        for name in leaf.place[:-1]:
            group = group.setdefault(name, {})
        group[leaf.place[-1]] = decoded
    return tree


def _spaces(source: Source, episode: Demonstration) -> tuple[Any, Any]:
    """Spaces of observations and actions, as Minari writes them: those that the data came with, where they fit, else
    without bounds."""
    own = source.attributes.get("minari", {})
    keys, action = source.observation_keys, episode.data[source.action_key]
    observed, done = (_own_space(own, name) for name in ("observation_space", "action_space"))
    leaves = [] if observed is None else [leaf for leaf in leaves_of(observed, "observation") if leaf.why_not() is None]
    shapes = {leaf.key: leaf.shape or (1,) for leaf in leaves}
    if shapes != {key: episode.data[key].shape[1:] for key in keys}:  # keys were added, dropped or changed since
        boxes = {key: unbounded(episode.data[key]) for key in sorted(keys)}
        observed = boxes["observation"] if keys == ("observation",) else {"type": "Dict", "subspaces": boxes}
    if done is None or done.get("type") != "Box" or tuple(done.get("shape") or (1,)) != action.shape[1:]:
        done = unbounded(action)
    return observed, done


def _own_space(own: dict[str, Any], name: str) -> Any:
    try:
        found = parse_json(own[name])
    except (KeyError, TypeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


FORMAT = Format("Minari dataset", (".minari",), lambda path: (path / "data" / "metadata.json").is_file(), read, write)

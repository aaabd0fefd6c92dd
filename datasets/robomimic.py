"""robomimic HDF5 ↔ source: one file, a group `data/demo_<n>` an episode.

| in the file                                  | in the store                                             |
|----------------------------------------------|----------------------------------------------------------|
| `obs/<key>`                                  | observation keys                                         |
| `actions`                                    | the action                                               |
| `rewards`, `dones`, `states`, any other rows | further keys                                             |
| the last row of `next_obs/<key>`             | final observation, where every demo has `next_obs`       |
| `env_args` of `data`                         | `environment`, `control_frequency` [Hz], `robomimic`     |

Written back, `next_obs` is the observations moved by a step, with the final one in the end; it is left out where that
is unknown. `rewards` (1 at the end of a success) and `dones` are made up where there are none, since robomimic's loader
asks for them, and not read back. What only a store knows (seeds, modes, success, attributes) lies in attributes of each
demo and in the dataset `diffusion_policy`, which robomimic does not look at.

Not carried: groups within a demo (`action_dict`), filter keys (`mask`), attributes of demos (`model_file`), and rows of
`next_obs` that are not the next row of `obs`.
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
LARGEST_GAP = 2**28
"""Bytes of numbers that need not be stored, where they are all the same."""
MOST_COMPRESSED = 2000
"""No filter of HDF5 makes numbers smaller than that."""
GYM_TYPE = 2
"""robomimic's number for environments of gym."""


def read(path: Path) -> Source:
    """The file as a source; raises StoreError, or what h5py raises."""
    h5py = library("h5py", "robomimic files")
    with h5py.File(path, "r") as file:
        if "data" not in file or not isinstance(file["data"], h5py.Group):
            raise StoreError(f"there is no group data; the file has {', '.join(file) or 'nothing'}")
        data = file["data"]
        demos = sorted((name for name in data if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))
        if not demos:
            raise StoreError(f"there is no data/demo_0; data has {', '.join(list(data)[:5]) or 'nothing'}")
        first = data[demos[0]]
        left_out = [f"{demos[0]}/{name}" for name in _groups(first) if name not in ("obs", "next_obs")]
        left_out += sorted({*data} - {*demos}) + (["mask"] if "mask" in file else [])
        with_final = all("next_obs" in data[name] for name in demos)
        head = json.loads(file[HEADER][()]) if HEADER in file else None
        if head is not None:
            return from_header(head, _episodes(path, demos, with_final, head), left_out)
        keys = sorted(first["obs"]) if "obs" in first else []
        return foreign(
            _attributes(data.attrs.get("env_args")), keys, _episodes(path, demos, with_final, None), left_out
        )


def _groups(group: Any) -> list[str]:
    return [name for name, member in group.items() if not hasattr(member, "dtype")]


def _attributes(env_args: Any) -> dict[str, Any]:
    """What a file says of its environment."""
    if env_args is None:
        return {}
    described = json.loads(env_args)
    arguments = described.get("env_kwargs", {})
    attributes: dict[str, Any] = {"robomimic": {"env_args": described}}
    if "env_name" in described:
        attributes["environment"] = {"id": described["env_name"], "arguments": arguments}
    if isinstance(arguments.get("control_freq"), int | float):
        attributes["control_frequency"] = arguments["control_freq"]
    return attributes


def _episodes(path: Path, demos: list[str], with_final: bool, head: dict[str, Any] | None) -> Iterator[Demonstration]:
    action_key = head["action_key"] if head else "action"
    made_up = {*head["made_up"]} if head else set()
    with library("h5py", "robomimic files").File(path, "r") as file:
        for name in demos:
            demo = file["data"][name]
            if "actions" not in demo or "obs" not in demo:
                raise StoreError(f"data/{name} needs obs and actions; it has {', '.join(demo) or 'nothing'}")
            data: dict[str, np.ndarray] = {}
            for key, member in demo.items():
                if key not in made_up and hasattr(member, "dtype"):
                    place(data, action_key if key == "actions" else key, _rows(member))
            for key, member in demo["obs"].items():
                place(data, key, _rows(member))
            steps = int(demo.attrs.get("num_samples", len(data[action_key])))
            if steps != len(data[action_key]):
                raise StoreError(f"data/{name} has {len(data[action_key])} actions; its num_samples says {steps}")
            final = {key: _last(member, steps) for key, member in demo["next_obs"].items()} if with_final else None
            yield Demonstration(data, **_known(demo.attrs) if head else {}, final=final)


def _rows(member: Any) -> np.ndarray:
    _refuse_unsafe(member)
    return member[()]


def _last(member: Any, steps: int) -> np.ndarray:
    _refuse_unsafe(member)
    if len(member) != steps:
        raise StoreError(f"{member.name} must have {steps} rows, as many as there are actions")
    return np.asarray(member[-1])


def _refuse_unsafe(member: Any) -> None:
    """Raise StoreError unless rows of numbers lie in the file itself, and not a thousand times more than it stores."""
    if not hasattr(member, "dtype") or member.dtype.kind not in "biuf" or member.ndim == 0:
        raise StoreError(f"{member.name} must be rows of numbers; it is {getattr(member, 'dtype', 'a group')}")
    if member.external or member.is_virtual:
        raise StoreError(f"{member.name} must lie in the file; it points to another")
    if member.nbytes > LARGEST_GAP + MOST_COMPRESSED * member.id.get_storage_size():
        raise StoreError(f"{member.name} is damaged: its shape is {member.shape}, of which little is stored")


def _known(attributes: Any) -> dict[str, Any]:
    """Seed, mode and success of a demo of ours."""
    return {
        "seed": int(attributes["seed"]) if "seed" in attributes else None,
        "mode": str(attributes["mode"]) if "mode" in attributes else None,
        "success": bool(attributes["success"]) if "success" in attributes else None,
    }


def write(source: Source, path: Path) -> None:
    """Write the file; raises StoreError for keys that would get in each other's way."""
    made_up: list[str] = []
    with library("h5py", "robomimic files").File(path, "w") as file:
        group = file.create_group("data")
        total = 0
        for i, episode in enumerate(source.episodes):
            demo = group.create_group(f"demo_{i}")
            steps = len(episode.data[source.action_key])
            outside = _outside_obs(source, episode)
            made_up = [key for key in ("rewards", "dones") if key not in outside]
            outside |= {key: rows for key, rows in _made_up(episode, steps).items() if key in made_up}
            for key, rows in outside.items():
                demo.create_dataset(key, data=rows)
            for key in source.observation_keys:
                demo.create_dataset(f"obs/{key}", data=episode.data[key])
            for key, last in (episode.final or {}).items():
                demo.create_dataset(f"next_obs/{key}", data=np.concatenate([episode.data[key][1:], last[None]]))
            known = {"seed": episode.seed, "mode": episode.mode, "success": episode.success}
            demo.attrs.update({name: value for name, value in known.items() if value is not None})
            demo.attrs["num_samples"] = steps
            total += steps
        group.attrs["total"] = total
        group.attrs["env_args"] = json.dumps(_env_args(source.attributes))
        file[HEADER] = json.dumps(header(source) | {"made_up": made_up})


def _outside_obs(source: Source, episode: Demonstration) -> dict[str, np.ndarray]:
    """What lies beside `obs`: the action and the further keys."""
    outside = {"actions": episode.data[source.action_key]}
    for key in sorted(episode.data.keys() - {*source.observation_keys, source.action_key}):
        if key in ("obs", "next_obs", "actions"):
            raise StoreError(f"robomimic files have another use for the key {key!r}; rename it")
        outside[key] = episode.data[key]
    return outside


def _made_up(episode: Demonstration, steps: int) -> dict[str, np.ndarray]:
    rewards, dones = np.zeros(steps), np.zeros(steps, np.int64)
    rewards[-1], dones[-1] = float(episode.success or False), 1
    return {"rewards": rewards, "dones": dones}


def _env_args(attributes: dict[str, Any]) -> dict[str, Any]:
    given = attributes.get("robomimic", {}).get("env_args")
    if given is not None:
        return given
    environment = attributes.get("environment", {})
    return {
        "env_name": environment.get("id", ""),
        "type": GYM_TYPE,
        "env_kwargs": environment.get("arguments", {}),
    }

"""robomimic HDF5 ↔ source: one file, a group `data/demo_<n>` an episode. MimicGen and Isaac Lab write it too.

| in the file                                  | in the store                                             |
|----------------------------------------------|----------------------------------------------------------|
| `obs/<key>`, `obs/<group>/<key>`             | observation keys `<key>`, `<group>.<key>`                |
| `actions`                                    | the action                                               |
| `rewards`, `dones`, `states`, any other rows | further keys; those of groups are joined by a dot        |
| the last row of `next_obs/<key>`             | final observation, where every demo has `next_obs`       |
| attributes `seed` and `success` of a demo    | seed and success                                         |
| `env_args` of `data`                         | `environment`, `control_frequency` [Hz], `robomimic`     |

Written back, `next_obs` is the observations moved by a step, with the final one in the end; it is left out where that
is unknown. `rewards` (1 at the end of a success) and `dones` are made up where there are none, since robomimic's loader
asks for them, and not read back. What only a store knows (modes, attributes) lies in attributes of each demo and in the
dataset `diffusion_policy`, which robomimic does not look at.

Not carried: filter keys (`mask`), attributes of demos (`model_file`), rows of `next_obs` that are not the next row of
`obs`, and, each named, arrays of another length than the actions and demos without actions.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.basics.files import parse_json
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Contents, Format, Source, foreign, from_header, header
from diffusion_policy.datasets.formats.hdf5 import File, created, detector, numbered, opened
from diffusion_policy.datasets.formats.survey import Survey
from diffusion_policy.datasets.storage import StoreError

HEADER = "diffusion_policy"
GYM_TYPE = 2
"""robomimic's number for environments of gym."""
FLAT = ("rewards", "dones")
"""Arrays that robomimic has as one number a step, not as rows."""


def read(path: Path) -> Contents:
    """What is in the file; raises StoreError, or what h5py raises."""
    with opened(path, "robomimic files") as file:
        data = file.member(file.root, "data")
        if not file.is_group(data):
            raise StoreError(
                f"there is no group data; the file has {', '.join(file.names(file.root)[:9]) or 'nothing'}"
            )
        names = file.names(data)
        demos = numbered(names, "demo_")
        if not demos:
            raise StoreError(f"there is no data/demo_0; data has {', '.join(names[:5]) or 'nothing'}")
        beside = file.member(file.root, HEADER)
        head = None if beside is None else parse_json(file.text(beside))
        survey, following = _survey(file, data, demos, head)
        left_out = dict.fromkeys(sorted({*names} - {*demos}), "it is no demo") | survey.left_out
        left_out |= {"mask": "filter keys are not carried"} if "mask" in file.names(file.root) else {}
        described = file.attribute(data, "env_args")
        observed = [key for key, array in survey.arrays.items() if array.path[0] == "obs"]

    def episodes(keys: Sequence[str]) -> Iterator[Demonstration]:
        return _episodes(path, survey, following, keys, ours=head is not None)

    if head is not None:
        return from_header(head, survey.whys(), episodes, left_out)
    return foreign(_attributes(described), sorted(observed), survey.whys(), episodes, left_out)


def _survey(file: File, data: Any, demos: list[str], head: Any) -> tuple[Survey, Survey]:
    """What the demos have in common, and what their `next_obs`."""
    survey, following = Survey(), Survey()
    action_key = str(head["action_key"]) if head else "action"
    made_up = {*head["made_up"]} if head else set()
    for name in demos:
        demo = file.member(data, name)
        why = _why_not(file, demo)
        if why is not None:
            survey.left_out[f"data/{name}"] = why
            continue
        steps = len(file.member(demo, "actions"))
        survey.begin(name, steps)
        following.begin(name, steps)
        for path, node in file.leaves(demo):
            if path[0] == "next_obs":
                following.add(file, ".".join(path[1:]) or "observation", path, node)
            elif path[0] not in made_up:
                inner = path[1:] or ("observation",)
                key = action_key if path == ("actions",) else ".".join(inner if path[0] == "obs" else path)
                survey.add(file, key, path, node)
    survey.refuse_empty("demo")
    return survey, following


def _why_not(file: File, demo: Any) -> str | None:
    """Why a demo cannot be used."""
    if not file.is_group(demo):
        return demo if isinstance(demo, str) else "it is no group"
    actions = file.member(demo, "actions")
    if not file.is_array(actions):
        return f"it has no actions, but {', '.join(file.names(demo)[:9]) or 'nothing'}"
    why = file.why_not(actions)
    if why is not None or len(actions) == 0:
        return f"its actions cannot be used: {why or 'it has no steps'}"
    counted = file.attribute(demo, "num_samples")
    if isinstance(counted, int | float) and counted != len(actions):
        return f"it has {len(actions)} actions; its num_samples says {counted}"
    return None


def _attributes(env_args: Any) -> dict[str, Any]:
    """What a file says of its environment."""
    described = parse_json(env_args) if isinstance(env_args, str) else None
    if not isinstance(described, dict):
        return {}
    arguments = described.get("env_kwargs", {})
    attributes: dict[str, Any] = {"robomimic": {"env_args": described}}
    if isinstance(described.get("env_name"), str) and isinstance(arguments, dict):
        attributes["environment"] = {"id": described["env_name"], "arguments": arguments}
    rate = arguments.get("control_freq") if isinstance(arguments, dict) else None
    if isinstance(rate, int | float) and rate > 0:
        attributes["control_frequency"] = rate
    return attributes


def _episodes(
    path: Path, survey: Survey, following: Survey, keys: Sequence[str], ours: bool
) -> Iterator[Demonstration]:
    same = {key for key, why in following.whys().items() if why is None and key in survey.arrays}
    with_final = [key for key in keys if key in same and following.arrays[key][1:3] == survey.arrays[key][1:3]]
    with opened(path, "robomimic files") as file:
        survey.check(keys, file)
        data = file.member(file.root, "data")
        for name, steps in survey.steps.items():
            demo = file.member(data, name)
            rows, _ = survey.read(file, demo, name, keys)
            final = {key: file.rows(file.member(demo, *following.arrays[key].path), steps - 1)[0] for key in with_final}
            yield Demonstration(rows, **_known(file, demo, ours), final=final or None)


def _known(file: File, demo: Any, ours: bool) -> dict[str, Any]:
    """Seed, mode, success and instruction of a demo; a mode and an instruction in files of ours alone, where all are
    known."""
    names = ("seed", "mode", "success", "instruction")
    seed, mode, success, instruction = (file.attribute(demo, name) for name in names)
    return {
        "seed": int(seed) if isinstance(seed, int | float) and 0 <= seed < 2**63 else None,
        "mode": str(mode) if ours and mode is not None else None,
        "success": bool(success) if isinstance(success, bool | int) else None,
        "instruction": str(instruction) if ours and instruction is not None else None,
    }


def write(source: Source, path: Path) -> None:
    """Write the file; raises StoreError for keys that would get in each other's way."""
    made_up: list[str] = []
    with created(path, "robomimic files") as (file, check):
        group = file.create_group("data", track_order=False)
        total = 0
        for i, episode in enumerate(source.episodes):
            demo = group.create_group(f"demo_{i}", track_order=False)
            steps = len(episode.data[source.action_key])
            outside = _outside_obs(source, episode)
            made_up = [key for key in FLAT if key not in outside]
            outside |= {key: rows for key, rows in _made_up(episode, steps).items() if key in made_up}
            for key, rows in outside.items():
                demo.create_dataset(key, data=rows.reshape(-1) if key in FLAT and rows.size == steps else rows)
            for key in source.observation_keys:
                demo.create_dataset(f"obs/{key}", data=episode.data[key])
            for key, last in (episode.final or {}).items():
                demo.create_dataset(f"next_obs/{key}", data=np.concatenate([episode.data[key][1:], last[None]]))
            names = ("seed", "mode", "success", "instruction")
            known = {name: getattr(episode, name) for name in names}
            demo.attrs.update({name: value for name, value in known.items() if value is not None})
            demo.attrs["num_samples"] = steps
            total += steps
            check()
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


def _fits(file: File, names: list[str]) -> bool:
    return file.is_group(file.member(file.root, "data"))


FORMAT = Format(
    "robomimic HDF5", (".hdf5", ".h5"), detector(_fits), read, write, hdf5_layout="data/demo_0 (robomimic, Isaac Lab)"
)

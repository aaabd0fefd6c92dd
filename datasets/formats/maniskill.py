"""ManiSkill HDF5 → source: one file, a group `traj_<n>` an episode, and where it is, the `.json` of the same name.

| in the file                                       | in the store                                             |
|---------------------------------------------------|----------------------------------------------------------|
| `obs`, nested                                     | observation keys, joined by dots: `agent.qpos`           |
| `obs`, an array                                   | observation key `observation`                            |
| the last of its rows, one more than the actions   | final observation                                        |
| `actions`                                         | the action; those of several agents: `actions.<agent>`   |
| `env_states`, `rewards`, `success`, `terminated`  | further keys; `env_states.actors.cube`                   |
| the last row of `success`                         | success of the episode                                   |
| `env_info` and `episode_seed` in the `.json`      | `environment`, seed                                      |

A file without `obs` is to be replayed with ManiSkill's own `replay_trajectory`, or observes `env_states`. Files of this
kind are only read.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion_policy.basics.files import read_json
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Contents, Format, foreign
from diffusion_policy.datasets.formats.hdf5 import File, detector, numbered, opened
from diffusion_policy.datasets.formats.survey import Survey

JSON_BYTES = 2**26


def read(path: Path) -> Contents:
    """What is in the file; raises StoreError, or what h5py raises."""
    described = read_json(path.with_suffix(".json"), JSON_BYTES) if path.with_suffix(".json").exists() else {}
    survey = Survey()
    with opened(path, "ManiSkill files") as file:
        names = file.names(file.root)
        episodes_of = numbered(names, "traj_")
        for name in episodes_of:
            _add(file, survey, name)
        left_out = {name: "it is no trajectory" for name in names if name not in episodes_of} | survey.left_out
    survey.refuse_empty("trajectory", left_out or {"the file": "it has no traj_0"})
    seeds = _seeds(described)

    def episodes(keys: Sequence[str]) -> Iterator[Demonstration]:
        with opened(path, "ManiSkill files") as file:
            survey.check(keys, file)
            for name in survey.steps:
                data, final = survey.read(file, file.member(file.root, name), name, keys)
                yield Demonstration(data, seeds.get(name), None, _success(file, name), final or None)

    observed = sorted(key for key, array in survey.arrays.items() if array.path[0] == "obs")
    remarks = (
        () if observed else ("there is no obs: replay the file with mani_skill.trajectory.replay_trajectory -o state",)
    )
    return foreign(_attributes(described), observed, survey.whys(), episodes, left_out, remarks=remarks)


def _add(file: File, survey: Survey, name: str) -> None:
    """Survey a trajectory."""
    group = file.member(file.root, name)
    found = list(file.leaves(group)) if file.is_group(group) else []
    actions = next((node for path, node in found if path[0] == "actions" and file.why_not(node) is None), None)
    if actions is None or len(actions) == 0:
        survey.left_out[name] = "it has no actions"
        return
    survey.begin(name, len(actions))
    for path, node in found:
        key = "action" if path == ("actions",) else ".".join(path)
        key = (".".join(path[1:]) or "observation") if path[0] == "obs" else key
        survey.add(file, key, path, node, longer=path[0] in ("obs", "env_states"))


def _success(file: File, name: str) -> bool | None:
    """Whether the last step was a success."""
    success = file.member(file.root, name, "success")
    if not file.is_array(success) or file.why_not(success) is not None or len(success) == 0:
        return None
    return bool(file.rows(success, len(success) - 1).all())


def _attributes(described: Any) -> dict[str, Any]:
    """What the file beside it says of the environment."""
    info = described.get("env_info") if isinstance(described, dict) else None
    if not isinstance(info, dict) or not isinstance(info.get("env_id"), str):
        return {}
    arguments = info.get("env_kwargs")
    arguments = dict(arguments) if isinstance(arguments, dict) else {}
    if isinstance(info.get("max_episode_steps"), int):
        arguments.setdefault("max_episode_steps", info["max_episode_steps"])
    return {"environment": {"id": info["env_id"], "arguments": arguments}}


def _seeds(described: Any) -> dict[str, int]:
    """The seed of each trajectory that has one of its own."""
    episodes = described.get("episodes") if isinstance(described, dict) else None
    seeds = {}
    for episode in episodes if isinstance(episodes, list) else ():
        if isinstance(episode, dict) and type(episode.get("episode_seed")) is int and episode["episode_seed"] >= 0:
            seeds[f"traj_{episode.get('episode_id')}"] = episode["episode_seed"]
    return seeds


def _fits(file: File, names: list[str]) -> bool:
    return bool(numbered(names, "traj_"))


FORMAT = Format("ManiSkill HDF5", (), detector(_fits), read, hdf5_layout="traj_0 (ManiSkill)")

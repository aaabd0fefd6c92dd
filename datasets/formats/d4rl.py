"""Flat HDF5 as of D4RL → source: one row a step of all episodes, one after the other.

| in the file                                    | in the store                                          |
|------------------------------------------------|-------------------------------------------------------|
| `observations`, an array                       | observation key `observation`                         |
| `observations`, nested                         | observation keys, joined by dots                      |
| `actions`                                      | the action                                            |
| `terminals`, `timeouts`                        | ends of episodes, and further keys                    |
| `rewards`, `infos/<key>`, any other rows       | further keys; `infos.<key>`                           |
| `next_observations` of an episode's last step  | final observation                                     |

What follows the last end is an episode too, which a remark says. Not carried: `metadata`, and rows of
`next_observations` within an episode. Files of this kind are only read.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Contents, Format, foreign
from diffusion_policy.datasets.formats.hdf5 import File, detector, opened
from diffusion_policy.datasets.formats.survey import Survey
from diffusion_policy.datasets.storage import StoreError

ENDS = ("terminals", "timeouts")
FOLLOWING = "next_observations"
BLOCK_BYTES = 2**24
"""About so much is read at a time, unless an episode is longer."""


def read(path: Path) -> Contents:
    """What is in the file; raises StoreError, or what h5py raises."""
    with opened(path, "D4RL files") as file:
        actions = file.member(file.root, "actions")
        why = file.why_not(actions) if file.is_array(actions) else "there are none"
        if why is not None or len(actions) == 0:
            raise StoreError(f"its actions cannot be used: {why or 'there are none'}")
        survey = Survey()
        survey.begin("the file", len(actions))
        for place, node in file.leaves(file.root):
            if place[0] not in (FOLLOWING, "metadata"):
                survey.add(file, _key(place), place, node, whole=False)
        ends, remarks = _ends(file, len(actions))
        left_out = survey.left_out | ({"metadata": "it is not carried"} if "metadata" in file.names(file.root) else {})
    observed = sorted(key for key, array in survey.arrays.items() if array.path[0] == "observations")
    return foreign(
        {}, observed, survey.whys(), lambda keys: _episodes(path, survey, ends, keys), left_out, remarks=remarks
    )


def _key(place: tuple[str, ...]) -> str:
    if place[0] == "observations":
        return ".".join(place[1:]) or "observation"
    return "action" if place == ("actions",) else ".".join(place)


def _ends(file: File, steps: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Row after the last of each episode, and what is to be said of them."""
    ended = np.zeros(steps, bool)
    found = []
    for name in ENDS:
        node = file.member(file.root, name)
        if file.is_array(node) and file.why_not(node) is None and node.size == len(node) == steps:
            ended |= file.rows(node).reshape(steps) != 0
            found.append(name)
    if not found:
        raise StoreError(
            f"there is nothing to tell episodes by: {' or '.join(ENDS)}, a number for each of {steps} actions"
        )
    ends = np.flatnonzero(ended) + 1
    if len(ends) and ends[-1] == steps:
        return ends, ()
    rest = steps - (ends[-1] if len(ends) else 0)
    return np.append(ends, steps), (f"the last {rest} steps have no end in the file; they are kept as an episode",)


def _episodes(path: Path, survey: Survey, ends: np.ndarray, keys: Sequence[str]) -> Iterator[Demonstration]:
    starts = np.concatenate([[0], ends[:-1]])
    with opened(path, "D4RL files") as file:
        survey.check(keys, file, (ends - starts).tolist())
        nodes = {key: file.member(file.root, *survey.arrays[key].path) for key in keys}
        following = {key: node for key in keys if (node := _following(file, survey, key)) is not None}
        block = max(1, BLOCK_BYTES // survey.row_bytes(keys))
        first, blocks = 0, {key: file.rows(node, 0, 0) for key, node in nodes.items()}
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if end > first + len(next(iter(blocks.values()))):
                first = start
                blocks = {key: file.rows(node, start, max(end, start + block)) for key, node in nodes.items()}
            final = {key: file.rows(node, end - 1, end)[0] for key, node in following.items()}
            yield Demonstration(
                {key: rows[start - first : end - first] for key, rows in blocks.items()}, final=final or None
            )


def _following(file: File, survey: Survey, key: str) -> Any:
    """The array of the observations after each step, where there is one like that of the observations."""
    array = survey.arrays[key]
    node: Any = file.member(file.root, FOLLOWING, *array.path[1:]) if array.path[0] == "observations" else None
    if not file.is_array(node) or file.why_not(node) is not None:
        return None
    same = (node.shape, node.dtype) == ((survey.steps["the file"], *array.shape), array.dtype)
    return node if same else None


def _fits(file: File, names: list[str]) -> bool:
    return {"observations", "actions"} <= {*names}


FORMAT = Format(
    "flat HDF5 as of D4RL", (), detector(_fits), read, hdf5_layout="flat observations beside actions (D4RL)"
)

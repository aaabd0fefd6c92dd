"""ALOHA and ACT HDF5 → source: a folder of files `episode_<n>.hdf5`, or one of them.

| in a file                                      | in the store                                    |
|------------------------------------------------|-------------------------------------------------|
| `observations/qpos`, `qvel`, `effort`          | observation keys of these names                 |
| `observations/images/<camera>`                 | observation key `images.<camera>`               |
| `action`                                       | the action                                      |
| `base_action` (Mobile ALOHA), any other rows   | further keys: `--action action base_action`     |

Not carried, but named: pictures that are compressed (attribute `compress`: JPEG, padded to one length), of which the
files do not say in which order the colours are. Files of this kind are only read.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Contents, Format, foreign
from diffusion_policy.datasets.formats.hdf5 import File, detector, opened
from diffusion_policy.datasets.formats.survey import Survey
from diffusion_policy.datasets.storage import StoreError

NAME = re.compile(r"episode_(\d+)\.hdf5")
MOST_FILES = 10**5
COMPRESSED = "its pictures are JPEG; ACT's own tools unpack them"


def read(path: Path) -> Contents:
    """What is in the files; raises StoreError, or what h5py raises."""
    files = _files(path)
    survey = Survey()
    for name, file_path in files.items():
        with opened(file_path, "ALOHA files") as file:
            _add(file, survey, name)
    survey.refuse_empty("episode")

    def episodes(keys: Sequence[str]) -> Iterator[Demonstration]:
        for name in survey.steps:
            with opened(files[name], "ALOHA files") as file:
                survey.check(keys, file, [survey.steps[name]])
                data, _ = survey.read(file, file.root, name, keys)
                yield Demonstration(data)

    observed = sorted(key for key, array in survey.arrays.items() if array.path[0] == "observations")
    return foreign({}, observed, survey.whys(), episodes, survey.left_out)


def _files(path: Path) -> dict[str, Path]:
    """The files of a folder, in order; a file alone."""
    if not path.is_dir():
        return {path.name: path}
    with os.scandir(path) as entries:
        names = [entry.name for entry in itertools.islice(entries, MOST_FILES)]
    numbers = {name: int(match[1]) for name in names if (match := NAME.fullmatch(name))}
    if not numbers:
        raise StoreError("there is no episode_0.hdf5")
    return {name: path / name for name in sorted(numbers, key=lambda name: numbers[name])}


def _add(file: File, survey: Survey, name: str) -> None:
    """Survey the episode of a file."""
    action = file.member(file.root, "action")
    why = file.why_not(action) if file.is_array(action) else "it has no action"
    if why is not None or len(action) == 0:
        survey.left_out[name] = f"its actions cannot be used: {why or 'it has no steps'}"
        return
    survey.begin(name, len(action))
    compressed = bool(file.attribute(file.root, "compress"))
    for path, node in file.leaves(file.root):
        picture = compressed and path[:2] == ("observations", "images")
        key = ".".join(path[1:] if path[0] == "observations" and len(path) > 1 else path)
        survey.add(file, key, path, COMPRESSED if picture else node)


def _fits(file: File, names: list[str]) -> bool:
    return "action" in names and file.is_group(file.member(file.root, "observations"))


def _detect(path: Path) -> bool:
    if not path.is_dir():
        return detector(_fits)(path)
    with os.scandir(path) as entries:
        return any(NAME.fullmatch(entry.name) for entry in itertools.islice(entries, MOST_FILES))


FORMAT = Format(
    "ALOHA or ACT HDF5, a folder of episodes",
    (),
    _detect,
    read,
    hdf5_layout="action beside observations (ALOHA, a folder of them)",
)

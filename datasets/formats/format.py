"""Types of a format: `Contents`, which its reader returns; `Source`, which its writer takes; `Format` itself.

Knows arrays. Knows no files and no particular format.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError


class Contents(NamedTuple):
    """What a reader finds in a dataset, before anything is chosen of it. Names are those of the file; those of nested
    groups are joined by a dot."""

    attributes: dict[str, Any]
    """Attributes of the store that it is or becomes: JSON."""
    modes: tuple[str, ...]
    observation_keys: tuple[str, ...]
    """What is observed unless something else is chosen."""
    action_key: str
    arrays: Mapping[str, str | None]
    """Every array of one row a step, and why it cannot be used; None where it can."""
    episodes: Callable[[Sequence[str]], Iterable[Demonstration]]
    """Reads these arrays of every episode, one after the other, as they are asked for."""
    left_out: Mapping[str, str] = {}
    """What else the file holds, such as videos, and why it is not carried over."""
    remarks: tuple[str, ...] = ()
    """What else a user should hear."""


class Source(NamedTuple):
    """What is copied of a dataset of any format."""

    attributes: dict[str, Any]
    """Attributes of the store that it is or becomes: JSON."""
    modes: tuple[str, ...]
    observation_keys: tuple[str, ...]
    action_key: str
    episodes: Iterable[Demonstration]
    """Checked one after the other, as they are asked for."""
    left_out: dict[str, str]
    """What is not copied, by its name in the file, and why. More may come while episodes are read."""
    remarks: tuple[str, ...]
    without: Callable[[str, str], "Source"]
    """The same, from its beginning, without an array of the file that has been found useless, and why."""

    @property
    def told(self) -> tuple[str, ...]:
        """Its remarks, and what is left out, once the episodes are read."""
        return (*self.remarks, *(f"left out {name}: {why}" for name, why in self.left_out.items()))


class Unusable(StoreError):
    """Rows of an array that no store can hold were found while they were read."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key!r} cannot be used: {why}")
        self.key = key
        """In the file."""
        self.why = why


class Format(NamedTuple):
    """One way to keep demonstrations on disk. Each is the constant FORMAT of its module."""

    description: str
    suffixes: tuple[str, ...]
    """Endings of a file or folder to write that mean this format."""
    detect: Callable[[Path], bool]
    """Whether what lies at an existing path looks like it."""
    read: Callable[[Any], Contents]
    """Path or URL → contents; raises StoreError, or whatever its library raises."""
    write: Callable[[Source, Path], None] | None = None
    """Write all of a source at a path where nothing lies; None for a format that is only read."""
    hdf5_layout: str | None = None
    """What in an HDF5 file means this format; None where it is none of HDF5."""


def header(source: Source) -> dict[str, Any]:
    """What another format's own fields have no room for: JSON that our reader finds beside them. The embeddings of
    instructions are left out, which is noted in `left_out`."""
    attributes = {name: value for name, value in source.attributes.items() if name != "instruction_embedding"}
    if len(attributes) < len(source.attributes):
        why = "this format keeps the texts alone; dataset instruct with an --instruction-encoder computes them anew"
        source.left_out["the embeddings of instructions"] = why
    return {
        "attributes": attributes,
        "modes": list(source.modes),
        "observation_keys": list(source.observation_keys),
        "action_key": source.action_key,
    }


def from_header(
    head: Any,
    arrays: Mapping[str, str | None],
    episodes: Callable[[Sequence[str]], Iterable[Demonstration]],
    left_out: Mapping[str, str],
) -> Contents:
    """The contents of a file that we wrote, whose `header` this is; raises StoreError where it is none."""
    try:
        keys, modes = tuple(map(str, head["observation_keys"])), tuple(map(str, head["modes"]))
        if not all(isinstance(head[name], list) for name in ("observation_keys", "modes")):
            raise TypeError("observation_keys and modes are no lists")
        return Contents(dict(head["attributes"]), modes, keys, str(head["action_key"]), arrays, episodes, left_out)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"what we wrote beside the data is damaged: {type(error).__name__}: {error}") from error


def foreign(
    attributes: Mapping[str, Any],
    observation_keys: Iterable[str],
    arrays: Mapping[str, str | None],
    episodes: Callable[[Sequence[str]], Iterable[Demonstration]],
    left_out: Mapping[str, str],
    *,
    remarks: tuple[str, ...] = (),
) -> Contents:
    """The contents of a file that another tool wrote: no modes, and the action is called `action`."""
    keys = tuple(observation_keys)
    named = {**attributes, "observation_keys": list(keys), "action_key": "action"}
    return Contents(named, (), keys, "action", arrays, episodes, left_out, remarks)

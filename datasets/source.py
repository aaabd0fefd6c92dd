"""What a dataset of any format is while it is copied: what a reader finds in it, and what a writer is given of that.

Also what all readers of strangers' files need: libraries that may be absent, sizes that are sane, errors of one line.
Knows arrays and files. Knows no format.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_policy.basics.files import FileError
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import Demonstration

EPISODE_BYTES = 2**28
"""An episode may always have so many bytes when it is unpacked ..."""
TIMES_STORED = 8
"""... and so many times the bytes of the files that hold all of them."""
MOST_COMPRESSED = 1100
"""No filter makes numbers much smaller than that."""


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


class Unusable(StoreError):
    """Rows of an array that no store can hold were found while they were read."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key!r} cannot be used: {why}")
        self.key = key
        """In the file."""
        self.why = why


# For readers and writers of formats


def library(name: str, what: str) -> Any:
    """Import a library that a format needs; raises StoreError where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = "pip install 'diffusion-policy-toolkit[formats]'"
        raise StoreError(f"{what} need {name.split('.')[0]}: {hint} ({error})") from error


def header(source: Source) -> dict[str, Any]:
    """What another format's own fields have no room for: JSON that our reader finds beside them."""
    return {
        "attributes": source.attributes,
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
    remarks: tuple[str, ...] = (),
) -> Contents:
    """The contents of a file that another tool wrote: no modes, and the action is called `action`."""
    keys = tuple(observation_keys)
    named = {**attributes, "observation_keys": list(keys), "action_key": "action"}
    return Contents(named, (), keys, "action", arrays, episodes, left_out, remarks)


def check_sizes(row_bytes: int, lengths: Iterable[int], *paths: Path) -> None:
    """Raise StoreError where an episode, or all of them together, would unpack into more than files of these sizes
    reasonably hold."""
    lengths = [*lengths]
    largest = row_bytes * max(lengths, default=0)
    if largest > most_bytes(*paths):
        raise StoreError(
            f"an episode is too large: {say_too_large(largest, *paths)}; choose fewer arrays (--observation)"
        )
    if row_bytes * sum(lengths) > EPISODE_BYTES + MOST_COMPRESSED * sum(map(stored_bytes, paths)):
        raise StoreError(f"its rows would be {row_bytes * sum(lengths) / 1e9:.1f} GB, more than files of its size hold")


def most_bytes(*paths: Path) -> int:
    """Bytes that an episode of these files may unpack into."""
    return max(EPISODE_BYTES, TIMES_STORED * sum(map(stored_bytes, paths)))


def stored_bytes(path: Path) -> int:
    """Bytes of a file that take room on the disk: a sparse file has fewer than it says."""
    found = path.stat()
    blocks = getattr(found, "st_blocks", 0) * 512
    return min(found.st_size, blocks) if blocks else found.st_size


def say_too_large(size: int, *paths: Path) -> str:
    """Why an array or an episode of these files is not read."""
    return f"it unpacks into {size / 2**20:.0f} MB; at most {most_bytes(*paths) / 2**20:.0f} are read of an episode"


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
    """Turn a FileError into a StoreError."""
    try:
        yield
    except FileError as error:
        raise StoreError(str(error)) from error


@contextlib.contextmanager
def store_errors(location: str | Path, description: str) -> Iterator[None]:
    """Turn whatever a library raises about a damaged or foreign file into a StoreError of one line that names it."""
    try:
        with file_errors():
            yield
    except Unusable:
        raise
    except StoreError as error:
        if str(location) in str(error):
            raise
        raise StoreError(f"{location}: {error}") from error
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise StoreError(f"{location} cannot be read as {description}: {said[0][:500]}") from error

"""Other tools' data sets ↔ the store: what a format is, which formats there are, and `convert`.

Every format is read as the same thing, `Contents`: the arrays that are there, by name, and why one cannot be used. Of
them is chosen here, once for all formats, what a copy takes, a `Source`: what cannot be used is left out and named, and
so is what holds NaN or infinity, unless it was asked for. A format that can be written has a function that writes a
`Source`. Reader and writer are in a module of the format's own, which is imported when it is used.

In the copy an array has the name that `join_names` gives it, and one number a step is a row (1,).
Nothing is ever unpickled.

Knows names, arrays and files. Knows no environment and no policy.
"""

import contextlib
import importlib
import itertools
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.datasets.durable import make_parents, sync_tree, unfinished_path
from diffusion_policy.datasets.storage import KEY, StoreError
from diffusion_policy.datasets.store import Demonstration, EpisodeStore, nonfinite_rows
from diffusion_policy.files import FileError, refuse_irregular, sync_folder
from diffusion_policy.names import join_names

APPEND_BYTES = 2**26
"""About so many bytes of episodes are held before they are appended to a store."""
EPISODE_BYTES = 2**28
"""An episode may always have so many bytes when it is unpacked ..."""
TIMES_STORED = 8
"""... and so many times the bytes of the files that hold all of them."""
MOST_COMPRESSED = 1100
"""No filter makes numbers much smaller than that."""
MOST_NAMED = 20
"""So many names stand in a message."""


class Contents(NamedTuple):
    """What a reader finds in a data set, before anything is chosen of it. Names are those of the file; those of nested
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
    """What is copied of a data set of any format."""

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


class Format(NamedTuple):
    """One way to keep demonstrations on disk."""

    description: str
    suffixes: tuple[str, ...]
    """Endings of a file or folder to write that mean this format."""
    detect: Callable[[Path], bool]
    """Whether what lies at an existing path looks like it."""
    read: Callable[[Any], Contents]
    """Path or URL → contents; raises StoreError, or whatever its library raises."""
    write: Callable[[Source, Path], None] | None
    """Write all of a source at a path where nothing lies; None for a format that is only read."""


class Unusable(StoreError):
    """Rows of an array that no store can hold were found while they were read."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key!r} cannot be used: {why}")
        self.key = key
        """In the file."""
        self.why = why


def convert(
    source: str | Path,
    target: Path,
    source_format: str | None = None,
    target_format: str | None = None,
    on_episode: Callable[[Demonstration], None] = lambda _: None,
    *,
    observation: Sequence[str] = (),
    action: Sequence[str] = (),
) -> int:
    """Copy a data set into another format; returns the number of episodes. Raises StoreError when the source cannot be
    read, or something lies at the target.

    Formats are told from the source's content and the target's suffix, unless they are named. `observation` and
    `action` are as `read` has them. The target appears whole or not at all. `read` also says what the copy leaves out.
    """
    return write(read(source, source_format, observation, action), target, target_format, on_episode)


def read(
    location: str | Path, name: str | None = None, observation: Sequence[str] = (), action: Sequence[str] = ()
) -> Source:
    """Open a data set of any format, its episodes checked as they are read; raises StoreError.

    `observation` names the arrays that are observed; then no others are read but the action. `action` names the array
    of actions, or several, whose columns are joined into one. What is named must be usable.
    """
    name = name or detect(location)
    form = _format(name)
    with _store_errors(location, form):
        if "://" not in str(location) and not Path(location).is_dir():
            refuse_irregular(location)
        contents = form.read(location if "://" in str(location) else Path(location))
        return _choose(contents, tuple(observation), tuple(action), {}, location, form)


def write(
    source: Source,
    target: Path,
    name: str | None = None,
    on_episode: Callable[[Demonstration], None] = lambda _: None,
) -> int:
    """Write a source in a format; returns the number of episodes. `on_episode` hears each as it is read. Where an array
    that nobody asked for turns out useless, all begins anew without it."""
    target = Path(target).absolute()
    form = _format(name or _name_of_suffix(target))
    if form.write is None:
        raise StoreError(f"{form.description} is only read; formats that are written are {', '.join(_written())}")
    while True:
        try:
            return _write_once(source, target, form.write, on_episode)
        except Unusable as error:
            smaller = source.without(error.key, error.why)
            named = {key: smaller.attributes.get(key) for key in ("observation_keys", "action_key")}
            attributes = source.attributes | {key: value for key, value in named.items() if value is not None}
            keys = {*smaller.observation_keys, smaller.action_key}
            source = smaller._replace(attributes=_with_angles_of(attributes, {key: key for key in keys}))


def _write_once(
    source: Source,
    target: Path,
    write_all: Callable[[Source, Path], None],
    on_episode: Callable[[Demonstration], None],
) -> int:
    count = 0

    def counted() -> Generator[Demonstration]:
        nonlocal count
        for episode in source.episodes:
            count += 1
            on_episode(episode)
            yield episode

    with _whole(target) as unfinished, contextlib.closing(counted()) as episodes:
        write_all(source._replace(episodes=episodes), unfinished)
        if count == 0:
            raise StoreError("the source holds no episodes")
    return count


def detect(location: str | Path) -> str:
    """Name of the format of what lies at a path or URL; raises StoreError."""
    if "://" in str(location):
        return "zarr"
    path = Path(location)
    if not path.exists():
        raise StoreError(f"no data set at {location}: there is no such file or folder")
    if not path.is_dir():
        with _file_errors():
            refuse_irregular(path)
    for name, form in FORMATS.items():
        with contextlib.suppress(OSError, FileError):
            if form.detect(path):
                return name
    raise StoreError(f"{location} is of no known format; known are {_known()}")


# For readers and writers of formats


def library(name: str, what: str) -> Any:
    """Import a library that a format needs; raises StoreError where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = "pip install 'diffusion-policy-toolkit[formats]'"
        raise StoreError(f"{what} need {name.split('.')[0]}: {hint} ({error})") from error


def place(data: dict[str, Any], key: str, rows: Any) -> None:
    """Add one key to those of an episode; raises StoreError where two arrays of a file would get the same name."""
    if key in data:
        raise StoreError(f"two arrays would both be called {key!r}; rename one of them")
    data[key] = rows


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


# What is chosen


class _Choice(NamedTuple):
    """What a copy takes of the contents, in their own names."""

    names: dict[str, str]
    """Every array that is read, and its name in the copy."""
    observed: tuple[str, ...]
    action: tuple[str, ...]
    """Several are joined."""
    action_name: str
    kept: tuple[str, ...]
    """Arrays that are copied as they are."""
    asked: frozenset[str]
    """What must be usable."""


def _choose(
    contents: Contents,
    observation: tuple[str, ...],
    action: tuple[str, ...],
    left_out: dict[str, str],
    location: str | Path,
    form: Format,
) -> Source:
    """What is taken of a data set; `left_out` gets what is not, and may name arrays that have been found useless."""
    useless = {name: why for name, why in contents.arrays.items() if why is not None} | left_out
    names = _allowed_names(contents.arrays, useless)
    left_out |= {**contents.left_out, **useless}

    def find(name: str) -> str:
        found = name if name in contents.arrays else next((raw for raw in names if names[raw] == name), None)
        if found is None:
            hint = "" if observation or action else "; name the actions with --action"
            raise StoreError(f"there is no {name}; there is {_list(contents.arrays)}{hint}")
        if found in useless:
            raise StoreError(f"{name} cannot be used: {useless[found]}")
        return found

    def without(key: str, why: str) -> Source:
        left_out[key] = why
        return _choose(contents, observation, action, left_out, location, form)

    known = {*contents.arrays, *names.values()}
    parts = [
        part for name in action or (contents.action_key,) for part in ([name] if name in known else name.split("+"))
    ]
    done = tuple(dict.fromkeys(find(part) for part in parts))
    observed = tuple(dict.fromkeys(map(find, observation)))
    if not observation:
        left_out |= {name: "it is not there" for name in contents.observation_keys if name not in contents.arrays}
        observed = tuple(name for name in contents.observation_keys if name in names and name not in done)
    if not observed:
        why = "; ".join(f"{name}: {useless[name]}" for name in contents.observation_keys if name in useless)
        hint = f"name some with --observation of: {_list({*names} - {*done})}"
        raise StoreError("; ".join([f"there is nothing to observe{f' ({why})' if why else ''}", *contents.remarks, hint]))
    choice = _combine(names, observed, done, bool(observation), left_out, frozenset({*map(find, observation), *done}))
    chosen = _attributes(contents.attributes, choice, bool(observation or action))
    return Source(
        chosen,
        contents.modes,
        tuple(choice.names[name] for name in observed),
        choice.action_name,
        _checked(contents, choice, location, form),
        left_out,
        (*contents.remarks, *_remarks(choice)),
        without,
    )


def _combine(
    names: dict[str, str],
    observed: tuple[str, ...],
    done: tuple[str, ...],
    only: bool,
    left_out: dict[str, str],
    asked: frozenset[str],
) -> _Choice:
    """Which arrays are copied, and which are joined into the action. `only`: nothing but what was named."""
    first, *others = done
    joined = bool(others) or first in observed
    action_name = "action" if joined else names[first]
    kept = {*observed} if only else {*names}
    kept |= set() if joined else {*done}
    same = next((name for name in kept if joined and names[name] == "action"), None)
    if same in observed:
        raise StoreError(f"{same} cannot be both observed and the action, or a part of it; rename it")
    if same is not None:
        kept.remove(same)
        left_out[same] = f"the action, {' and '.join(done)}, takes its name"
    return _Choice(
        {name: names[name] for name in sorted(kept | {*done})}, observed, done, action_name, tuple(sorted(kept)), asked
    )


def _allowed_names(arrays: Iterable[str], useless: dict[str, str]) -> dict[str, str]:
    """The name in a store of every array that can be used; others join the useless ones."""
    names: dict[str, str] = {}
    for raw in sorted({*arrays} - useless.keys(), key=lambda raw: (raw != join_names([raw]), raw)):
        name = join_names([raw])
        if not KEY.fullmatch(name):
            useless[raw] = "a store has no arrays of such a name: it begins with a letter, digit or '_'"
        elif name in names.values():
            useless[raw] = f"another array is called {name}, which is its name in a store"
        else:
            names[raw] = name
    return names


def _attributes(attributes: dict[str, Any], choice: _Choice, named: bool) -> dict[str, Any]:
    """Attributes that say of a copy which arrays are observed and done. Where that goes without saying (a store of
    another tool of which all is taken) it is not said."""
    keys = [choice.names[name] for name in choice.observed]
    plain = choice.action_name == "action" and {*choice.kept} - {*choice.action} == {*choice.observed}
    said = {**attributes}
    if named or not plain or {"observation_keys", "action_key"} & attributes.keys():
        said |= {"observation_keys": keys, "action_key": choice.action_name}
    names = {name: choice.names[name] for name in choice.kept}
    return _with_angles_of(said, names)


def _with_angles_of(attributes: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Attributes whose angles are those of these arrays alone, under the names given."""
    angles = attributes.get("angles")
    if not isinstance(angles, dict):
        return attributes
    return attributes | {"angles": {names[key]: columns for key, columns in angles.items() if key in names}}


def _remarks(choice: _Choice) -> Iterator[str]:
    renamed = [f"{name} -> {choice.names[name]}" for name in choice.names if choice.names[name] != name]
    if renamed:
        yield f"renamed: {', '.join(renamed)}"
    if len(choice.action) > 1:
        yield f"action: the columns of {', '.join(choice.action)}"


def _list(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:MOST_NAMED]) + (" ..." if len(listed) > MOST_NAMED else "") or "nothing"


# What is checked of every source


def _checked(contents: Contents, choice: _Choice, location: str | Path, form: Format) -> Iterator[Demonstration]:
    """The episodes of a source, each checked; arrays in the machine's byte order. Raises StoreError."""
    layouts: dict[str, tuple[Any, ...]] = {}
    with _store_errors(location, form):
        episodes = iter(contents.episodes(tuple(choice.names)))
    for i in itertools.count():
        with _store_errors(location, form):
            try:
                episode = next(episodes, None)
                if episode is None:
                    return
                episode = _check_episode(contents, choice, episode, layouts)
            except Unusable as error:
                if error.key in choice.asked:
                    raise StoreError(f"episode {i}: {error}") from error
                raise
            except StoreError as error:
                raise StoreError(f"episode {i}: {error}") from error
        yield episode


def _check_episode(
    contents: Contents, choice: _Choice, episode: Demonstration, layouts: dict[str, tuple[Any, ...]]
) -> Demonstration:
    first = episode.data.get(choice.action[0])
    steps = len(first) if isinstance(first, np.ndarray) and first.ndim else 0
    if steps == 0:
        raise StoreError(f"{choice.action[0]!r} has no rows")
    if episode.mode is not None and episode.mode not in contents.modes:
        raise StoreError(f"has the mode {episode.mode!r}; known are {', '.join(contents.modes) or 'none'}")
    data = {name: _check_rows(name, episode.data.get(name), steps, layouts) for name in choice.names}
    copied = {choice.names[name]: data[name] for name in choice.kept}
    if choice.action_name not in copied:
        copied[choice.action_name] = np.concatenate([data[name].reshape(steps, -1) for name in choice.action], axis=1)
    final = {}
    for name, row in (episode.final or {}).items():
        if name in choice.observed:
            final[choice.names[name]] = _check_rows(name, np.asarray(row)[None], 1, layouts, "the final observation ")[
                0
            ]
    return episode._replace(data=copied, final=final or None)


def _check_rows(name: str, rows: Any, steps: int, layouts: dict[str, tuple[Any, ...]], what: str = "it ") -> np.ndarray:
    """Rows of numbers as a store holds them; raises Unusable."""
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "biuf" or rows.dtype.itemsize > 8:
        raise Unusable(name, f"{what}must hold numbers; got {getattr(rows, 'dtype', 'nothing')}")
    if rows.ndim == 0 or len(rows) != steps:
        raise Unusable(name, f"{what}has {len(rows) if rows.ndim else 'no'} rows; the actions have {steps}")
    if rows.size == 0:
        raise Unusable(name, f"{what}has rows without numbers")
    rows = rows.astype(rows.dtype.newbyteorder("="), copy=False).reshape(steps, *(rows.shape[1:] or (1,)))
    layout = layouts.setdefault(name, (rows.shape[1:], rows.dtype))
    if layout != (rows.shape[1:], rows.dtype):
        raise Unusable(name, f"{what}must stay {layout[0]} of {layout[1]}; got {rows.shape[1:]} of {rows.dtype}")
    bad = nonfinite_rows(rows)
    if len(bad):
        raise Unusable(name, f"{what}has NaN or infinity in {len(bad)} of {steps} rows of an episode")
    return rows


@contextlib.contextmanager
def _file_errors() -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise StoreError(str(error)) from error


@contextlib.contextmanager
def _store_errors(location: str | Path, form: Format) -> Iterator[None]:
    """Turn whatever a library raises about a damaged or foreign file into a StoreError of one line that names it."""
    try:
        with _file_errors():
            yield
    except Unusable:
        raise
    except StoreError as error:
        if str(location) in str(error):
            raise
        raise StoreError(f"{location}: {error}") from error
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise StoreError(f"{location} cannot be read as {form.description}: {said[0][:500]}") from error


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path of the target's name in a new folder beside it. What lies there in the end becomes the target; after an
    error or an interrupt, nothing does."""
    _refuse_existing(target)
    make_parents(target)
    folder = unfinished_path(target)
    try:
        folder.mkdir()
        yield folder / target.name
        sync_tree(folder / target.name)
        _refuse_existing(target)
        (folder / target.name).rename(target)
        sync_folder(target.parent)
    except Unusable:
        raise
    except StoreError as error:
        raise StoreError(str(error).replace(str(folder / target.name), str(target))) from error
    except OSError as error:
        said = str(error).replace(str(folder / target.name), str(target))
        raise StoreError(f"{target} cannot be written: {said}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise StoreError(f"{target} already exists; choose another output or delete it first")


# The store itself


def _read_store(location: str | Path) -> Contents:
    store = EpisodeStore.open(location)
    written_anew = {"format", "format_version", "modes"}
    attributes = {name: value for name, value in store.attributes.items() if name not in written_anew}
    arrays = dict.fromkeys(store.keys) | store.left_out
    remarks = store.unread()

    def episodes(keys: Sequence[str]) -> Iterator[Demonstration]:
        try:
            yield from store.episodes(keys=keys)
        except StoreError:
            for key in keys:  # which of them is it?
                try:
                    for _ in store.blocks(key):
                        pass
                except StoreError as error:
                    said = str(error).removeprefix(f"{store.location}: ").removeprefix(f"data/{key} ")
                    raise Unusable(key, said.partition("; name the keys")[0]) from error
            raise

    return Contents(
        attributes, store.modes, store.observation_keys, store.action_key, arrays, episodes, {}, tuple(remarks)
    )


def _write_store(source: Source, path: Path) -> None:
    folder = path.with_name("store.zarr") if path.suffix == ".zip" else path
    with EpisodeStore.create(folder, source.attributes, source.modes, sync=False) as store:  # all is, in the end
        held: list[Demonstration] = []
        held_bytes = 0
        for episode in source.episodes:
            held.append(episode)
            held_bytes += sum(rows.nbytes for rows in episode.data.values())
            if held_bytes >= APPEND_BYTES:
                store.append(held)
                held, held_bytes = [], 0
        store.append(held)
    if folder != path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(folder).as_posix())


# Which formats there are


def _in_module(module: str, function: str) -> Callable[..., Any]:
    """A function of a format's module, which is imported when it is called."""
    return lambda *arguments: getattr(importlib.import_module(f"diffusion_policy.datasets.{module}"), function)(
        *arguments
    )


def _is_zarr(path: Path) -> bool:
    if path.is_dir():
        return (path / "zarr.json").exists() or (path / ".zgroup").exists()
    return bool({"zarr.json", ".zgroup"} & {name.rpartition("/")[2] for name in _names_in_zip(path)})


def _is_hdf5(layout: str) -> Callable[[Path], bool]:
    """Whether a file is HDF5 and its groups are those of a layout."""

    def detect(path: Path) -> bool:
        return (
            path.is_file() and _starts_with(path, b"\x89HDF\r\n\x1a\n") and _in_module("hdf5", "layout")(path) == layout
        )

    return detect


def _is_aloha(path: Path) -> bool:
    if not path.is_dir():
        return _is_hdf5("aloha")(path)
    with os.scandir(path) as entries:
        return any(re.fullmatch(r"episode_\d+\.hdf5", entry.name) for entry in itertools.islice(entries, 10**5))


def _is_lerobot(path: Path) -> bool:
    return (path / "meta" / "info.json").is_file()


def _is_minari(path: Path) -> bool:
    return (path / "data" / "metadata.json").is_file()


def _is_npz(path: Path) -> bool:
    return any(name.endswith(".npy") for name in _names_in_zip(path))


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _names_in_zip(path: Path) -> list[str]:
    return _in_module("npz", "names_in_zip")(path) if path.is_file() and _starts_with(path, b"PK") else []


FORMATS: dict[str, Format] = {
    "zarr": Format("zarr store", (".zarr", ".zarr.zip"), _is_zarr, _read_store, _write_store),
    "robomimic": Format(
        "robomimic HDF5",
        (".hdf5", ".h5"),
        _is_hdf5("robomimic"),
        _in_module("robomimic", "read"),
        _in_module("robomimic", "write"),
    ),
    "lerobot": Format(
        "LeRobotDataset v3", (".lerobot",), _is_lerobot, _in_module("lerobot", "read"), _in_module("lerobot", "write")
    ),
    "minari": Format(
        "Minari data set", (".minari",), _is_minari, _in_module("minari", "read"), _in_module("minari", "write")
    ),
    "npz": Format("npz archive", (".npz",), _is_npz, _in_module("npz", "read"), _in_module("npz", "write")),
    "aloha": Format("ALOHA or ACT HDF5, a folder of episodes", (), _is_aloha, _in_module("aloha", "read"), None),
    "maniskill": Format("ManiSkill HDF5", (), _is_hdf5("maniskill"), _in_module("maniskill", "read"), None),
    "d4rl": Format("flat HDF5 as of D4RL", (), _is_hdf5("d4rl"), _in_module("d4rl", "read"), None),
}
"""By the name that a user gives."""


def _written() -> list[str]:
    return [name for name, form in FORMATS.items() if form.write is not None]


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise StoreError(f"unknown format {name!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def _name_of_suffix(target: Path) -> str:
    for name, form in FORMATS.items():
        if form.suffixes and target.name.endswith(form.suffixes):
            return name
    raise StoreError(f"the format of {target} cannot be told from its name; name one of {', '.join(_written())}")


def _known() -> str:
    return ", ".join(f"{name} ({form.description})" for name, form in FORMATS.items())

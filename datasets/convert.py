"""Other tools' data sets ↔ the store: what a format is, which formats there are, and `convert`.

Every format is read as the same thing, a `Source`, and written from one; so each needs one reader and one writer, in a
module of its own that is imported when it is used. What a reader hands on is checked here, once for all: names that are
safe as names of files, rows that are numbers and as many for each key. Nothing is ever unpickled.

Knows names, arrays and files. Knows no environment and no policy.
"""

import contextlib
import importlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.datasets.storage import KEY, StoreError
from diffusion_policy.datasets.store import Demonstration, EpisodeStore

APPEND_BYTES = 2**26
"""About so many bytes of episodes are held before they are appended to a store."""


class Source(NamedTuple):
    """A data set of any format, as it is read."""

    attributes: dict[str, Any]
    """Attributes of the store that it is or becomes: JSON."""
    modes: tuple[str, ...]
    observation_keys: tuple[str, ...]
    action_key: str
    episodes: Iterable[Demonstration]
    """Read one after the other, as they are asked for."""
    left_out: tuple[str, ...] = ()
    """What the file holds that is not carried over, such as videos, in the file's own names."""


class Format(NamedTuple):
    """One way to keep demonstrations on disk."""

    description: str
    suffixes: tuple[str, ...]
    """Endings of a file or folder to write that mean this format."""
    detect: Callable[[Path], bool]
    """Whether what lies at an existing path looks like it; opens no library."""
    read: Callable[[Any], Source]
    """Path or URL → source; raises StoreError, or whatever its library raises."""
    write: Callable[[Source, Path], None]
    """Write all of a source at a path where nothing lies."""


def convert(
    source: str | Path,
    target: Path,
    source_format: str | None = None,
    target_format: str | None = None,
    on_episode: Callable[[Demonstration], None] = lambda _: None,
) -> int:
    """Copy a data set into another format; returns the number of episodes. Raises StoreError when the source cannot be
    read, or something lies at the target.

    Formats are told from the source's content and the target's suffix, unless they are named. The target appears whole
    or not at all. `read` also says what the copy leaves out.
    """
    return write(read(source, source_format), target, target_format, on_episode)


def read(
    location: str | Path, name: str | None = None, choose: Callable[[Source], Source] = lambda source: source
) -> Source:
    """Open a data set of any format, its episodes checked as they are read; raises StoreError. `choose` may name other
    keys as observed and as the action."""
    name = name or detect(location)
    with _store_errors(location, _format(name)):
        source = choose(_format(name).read(location if "://" in str(location) else Path(location)))
        _check_names({*source.observation_keys, source.action_key})
        return source._replace(episodes=_checked(source, location, _format(name)))


def write(
    source: Source,
    target: Path,
    name: str | None = None,
    on_episode: Callable[[Demonstration], None] = lambda _: None,
) -> int:
    """Write a source in a format; returns the number of episodes. `on_episode` hears each as it is read."""
    target = Path(target).absolute()
    count = 0

    def counted() -> Generator[Demonstration]:
        nonlocal count
        for episode in source.episodes:
            count += 1
            on_episode(episode)
            yield episode

    form = _format(name or _name_of_suffix(target))
    with _whole(target) as unfinished, contextlib.closing(counted()) as episodes:
        form.write(source._replace(episodes=episodes), unfinished)
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
    for name, form in FORMATS.items():
        with contextlib.suppress(OSError):
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


def from_header(head: Mapping[str, Any], episodes: Iterable[Demonstration], left_out: Iterable[str] = ()) -> Source:
    """The source whose `header` this is."""
    keys = tuple(map(str, head["observation_keys"]))
    modes = tuple(map(str, head["modes"]))
    return Source(dict(head["attributes"]), modes, keys, str(head["action_key"]), episodes, tuple(left_out))


def foreign(
    attributes: Mapping[str, Any],
    observation_keys: Iterable[str],
    episodes: Iterable[Demonstration],
    left_out: Iterable[str] = (),
) -> Source:
    """A source of a file that another tool wrote: no modes, and the action is called `action`."""
    keys = tuple(observation_keys)
    named = {**attributes, "observation_keys": list(keys), "action_key": "action"}
    return Source(named, (), keys, "action", episodes, tuple(left_out))


# What is checked of every source


def _checked(source: Source, location: str | Path, form: Format) -> Iterator[Demonstration]:
    """The episodes of a source, each checked; arrays in the machine's byte order. Raises StoreError."""
    keys: set[str] = set()
    episodes = iter(source.episodes)
    for i in range(2**62):
        with _store_errors(location, form):
            episode = next(episodes, None)
            if episode is None:
                return
            try:
                keys = keys or _check_names({*episode.data})
                episode = _check_episode(source, episode, keys)
            except StoreError as error:
                raise StoreError(f"episode {i}: {error}") from error
        yield episode


def _check_names(keys: set[str]) -> set[str]:
    """Raise StoreError unless the keys are safe as names of files."""
    for key in sorted(keys):
        if not KEY.fullmatch(key):
            raise StoreError(f"key {key!r} is no name of an array; allowed are letters, digits, '_', '-' and '.'")
    return keys


def _check_episode(source: Source, episode: Demonstration, keys: set[str]) -> Demonstration:
    if episode.data.keys() != keys:
        raise StoreError(f"has {', '.join(sorted(episode.data))}; the first has {', '.join(sorted(keys))}")
    lacking = {*source.observation_keys, source.action_key} - keys
    if lacking:
        raise StoreError(f"there is no {', '.join(sorted(lacking))}; there is {', '.join(sorted(keys))}")
    data = {key: _numbers(key, rows) for key, rows in episode.data.items()}
    lengths = {key: len(rows) if rows.ndim else 0 for key, rows in data.items()}
    steps = lengths[source.action_key]
    for key, length in lengths.items():
        if length != steps or steps == 0 or data[key].size == 0:
            raise StoreError(f"{key!r} has {length} rows; {source.action_key!r} has {steps}, and none may be empty")
    if episode.mode is not None and episode.mode not in source.modes:
        raise StoreError(f"has the mode {episode.mode!r}; known are {', '.join(source.modes) or 'none'}")
    final = episode.final or {}
    for key, rows in final.items():
        if key not in source.observation_keys or (rows.shape, rows.dtype.kind) != (
            data[key].shape[1:],
            data[key].dtype.kind,
        ):
            raise StoreError(f"the final observation {key!r} must be like a row of an observed key; got {rows.shape}")
    final = {key: _numbers(key, rows) for key, rows in final.items()} or None
    return episode._replace(data=data, final=final)


def _numbers(key: str, rows: Any) -> np.ndarray:
    if not isinstance(rows, np.ndarray | np.generic) or rows.dtype.kind not in "biuf" or rows.dtype.itemsize > 8:
        raise StoreError(f"{key!r} must hold numbers; got {getattr(rows, 'dtype', type(rows).__name__)}")
    rows = np.asarray(rows)
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


@contextlib.contextmanager
def _store_errors(location: str | Path, form: Format) -> Iterator[None]:
    """Turn whatever a library raises about a damaged or foreign file into a StoreError of one line that names it."""
    try:
        yield
    except StoreError as error:
        if str(location) in str(error):
            raise
        raise StoreError(f"{location}: {error}") from error
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise StoreError(f"{location} cannot be read as {form.description}: {said[0]}") from error


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path of the target's name in a new folder beside it. What lies there in the end becomes the target; after an
    error or an interrupt, nothing does."""
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder / target.name
        _refuse_existing(target)
        (folder / target.name).rename(target)
    except StoreError as error:
        raise StoreError(str(error).replace(str(folder / target.name), str(target))) from error
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise StoreError(f"{target} already exists; choose another output or delete it first")


# The store itself


def _read_store(location: str | Path) -> Source:
    store = EpisodeStore.open(location)
    written_anew = {"format", "format_version", "modes"}
    attributes = {name: value for name, value in store.attributes.items() if name not in written_anew}
    return Source(attributes, store.modes, store.observation_keys, store.action_key, store.episodes())


def _write_store(source: Source, path: Path) -> None:
    folder = path.with_name("store.zarr") if path.suffix == ".zip" else path
    with EpisodeStore.create(folder, source.attributes, source.modes) as store:
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


def _is_hdf5(path: Path) -> bool:
    return path.is_file() and _starts_with(path, b"\x89HDF\r\n\x1a\n")


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
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


FORMATS: dict[str, Format] = {
    "zarr": Format("zarr store", (".zarr", ".zarr.zip"), _is_zarr, _read_store, _write_store),
    "robomimic": Format(
        "robomimic HDF5", (".hdf5", ".h5"), _is_hdf5, _in_module("robomimic", "read"), _in_module("robomimic", "write")
    ),
    "lerobot": Format(
        "LeRobotDataset v3", (".lerobot",), _is_lerobot, _in_module("lerobot", "read"), _in_module("lerobot", "write")
    ),
    "minari": Format(
        "Minari data set", (".minari",), _is_minari, _in_module("minari", "read"), _in_module("minari", "write")
    ),
    "npz": Format("npz archive", (".npz",), _is_npz, _in_module("npz", "read"), _in_module("npz", "write")),
}
"""By the name that a user gives."""


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise StoreError(f"unknown format {name!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def _name_of_suffix(target: Path) -> str:
    for name, form in FORMATS.items():
        if target.name.endswith(form.suffixes):
            return name
    raise StoreError(f"the format of {target} cannot be told from its name; name one of {', '.join(FORMATS)}")


def _known() -> str:
    return ", ".join(f"{name} ({form.description})" for name, form in FORMATS.items())

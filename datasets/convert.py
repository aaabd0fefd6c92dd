"""Other tools' datasets ↔ the store: what a format is, which formats there are, and `convert`.

Every format is read as the same thing, `Contents`; of them is chosen, once for all, what a copy takes, a `Source`. A
format that can be written has a function that writes a `Source`. Reader and writer are in a module of the format's own.
Nothing is ever unpickled.

Knows files. Knows no environment and no policy.
"""

import contextlib
import itertools
import os
import shutil
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_policy.basics.files import FileError, refuse_irregular, sync_folder
from diffusion_policy.datasets.choice import choose, with_angles_of
from diffusion_policy.datasets.durable import make_parents, sync_tree, unfinished_path
from diffusion_policy.datasets.formats import aloha, d4rl, hdf5, lerobot, maniskill, minari, npz, robomimic
from diffusion_policy.datasets.source import Contents, Source, Unusable, file_errors, store_errors
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import Demonstration, EpisodeStore

APPEND_BYTES = 2**26
"""About so many bytes of episodes are held before they are appended to a store."""


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
    """Copy a dataset into another format; returns the number of episodes. Raises StoreError when the source cannot be
    read, or something lies at the target.

    Formats are told from the source's content and the target's suffix, unless they are named. `observation` and
    `action` are as `read` has them. The target appears whole or not at all. `read` also says what the copy leaves out.
    """
    return write(read(source, source_format, observation, action), target, target_format, on_episode)


def read(
    location: str | Path, name: str | None = None, observation: Sequence[str] = (), action: Sequence[str] = ()
) -> Source:
    """Open a dataset of any format, its episodes checked as they are read; raises StoreError.

    `observation` names the arrays that are observed; then no others are read but the action. `action` names the array
    of actions, or several, whose columns are joined into one. What is named must be usable.
    """
    name = name or detect(location)
    form = _format(name)
    with store_errors(location, form.description):
        if "://" not in str(location) and not Path(location).is_dir():
            refuse_irregular(location)
        contents = form.read(location if "://" in str(location) else Path(location))
        return choose(contents, tuple(observation), tuple(action), {}, location, form.description)


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
            source = smaller._replace(attributes=with_angles_of(attributes, {key: key for key in keys}))


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
        raise StoreError(f"no dataset at {location}: there is no such file or folder")
    if not path.is_dir():
        with file_errors():
            refuse_irregular(path)
    for name, form in FORMATS.items():
        with contextlib.suppress(OSError, FileError):
            if form.detect(path):
                return name
    raise StoreError(f"{location} is of no known format; known are {_known()}")


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path of the target's name in a new folder beside it. What lies there in the end becomes the target; after an
    error or an interrupt, nothing does."""
    refuse_existing(target)
    make_parents(target)
    folder = unfinished_path(target)
    try:
        folder.mkdir()
        yield folder / target.name
        sync_tree(folder / target.name)
        refuse_existing(target)
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


def refuse_existing(target: Path) -> None:
    """Raise StoreError where something lies at a target."""
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


def _is_zarr(path: Path) -> bool:
    if path.is_dir():
        return (path / "zarr.json").exists() or (path / ".zgroup").exists()
    return bool({"zarr.json", ".zgroup"} & {name.rpartition("/")[2] for name in _names_in_zip(path)})


def _is_hdf5(layout: str) -> Callable[[Path], bool]:
    """Whether a file is HDF5 and its groups are those of a layout."""

    def detect(path: Path) -> bool:
        return path.is_file() and _starts_with(path, b"\x89HDF\r\n\x1a\n") and hdf5.layout(path) == layout

    return detect


def _is_aloha(path: Path) -> bool:
    if not path.is_dir():
        return _is_hdf5("aloha")(path)
    with os.scandir(path) as entries:
        return any(aloha.NAME.fullmatch(entry.name) for entry in itertools.islice(entries, aloha.MOST_FILES))


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
    return npz.names_in_zip(path) if path.is_file() and _starts_with(path, b"PK") else []


FORMATS: dict[str, Format] = {
    "zarr": Format("zarr store", (".zarr", ".zarr.zip"), _is_zarr, _read_store, _write_store),
    "robomimic": Format("robomimic HDF5", (".hdf5", ".h5"), _is_hdf5("robomimic"), robomimic.read, robomimic.write),
    "lerobot": Format("LeRobotDataset v3", (".lerobot",), _is_lerobot, lerobot.read, lerobot.write),
    "minari": Format("Minari dataset", (".minari",), _is_minari, minari.read, minari.write),
    "npz": Format("npz archive", (".npz",), _is_npz, npz.read, npz.write),
    "aloha": Format("ALOHA or ACT HDF5, a folder of episodes", (), _is_aloha, aloha.read, None),
    "maniskill": Format("ManiSkill HDF5", (), _is_hdf5("maniskill"), maniskill.read, None),
    "d4rl": Format("flat HDF5 as of D4RL", (), _is_hdf5("d4rl"), d4rl.read, None),
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

"""Converts datasets between the store and other formats: `convert`, `read`, `write`, `detect`.

A format's reader returns `Contents`; `choice` selects from them what a copy takes, a `Source`; a format's writer takes
a `Source`. Nothing is ever unpickled.

Knows files. Knows no environment and no policy.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from diffusion_policy.basics.files import FileError, refuse_irregular, sync_folder
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.durable import make_parents, sync_tree, unfinished_path
from diffusion_policy.datasets.formats import FORMATS
from diffusion_policy.datasets.formats.choice import choose, with_angles_of
from diffusion_policy.datasets.formats.format import Format, Source, Unusable
from diffusion_policy.datasets.formats.hdf5 import refuse_layout
from diffusion_policy.datasets.formats.reading import file_errors, store_errors
from diffusion_policy.datasets.storage import StoreError


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
        return choose(contents, tuple(observation), tuple(action), {}, location=location, description=form.description)


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
    with contextlib.suppress(OSError, FileError):
        refuse_layout(path, [form.hdf5_layout for form in FORMATS.values() if form.hdf5_layout is not None])
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


# Which formats there are


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

"""The store ↔ source: a copy of the committed episodes, as a folder or in a zip.

Knows stores of episodes.
"""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Contents, Format, Source, Unusable
from diffusion_policy.datasets.formats.zips import names_in_zip
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore

APPEND_BYTES = 2**26
"""About so many bytes of episodes are held before they are appended to a store."""


def read(location: str | Path) -> Contents:
    """What is in a store; raises StoreError."""
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


def write(source: Source, path: Path) -> None:
    """Write a store as a folder, or in a zip where the path says so."""
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


def _detect(path: Path) -> bool:
    if path.is_dir():
        return (path / "zarr.json").exists() or (path / ".zgroup").exists()
    return bool({"zarr.json", ".zgroup"} & {name.rpartition("/")[2] for name in names_in_zip(path)})


FORMAT = Format("zarr store", (".zarr", ".zarr.zip"), _detect, read, write)

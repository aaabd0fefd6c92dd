"""Formats of datasets. Each is a module with the constant FORMAT; FORMATS lists them.

To add a format: write a module with `read(path) -> Contents`, with `write(source, path)` if it can be written, and with
FORMAT; add it to FORMATS here. `format` defines these types. `reading`, `hdf5`, `parquet` and `zips` open files of
unknown origin within bounds. `survey` finds what the episodes of an HDF5 file have in common. `choice` checks every
episode, whatever its format.
"""

from diffusion_policy.datasets.formats import aloha, d4rl, lerobot, maniskill, minari, npz, robomimic, zarr_store
from diffusion_policy.datasets.formats.format import Format

FORMATS: dict[str, Format] = {
    "zarr": zarr_store.FORMAT,
    "robomimic": robomimic.FORMAT,
    "lerobot": lerobot.FORMAT,
    "minari": minari.FORMAT,
    "npz": npz.FORMAT,
    "maniskill": maniskill.FORMAT,
    "aloha": aloha.FORMAT,
    "d4rl": d4rl.FORMAT,
    "lerobot-video": lerobot.VIDEO_FORMAT,
}
"""By the name that a user gives, in the order in which they are looked for."""

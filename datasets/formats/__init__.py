"""Formats in which demonstrations lie on disk, each a module of its own with the constant FORMAT.

To add a format: write a module with `read(path) -> Contents`, `write(source, path)` where it can be written, and
FORMAT; add it to FORMATS here. `format` says what these are, `reading`, `hdf5` and `zips` open files of strangers
within bounds, `survey` finds what the episodes of an HDF5 file have in common. What is checked of every episode is
checked in `choice`.
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
}
"""By the name that a user gives, in the order in which they are looked for."""

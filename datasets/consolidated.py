"""Consolidated metadata: a copy of all metadata of a group, made by other tools. It becomes stale where a writer does
not update it.

Knows zarr groups. Knows no episodes.
"""

from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from diffusion_policy.basics.files import parse_json
from diffusion_policy.datasets.storage import can_be_listed, list_names

COMPARED = ("node_type", "shape", "data_type", "dtype", "chunk_grid", "chunks", "attributes")
"""What a copy must say as the file does. What else there is, versions of zarr write differently."""


def consolidated_is_stale(group: zarr.Group) -> list[str]:
    """Paths within a group of which its consolidated copy of the metadata says something else than the files there, or
    nothing, or too much; none where there is no such copy, or where the place cannot be listed."""
    copied = _copies(group)
    if not copied or not can_be_listed(group):
        return []
    paths = {*copied, *(f"{folder}/{name}" for folder in ("data", "meta") for name in list_names(group, folder))}
    return sorted(path for path in paths if copied.get(path) != _stored(group, path))


def _copies(group: zarr.Group) -> dict[str, Any]:
    """What the consolidated copy says of each path within the group."""
    if group.metadata.zarr_format == 3:
        copied = _object(_object(_read_json(group, "zarr.json").get("consolidated_metadata")).get("metadata"))
        return {path: _compared(metadata) for path, metadata in copied.items()}
    copied: dict[str, Any] = {}
    for file, content in _object(_read_json(group, ".zmetadata").get("metadata")).items():
        path, _, name = file.rpartition("/")
        if path:
            copied.setdefault(path, {}).update(_named(name, _object(content)))
    return {path: _compared(metadata) for path, metadata in copied.items()}


def _stored(group: zarr.Group, path: str) -> Any:
    """What the files of a path say; None where there are none."""
    if group.metadata.zarr_format == 3:
        return _compared(_read_json(group, f"{path}/zarr.json")) or None
    metadata = {}
    for name in (".zarray", ".zgroup", ".zattrs"):
        metadata.update(_named(name, _read_json(group, f"{path}/{name}")))
    return _compared(metadata) or None


def _named(file: str, content: dict[str, Any]) -> dict[str, Any]:
    """A file of zarr v2 as part of what v3 has in one."""
    if file == ".zattrs":
        return {"attributes": content}
    return {"node_type": file, **content} if content else {}


def _compared(metadata: Any) -> Any:
    if not isinstance(metadata, dict):
        return metadata
    return {name: metadata[name] for name in COMPARED if metadata.get(name)}


def _read_json(group: zarr.Group, path: str) -> dict[str, Any]:
    try:
        content = sync(group.store.get(f"{group.path}/{path}".strip("/"), default_buffer_prototype()))
        tree = {} if content is None else parse_json(content.to_bytes())
    except (ValueError, OSError):  # what nobody can read says nothing
        return {}
    return _object(tree)


def _object(tree: Any) -> dict[str, Any]:
    """JSON that should be an object; an empty one where it is none."""
    return tree if isinstance(tree, dict) else {}

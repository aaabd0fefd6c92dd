"""diffusion-policy dataset inspect: what is in a dataset."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from diffusion_policy.basics.images import is_image
from diffusion_policy.commands.options.dataset import Inspect
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.datasets.frames import Frames
from diffusion_policy.datasets.guard import codec_names
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.evaluation.metrics import NONE

ROLES = ("observation", "action", "other")


def run(options: Inspect) -> dict[str, Any]:
    """Print it; returns what --json prints."""
    store = open_store(options.store)
    with console.status("reading"):
        found = inspect(store)
    for key, why in found["left_out"].items():
        if key not in store.left_out:  # those are said already
            console.print(f"{options.store}: data/{key} is left out: it {why}")
    if options.json:
        out.print_lines(json.dumps(found, indent=2))
    else:
        print_tables(found)
    return found


def print_tables(found: Mapping[str, Any]) -> None:
    """What `inspect` found, to read."""
    roles = {role: [key for key in found["keys"] if found["keys"][key]["role"] == role] for role in ROLES}
    out.print("; ".join(f"{role}: {', '.join(keys)}" for role, keys in roles.items() if keys))
    out.print(tabulate_keys(found["keys"]))
    images = {key: part for key, part in found["keys"].items() if part["image"] is not None}
    if images:
        out.print(tabulate_images(images))
    packings = {" + ".join(part["codecs"]) for part in found["keys"].values()}
    out.print(f"packed with {'; '.join(sorted(packings))}")
    lengths = found["lengths"]
    out.print(
        f"{found['episodes']} episodes, {found['steps']} steps; lengths {lengths['shortest']} to "
        f"{lengths['longest']}, median {lengths['median']:g}"
    )
    if found["modes"]:
        out.print("modes: " + ", ".join(f"{mode} {count}" for mode, count in found["modes"].items()))
    for text, part in found["instructions"].items():
        modes = ", ".join(f"{mode} {count}" for mode, count in part["modes"].items())
        out.print(f"instruction {text!r}: {part['episodes']} episodes" + (f" ({modes})" if modes else ""))
    for name, value in found["attributes"].items():
        out.print(f"{name}: {json.dumps(value)}")


def tabulate_keys(keys: Mapping[str, Any]) -> Table:
    """A row a key."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("key", "step", "type", "lowest", "highest", "chunk", "MB", "packed"):
        table.add_column(name, no_wrap=True)
    for key, part in keys.items():
        size = ("-", "-") if part["bytes"] is None else (f"{part['bytes'] / 1e6:.2f}", f"{part['ratio']:.1f}x")
        shape, limits = "x".join(map(str, part["shape"])), (min(part["min"]), max(part["max"]))
        shape = shape if len(shape) <= 20 else f"{len(part['shape'])} axes"
        table.add_row(key, shape, part["dtype"], *(f"{n:.4g}" for n in limits), str(part["chunk_rows"]), *size)
    return table


def tabulate_images(keys: Mapping[str, Any]) -> Table:
    """A row a key of images: among them the shares of frames of one colour, and of those that repeat the one before."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("images", "size", "channels", "means", "one colour", "repeated"):
        table.add_column(name, no_wrap=True)
    for key, part in keys.items():
        image, (height, width, channels) = part["image"], part["shape"]
        means = " ".join(f"{mean:.3g}" for mean in image["mean"])
        shares = f"{image['blank']:.2%}", f"{image['repeated']:.2%}"
        table.add_row(key, f"{height} x {width}", str(channels), means, *shares)
    return table


def inspect(store: EpisodeStore) -> dict[str, Any]:
    """What `dataset inspect` says, as JSON."""
    lengths = np.diff(store.episode_ends, prepend=0)
    keys: dict[str, Any] = {}
    left_out = dict(store.left_out)
    for key in store.keys:
        try:
            keys[key] = describe_key(store, key)
        except StoreError as error:  # what it holds cannot be used
            left_out[key] = str(error).removeprefix(f"{store.location}: data/{key} ")
    modes = Counter(mode or NONE for mode in store.episode_modes())
    return {
        "location": store.location,
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "lengths": {
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
            "median": float(np.median(lengths)),
        },
        "modes": {mode: modes[mode] for mode in (*store.modes, NONE) if mode in modes} if store.modes else {},
        "instructions": count_instructions(store),
        "keys": keys,
        "left_out": left_out,
        "attributes": {
            name: value for name, value in store.attributes.items() if name not in ("modes", "instructions")
        },
    }


def count_instructions(store: EpisodeStore) -> dict[str, Any]:
    """Of each instruction, and of episodes without one: how many episodes, and how many of each mode. Empty in a store
    without instructions."""
    if not store.instructions:
        return {}
    pairs = Counter(zip(store.episode_instructions(), store.episode_modes(), strict=True))
    found: dict[str, Any] = {}
    for text in (*store.instructions, None):
        of_text = {mode: count for (other, mode), count in pairs.items() if other == text}
        if of_text:
            modes = {mode: of_text[mode] for mode in store.modes if mode in of_text}
            found[text or NONE] = {"episodes": sum(of_text.values()), "modes": modes}
    return found


def describe_key(store: EpisodeStore, key: str) -> dict[str, Any]:
    """What is in one array; raises StoreError where its rows cannot be used."""
    image = describe_images(store, key) if is_image(store.shape(key)) else None
    lowest, highest = (image.pop("min"), image.pop("max")) if image else measure_limits(store, key)
    size = store.stored_bytes(key)
    raw = int(store.episode_ends[-1]) * int(np.prod(store.shape(key), dtype=np.int64)) * store.dtype(key).itemsize
    return {
        "role": ROLES[0 if key in store.observation_keys else 1 if key in store.parts(store.action_key) else 2],
        "shape": store.shape(key),
        "dtype": str(store.dtype(key)),
        "min": lowest,
        "max": highest,
        "image": image,
        "chunk_rows": store.chunk_rows(key),
        "codecs": codec_names(store.arrays.raw(f"data/{key}")),
        "bytes": size,
        "ratio": raw / size if size else None,
    }


def describe_images(store: EpisodeStore, key: str) -> dict[str, Any]:
    """Limits and mean of each channel, and the shares of frames that show nothing (one colour all over) and that repeat
    the one before them."""
    ends = store.episode_ends
    frames = Frames(int(ends[-1]), np.concatenate([[0], ends[:-1]]), store.dtype(key))
    for first, rows in store.blocks(key):
        frames.add(first, rows)
    frames.finish()
    return {
        "min": frames.lowest.tolist(),
        "max": frames.highest.tolist(),
        "mean": frames.mean.tolist(),
        "blank": float(frames.blank.mean()),
        "repeated": float(frames.repeated.mean()),
    }


def measure_limits(store: EpisodeStore, key: str) -> tuple[list[float], list[float]]:
    """Smallest and largest value of each column, in the order of memory."""
    lowest, highest = np.inf, -np.inf
    for _, rows in store.blocks(key):
        flat = rows.reshape(len(rows), -1)
        lowest, highest = np.minimum(lowest, flat.min(axis=0)), np.maximum(highest, flat.max(axis=0))
    return np.asarray(lowest).tolist(), np.asarray(highest).tolist()

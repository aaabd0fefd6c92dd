"""What the config.json of a checkpoint holds: its fields, their bounds, and how older versions become today's."""

import json
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_policy.basics.files import MAX_JSON_BYTES, parse_json, read_json
from diffusion_policy.basics.images import is_image
from diffusion_policy.basics.names import MOST_EMBEDDING, are_instructions, say_instructions
from diffusion_policy.checkpoints.safe_files import MAX_DIMENSIONS, CheckpointError, Recorded
from diffusion_policy.config import (
    MAX_STEP,
    PolicyConfig,
    TrainConfig,
    decode,
    require_labels,
    to_json,
    with_todays_names,
)
from diffusion_policy.policy import Shapes

FORMAT = "diffusion-policy checkpoint"
FORMAT_VERSION = 5
"""What is kept of options takes its default where an older version does not say it; anything else that changes needs
the next version, and a line in MIGRATIONS."""
MODEL = "model.safetensors"
TRAINING = "training.safetensors"

# What a configuration may ask for, far beyond what anyone trains; of the options themselves see `config`.
MAX_KEYS = 256
MAX_OBSERVED_NUMBERS = 65_536
"""In all keys at one step, but images."""
MAX_IMAGE_NUMBERS = 2**24
"""In all images at one step: five of 1280 x 720 in colour."""
MAX_ACTION_NUMBERS = 1024
MAX_MODES = 1024


@dataclass(frozen=True)
class Environment:
    """What a policy was trained for."""

    id: str | None
    """Gymnasium id; None when the dataset does not say."""
    arguments: dict[str, Any]
    modes: tuple[str, ...]
    """All labels that the environment knows."""
    signals: dict[str, Any] = field(default_factory=dict)
    """How success and mode are read where the environment does not say: see `config.SuccessAndModes`."""
    wrappers: tuple[dict[str, Any], ...] = ()
    """Wrappers within which the demonstrations were recorded, the innermost first, as stores name them."""


@dataclass(frozen=True)
class Dataset:
    """What a policy was trained on."""

    location: str
    """Absolute path or URL."""
    fingerprint: str
    """SHA-256 of the rows."""
    episodes: int
    steps: int
    modes: dict[str, int]
    """Episodes of each mode; `none` for those without."""
    seeds: tuple[int, int] | None
    """First and last seed of the episodes."""
    action_key: str = "action"
    """Key of the actions in the store."""
    control_rate: float | None = None
    """Steps in a second [1/s]; None when the store does not say."""
    instructions: dict[str, dict[str, int]] = field(default_factory=dict)
    """Episodes of each mode, of each instruction; `none` for those without a mode."""


@dataclass(frozen=True)
class Contents:
    """config.json, field for field."""

    format: str
    format_version: int
    package_version: str
    step: int
    metrics: dict[str, float]
    policy: PolicyConfig
    training: TrainConfig
    observation: tuple[str, ...]
    """With `action` and `angles` the options of `train --config`."""
    action: str
    angles: tuple[str, ...]
    shapes: Shapes
    environment: Environment
    dataset: Dataset
    files: dict[str, Recorded]
    instructions: tuple[str, ...] = ()
    """What the policy can be told, in the order of its numbers; empty for one that is told none."""
    embedding_size: int = 0
    """Numbers of the embedding of an instruction; 0 where there are none."""


def _migrate_1(config: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had no metrics, and said no options of `train --config`."""
    return {
        "metrics": {},
        "observation": list(config["shapes"]["observations"]),
        "action": config["dataset"].get("action_key", "action"),
        "angles": [],
        **config,
    }


def _migrate_2(config: dict[str, Any]) -> dict[str, Any]:
    """Version 2 held statistics of the dataset, which nothing read."""
    return {**config, "dataset": {name: value for name, value in config["dataset"].items() if name != "statistics"}}


def _migrate_3(config: dict[str, Any]) -> dict[str, Any]:
    """Version 3 had other names, and the network's options beside the policy's."""
    return with_todays_names(config)


def _migrate_4(config: dict[str, Any]) -> dict[str, Any]:
    """Version 4 did not say the control rate of the dataset."""
    return {**config, "dataset": {"control_rate": None, **config["dataset"]}}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _migrate_1,
    2: _migrate_2,
    3: _migrate_3,
    4: _migrate_4,
}
"""By format version: makes the config.json of the next version from that of this one."""


def _migrate_tensor_2(name: str, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """Version 2 normalized in single precision."""
    return name, torch.float64 if name.startswith("normalizer.") else dtype


TENSORS: dict[int, Callable[[str, torch.dtype], tuple[str, torch.dtype]]] = {2: _migrate_tensor_2}
"""By format version: name and type of a tensor of the model in the next version, where they have changed."""


def read_contents(folder: Path) -> Contents:
    """The contents of config.json in today's format; `format_version` is the one that was found. Raises CheckpointError
    for what is not ours, of a newer format, incomplete, unknown, of a wrong type or beyond its bounds."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the configuration of a checkpoint")
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {reprlib.repr(version)}; this package reads up to {FORMAT_VERSION}"
        )
    try:
        for older in range(version, FORMAT_VERSION):
            config = MIGRATIONS[older](config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error
    try:
        return _decode(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def format_contents(contents: Contents) -> str:
    """config.json; raises CheckpointError for what could not be read again."""
    try:
        text = json.dumps(to_json(contents), indent=2) + "\n"
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it would have {len(text)} bytes; at most {MAX_JSON_BYTES} are read")
        _decode(parse_json(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"no config.json of a checkpoint can hold this: {error}") from error
    return text


def _decode(config: dict[str, Any]) -> Contents:
    """Contents within their bounds; raises ValueError for others."""
    contents = decode(config, Contents, "")
    _check_contents(contents)
    return contents


def check_bounds(shapes: Shapes, modes: Sequence[str]) -> None:
    """Raise ValueError where a policy is larger than any that is loaded."""
    for shape in (*shapes.observations.values(), shapes.action, shapes.row):
        if len(shape) > MAX_DIMENSIONS or any(size < 1 for size in shape):
            raise ValueError(f"a shape has at most {MAX_DIMENSIONS} numbers, all positive; got {shape}")
    rows, images = (
        sum(math.prod(shape) for shape in shapes.observations.values() if is_image(shape) == wanted)
        for wanted in (False, True)
    )
    bounds = {
        "number of keys": (len(shapes.observations), 1, MAX_KEYS),
        "size of an observation": (rows, 0 if images else 1, MAX_OBSERVED_NUMBERS),
        "size of the images": (images, 0, MAX_IMAGE_NUMBERS),
        "size of an action": (math.prod(shapes.row), 1, MAX_ACTION_NUMBERS),
        "number of modes": (len(modes), 0, MAX_MODES),
    }
    for name, (value, least, most) in bounds.items():
        if not least <= value <= most:
            raise ValueError(f"the {name} must be from {least} to {most}; got {value}")
    require_labels([*shapes.observations, *modes])
    if "action" in shapes.observations:
        raise ValueError("an observation cannot be called 'action'")


def _check_instructions(contents: Contents) -> None:
    """Raise ValueError for instructions, or embeddings of them, beyond their bounds."""
    for texts in (contents.instructions, contents.dataset.instructions):
        if not are_instructions([*texts]):
            raise ValueError(f"instructions must be {say_instructions()}")
    if not 0 <= contents.embedding_size <= MOST_EMBEDDING:
        raise ValueError(f"the embedding_size must be from 0 to {MOST_EMBEDDING}; got {contents.embedding_size}")


def _check_contents(contents: Contents) -> None:
    """Raise ValueError where a config.json asks for what would fill the memory, or holds what could be none."""
    check_bounds(contents.shapes, contents.environment.modes)
    _check_instructions(contents)
    if not 0 <= contents.step <= MAX_STEP:
        raise ValueError(f"the step must be from 0 to {MAX_STEP}; got {contents.step}")
    if contents.files.keys() != {MODEL, TRAINING}:
        raise ValueError(f"its files must be {MODEL} and {TRAINING}; got {', '.join(map(repr, contents.files))}")
    rate = contents.dataset.control_rate
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"the dataset's control_rate must be above 0; got {rate}")
    if not _is_finite([contents.environment.arguments, contents.environment.signals, *contents.environment.wrappers]):
        raise ValueError("the environment's arguments must be finite; got NaN or infinity")


def _is_finite(tree: Any) -> bool:
    """Whether all numbers of JSON are finite."""
    if isinstance(tree, dict | list):
        return all(map(_is_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)

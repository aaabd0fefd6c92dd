"""What the config.json of a checkpoint holds: its fields, their bounds, and how older versions become today's."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_policy.checkpoint_files import MAX_DIMENSIONS, CheckpointError, Recorded, from_json, read_json
from diffusion_policy.config import PolicyConfig, TrainConfig
from diffusion_policy.policy import Shapes

FORMAT = "diffusion-policy checkpoint"
FORMAT_VERSION = 2
"""A new field of anything that is kept needs the next one, and a line in MIGRATIONS; only training options that are not
there take their defaults."""
MODEL = "model.safetensors"
TRAINING = "training.safetensors"

# What a configuration may ask for, far beyond what anyone trains.
MAX_STEP = 10**12
MAX_HORIZON = 1024
MAX_RESOLUTIONS = 10
MAX_WIDTH = 8192
"""Channels, also of the noise level's embedding."""
MAX_KERNEL_SIZE = 255
MAX_LEVELS = 100_000
MAX_KEYS = 256
MAX_OBSERVED_NUMBERS = 65_536
"""In all keys at one step."""
MAX_ACTION_NUMBERS = 1024
MAX_MODES = 1024
MAX_LABEL = 200
"""Characters of a key or of a mode's label."""


@dataclass(frozen=True)
class Environment:
    """What a policy was trained for."""

    id: str | None
    """Gymnasium id; None when the data set does not say."""
    arguments: dict[str, Any]
    modes: tuple[str, ...]
    """All labels that the environment knows."""
    signals: dict[str, Any] = field(default_factory=dict)
    """How success and mode are read where the environment does not say: see `config.Signals`."""


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
    statistics: dict[str, Any] = field(default_factory=dict)
    """Of the training episodes, by key: rows, minimum, maximum, mean, std, low and high (quantiles 0.01, 0.99)."""


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


def _migrate_1(config: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had no metrics, and came without some fields at first."""
    shapes = {"angles": {}, **config["shapes"]}
    dataset = {"action_key": "action", "statistics": {}, **config["dataset"]}
    return {
        "metrics": {},
        "observation": list(shapes["observations"]),
        "action": dataset["action_key"],
        "angles": [],
        **config,
        "policy": {**dataclasses.asdict(PolicyConfig()), **config["policy"]},
        "shapes": shapes,
        "environment": {"signals": {}, **config["environment"]},
        "dataset": dataset,
    }


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _migrate_1}
"""By format version: makes the config.json of the next version from that of this one."""
RENAMES: dict[int, Callable[[str], str]] = {}
"""By format version: the name of a tensor in the next version, where names have changed."""


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON of a checkpoint folder, in today's format; `format_version` is the one that was found. Raises
    CheckpointError when it is not ours, of a newer format, or incomplete."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the configuration of a checkpoint")
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format version {version!r}; this package reads up to {FORMAT_VERSION}")
    try:
        for older in range(version, FORMAT_VERSION):
            config = MIGRATIONS[older](config)
        return {**config, "training": {**dataclasses.asdict(TrainConfig()), **config["training"]}}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error


def read_contents(folder: Path) -> Contents:
    """The contents of config.json; raises CheckpointError for fields that are missing, unknown, of a wrong type or
    beyond their bounds."""
    path = folder / "config.json"
    try:
        contents = from_json(read_config(folder), Contents, str(path))
        _check_contents(contents)
    except CheckpointError:
        raise
    except ValueError as error:  # of the options themselves
        raise CheckpointError(f"{path}: {error}") from error
    return contents


def check_bounds(policy: PolicyConfig, shapes: Shapes, modes: Sequence[str]) -> None:
    """Raise ValueError where a policy is larger than any that is loaded."""
    for shape in (*shapes.observations.values(), shapes.action):
        if len(shape) > MAX_DIMENSIONS or any(size < 1 for size in shape):
            raise ValueError(f"a shape has at most {MAX_DIMENSIONS} numbers, all positive; got {shape}")
    observed = sum(math.prod(shape) for shape in shapes.observations.values())
    bounds = {
        "prediction_horizon": (policy.prediction_horizon, 1, MAX_HORIZON),
        "number of widths": (len(policy.widths), 1, MAX_RESOLUTIONS),
        "largest width": (max(policy.widths), 1, MAX_WIDTH),
        "level_dim": (policy.level_dim, 1, MAX_WIDTH),
        "kernel_size": (policy.kernel_size, 1, MAX_KERNEL_SIZE),
        "number of levels": (policy.levels, 1, MAX_LEVELS),
        "number of keys": (len(shapes.observations), 1, MAX_KEYS),
        "size of an observation": (observed, 1, MAX_OBSERVED_NUMBERS),
        "size of an action": (math.prod(shapes.action), 1, MAX_ACTION_NUMBERS),
        "number of modes": (len(modes), 0, MAX_MODES),
    }
    for name, (value, least, most) in bounds.items():
        if not least <= value <= most:
            raise ValueError(f"the {name} must be from {least} to {most}; got {value}")
    for label in (*shapes.observations, *modes):
        if len(label) > MAX_LABEL or not label.isprintable():
            raise ValueError(f"keys and modes have at most {MAX_LABEL} printable characters; got {label[:50]!r}")
    if "action" in shapes.observations:
        raise ValueError("an observation cannot be called 'action'")


def _check_contents(contents: Contents) -> None:
    """Raise ValueError where a config.json asks for what would fill the memory, or holds what could be none."""
    check_bounds(contents.policy, contents.shapes, contents.environment.modes)
    if not 0 <= contents.step <= MAX_STEP:
        raise ValueError(f"the step must be from 0 to {MAX_STEP}; got {contents.step}")
    if contents.files.keys() != {MODEL, TRAINING}:
        raise ValueError(f"its files must be {MODEL} and {TRAINING}; got {', '.join(map(repr, contents.files))}")
    if not all(map(math.isfinite, contents.metrics.values())) or not _is_finite(contents.dataset.statistics):
        raise ValueError("metrics and statistics must be finite; got NaN or infinity")


def _is_finite(tree: Any) -> bool:
    """Whether all numbers of JSON are finite."""
    if isinstance(tree, dict | list):
        return all(map(_is_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)

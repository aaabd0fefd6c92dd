"""Checkpoints: folders of safetensors and JSON, versioned and checksummed. Nothing is ever pickled or unpickled.

    step-003000/model.safetensors     weights to act with, normalizer included
    step-003000/training.safetensors  what training needs beside them: raw weights and the optimizer's state
    step-003000/config.json           everything else, with the SHA-256 and size of both files

A checkpoint is written under a temporary name, synced, and renamed, so it is whole or absent.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_policy import __version__
from diffusion_policy.config import PolicyConfig, TrainConfig, from_dict
from diffusion_policy.policy import DiffusionPolicy, Shapes

FORMAT = "diffusion-policy checkpoint"
FORMAT_VERSION = 1
MODEL = "model.safetensors"
TRAINING = "training.safetensors"


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message says why."""


@dataclass(frozen=True)
class Environment:
    """What a policy was trained for."""

    id: str | None
    """Gymnasium id; None when the data set does not say."""
    arguments: dict[str, Any]
    modes: tuple[str, ...]
    """All labels that the environment knows."""
    signals: dict[str, Any] = dataclasses.field(default_factory=dict)
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
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the training episodes, by key: rows, minimum, maximum, mean, std, low and high (quantiles 0.01, 0.99)."""


@dataclass(frozen=True)
class Checkpoint:
    """A policy with what is known of it."""

    policy: DiffusionPolicy
    training: TrainConfig
    environment: Environment
    dataset: Dataset
    step: int


def save(run: Path, checkpoint: Checkpoint, training_state: Mapping[str, Tensor]) -> Path:
    """Write `run`/step-XXXXXX and delete the older checkpoints of this run; returns the new folder. A step that has
    its checkpoint keeps it."""
    folder = run / f"step-{checkpoint.step:06d}"
    if folder.exists():
        return folder
    temporary = run / f".writing-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model = {name: tensor.contiguous() for name, tensor in checkpoint.policy.state_dict().items()}
    save_file(model, temporary / MODEL)
    save_file(dict(training_state), temporary / TRAINING)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "step": checkpoint.step,
        "policy": dataclasses.asdict(checkpoint.policy.config),
        "training": dataclasses.asdict(checkpoint.training),
        "observation": list(checkpoint.policy.shapes.observations),
        "action": checkpoint.dataset.action_key,
        "angles": [f"{key}:{','.join(map(str, columns))}" for key, columns in _angles_in_store(checkpoint).items()],
        "shapes": checkpoint.policy.shapes._asdict(),
        "environment": dataclasses.asdict(checkpoint.environment),
        "dataset": dataclasses.asdict(checkpoint.dataset),
        "files": {name: _describe(temporary / name) for name in (MODEL, TRAINING)},
    }
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    temporary.rename(folder)
    _sync(run)
    for older in _steps(run):
        if older != folder:
            shutil.rmtree(older)
    return folder


def _angles_in_store(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Columns of angles by the keys of the store, as `train --angles` takes them."""
    angles = checkpoint.policy.shapes.angles
    return {checkpoint.dataset.action_key if key == "action" else key: columns for key, columns in angles.items()}


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a checkpoint folder, or the newest one of a run's folder.

    Raises CheckpointError when there is none, when it is damaged or of a newer format, when the normalizer is missing,
    or when names and shapes of weights are not those of its configuration.
    """
    folder = find(Path(path))
    config = read_config(folder)
    try:
        shapes = Shapes(
            {key: tuple(shape) for key, shape in config["shapes"]["observations"].items()},
            tuple(config["shapes"]["action"]),
            {key: tuple(columns) for key, columns in config["shapes"].get("angles", {}).items()},
        )
        environment = Environment(**{**config["environment"], "modes": tuple(config["environment"]["modes"])})
        seeds = config["dataset"]["seeds"]
        dataset = Dataset(**{**config["dataset"], "seeds": tuple(seeds) if seeds else None})
        training, step = from_dict(TrainConfig, config["training"]), config["step"]
        policy = DiffusionPolicy(from_dict(PolicyConfig, config["policy"]), shapes, environment.modes)
        recorded = config["files"][MODEL]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json is incomplete: {error}") from error
    weights = _load_weights(folder / MODEL, recorded)
    _check_weights(folder, policy.state_dict(), weights)
    policy.load_state_dict(weights)
    policy.to(device).eval()
    return Checkpoint(policy, training, environment, dataset, step)


def find(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest one inside; raises CheckpointError."""
    if (path / "config.json").is_file():
        return path
    steps = _steps(path)
    if not steps:
        raise CheckpointError(f"no checkpoint at {path}: neither config.json nor a folder step-... is there")
    return steps[-1]


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON of a checkpoint folder; raises CheckpointError when it is not ours or of a newer format."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder}/config.json: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{folder}/config.json is not the configuration of a checkpoint")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format version {version}; this package reads up to {FORMAT_VERSION}")
    return config


def _load_weights(path: Path, recorded: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if _describe(path) != recorded:
        raise CheckpointError(f"{path} is damaged: its size or SHA-256 is not what config.json says")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _check_weights(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - found.keys())
    if any(name.startswith("normalizer.") for name in missing):
        raise CheckpointError(f"{folder} has no normalizer ({missing[0]} is missing): its actions would be meaningless")
    if missing or found.keys() - expected.keys():
        unknown = sorted(found.keys() - expected.keys())
        raise CheckpointError(f"{folder} does not fit its configuration: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(found[name].shape)}; its configuration needs {tuple(tensor.shape)}"
            )


def _steps(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    folders = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

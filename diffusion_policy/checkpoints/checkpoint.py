"""Checkpoints: folders of safetensors and JSON, versioned and checksummed. Nothing is ever pickled or unpickled.

    step-003000/model.safetensors     weights to act with, normalizer included
    step-003000/training.safetensors  what training needs beside them: raw weights and the optimizer's state
    step-003000/config.json           everything else, with the SHA-256 and size of both files
    best                              link to the best of them, where one was asked for

A checkpoint is written under a temporary name, synced, and renamed, so it is whole or absent. A stranger's is refused
before it can take more memory than its own files have.
"""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_policy import __version__
from diffusion_policy.basics.files import WRITING, remove, sync
from diffusion_policy.basics.metric_table import lower_is_better
from diffusion_policy.checkpoints.safe_files import (
    CheckpointError,
    Recorded,
    Spec,
    describe,
    open_file,
    read_header,
    read_tensors,
)
from diffusion_policy.checkpoints.schema import (
    FORMAT,
    FORMAT_VERSION,
    MODEL,
    TENSORS,
    TRAINING,
    Contents,
    Dataset,
    Environment,
    format_contents,
    read_contents,
)
from diffusion_policy.config import TrainConfig
from diffusion_policy.policy import DiffusionPolicy

DELETING = ".deleting-"
STATE_BESIDES = 2**16
"""Numbers of a training's state beside weights and moments."""
MAX_WEIGHTS = 2**28
"""Of a policy that is loaded."""


@dataclass(frozen=True)
class Checkpoint:
    """A policy with what is known of it."""

    policy: DiffusionPolicy
    training: TrainConfig
    environment: Environment
    dataset: Dataset
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    """What was measured at this step, such as validation_loss; what is not finite is not kept."""
    weights_sha256: str = ""
    """Of the file that holds the policy's weights; empty before it is saved."""

    @property
    def predicted(self) -> str:
        """Key of its dataset that the policy predicts, see `PolicyConfig.target_key`."""
        return self.policy.config.target_key(self.dataset.action_key)


def save(
    run: Path,
    checkpoint: Checkpoint,
    training_state: Mapping[str, Tensor],
    keep: int = 1,
    best: str | None = None,
    *,
    count_due: bool = False,
) -> Path:
    """Write `run`/step-XXXXXX; returns it. Then delete the older checkpoints of this run but the last `keep`, and but
    the best one by the metric `best`, to which the link `run`/best leads then. With `count_due`, one that a stop has
    left between two steps at which one is due is deleted too, and counts for nothing.

    A step that has its checkpoint keeps it, unless it is damaged. Raises CheckpointError when it cannot be written, as
    on a full disk; what was there before is still there then.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1; got {keep}")
    folder = run / f"step-{checkpoint.step:06d}"
    temporary = run / f"{WRITING}{folder.name}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        _clear(run)
        if not _is_whole(folder):
            _write(temporary, checkpoint, training_state)
            _set_aside(folder)
            temporary.rename(folder)
            sync(run)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from error
    finally:
        remove(temporary)
    counted = [older for older in steps_of(run) if not count_due or _was_due(older)]
    kept = {folder, *counted[-keep:]}
    winner = _find_best(run, best) if best else None
    if winner:
        kept.add(winner)
        _link(run / "best", winner)
    _delete([older for older in steps_of(run) if older not in kept and _number(older) < checkpoint.step], run)
    return folder


def _delete(folders: Sequence[Path], run: Path) -> None:
    """Delete checkpoints of a run; what cannot be deleted now is at the next call."""
    for folder in folders:
        with contextlib.suppress(OSError):
            _set_aside(folder)
    _clear(run)


def count_weights(policy: DiffusionPolicy) -> int:
    """Weights of a policy, also of one that was made within `without_memory`; raises CheckpointError for more than any
    policy may have."""
    weights = sum(weight.numel() for weight in policy.parameters())
    if weights > MAX_WEIGHTS:
        raise CheckpointError(
            f"a policy has at most {MAX_WEIGHTS} weights; got {weights}; a smaller network, or fewer observed numbers"
        )
    return weights


def require_savable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where `save` would, whatever the training finds: for a policy that is too large, contents
    that config.json cannot hold, and a normalizer by which nothing can be divided. The policy may be one that was made
    within `without_memory`."""
    policy = checkpoint.policy
    count_weights(policy)
    made = {name: tensor for name, tensor in policy.state_dict().items() if not tensor.is_meta}
    _check_numbers("the policy", made)
    format_contents(_contents(checkpoint, {name: Recorded("0" * 64, 2**40) for name in (MODEL, TRAINING)}))


def _contents(checkpoint: Checkpoint, files: dict[str, Recorded]) -> Contents:
    """What config.json says."""
    policy, dataset = checkpoint.policy, checkpoint.dataset
    keys = {"action": checkpoint.predicted}
    return Contents(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        package_version=__version__,
        step=checkpoint.step,
        metrics={name: value for name, value in checkpoint.metrics.items() if math.isfinite(value)},
        policy=policy.config,
        training=checkpoint.training,
        observation=tuple(policy.shapes.observations),
        action=dataset.action_key,
        angles=tuple(f"{keys.get(key, key)}:{','.join(map(str, c))}" for key, c in policy.shapes.angles.items()),
        shapes=policy.shapes,
        environment=checkpoint.environment,
        dataset=dataset,
        files=files,
        instructions=policy.instructions,
        embedding_size=policy.label_rows.size,
    )


def _write(folder: Path, checkpoint: Checkpoint, training_state: Mapping[str, Tensor]) -> None:
    """Write all files of a checkpoint and have them reach the disk; raises CheckpointError for what could not be read
    again."""
    folder.mkdir()
    tensors = {
        MODEL: {name: tensor.contiguous() for name, tensor in checkpoint.policy.state_dict().items()},
        TRAINING: dict(training_state),
    }
    _check_numbers(folder, tensors[MODEL])
    for name, content in tensors.items():
        save_file(content, folder / name)
    contents = _contents(checkpoint, {name: describe(folder / name) for name in tensors})
    (folder / "config.json").write_text(format_contents(contents), encoding="utf-8")
    for name in tensors:
        shutil.copymode(folder / "config.json", folder / name)  # safetensors lets nobody else read
        with open_file(folder / name) as file:
            read_header(file, folder / name)
    for path in (*folder.iterdir(), folder):
        sync(path)


def _clear(run: Path) -> None:
    """Delete what is to be deleted, and what a killed process left."""
    for path in (*run.glob(f"{WRITING}*"), *run.glob(f"{DELETING}*")):
        remove(path)


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint for `_clear`, so that none is ever half deleted."""
    if os.path.lexists(folder):
        folder.rename(folder.with_name(f"{DELETING}{folder.name}"))


def _is_whole(folder: Path) -> bool:
    try:
        contents = read_contents(folder)
        return all(describe(folder / name) == recorded for name, recorded in contents.files.items())
    except CheckpointError:
        return False


def _was_due(folder: Path) -> bool:
    """Whether a checkpoint is of a step at which its training writes one."""
    try:
        training = read_contents(folder).training
    except CheckpointError:
        return True
    step = _number(folder)
    return step == training.steps or (step > 0 and step % training.checkpoint_every == 0)


def _find_best(run: Path, metric: str) -> Path | None:
    """The best checkpoint, the newest of several; None where none has this metric."""
    values = {}
    for folder in steps_of(run):
        with contextlib.suppress(CheckpointError):
            values[folder] = read_contents(folder).metrics.get(metric, math.nan)
    sign = -1 if lower_is_better(metric) else 1
    measured = [folder for folder, value in values.items() if not math.isnan(value)]
    return max(measured, key=lambda folder: (sign * values[folder], _number(folder)), default=None)


def _link(link: Path, folder: Path) -> None:
    """Have a link lead to a folder beside it; where there are no links, there is none."""
    temporary = link.with_name(f"{DELETING}{link.name}")
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        temporary.replace(link)


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a checkpoint folder, or the newest one of a run's folder.

    Raises CheckpointError when there is none, when it is damaged or of a newer format, when it asks for more than
    anyone trains, when the normalizer is missing or could divide by zero, when weights are not finite, or when their
    names, shapes and dtypes are not those of its configuration.
    """
    folder = find(Path(path))
    contents = read_contents(folder)
    try:
        with without_memory():
            policy = DiffusionPolicy(
                contents.policy,
                contents.shapes,
                contents.environment.modes,
                contents.instructions,
                contents.embedding_size,
            )
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}/config.json describes no policy: {error}") from error
    expected = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in policy.state_dict().items()}
    weights = _read_tensors(folder, MODEL, contents, lambda found: _check_specs(folder, expected, found))
    _check_numbers(folder, weights)
    policy.load_state_dict(weights, assign=True)
    policy.to(device).eval()
    return Checkpoint(
        policy,
        contents.training,
        contents.environment,
        contents.dataset,
        contents.step,
        contents.metrics,
        contents.files[MODEL].sha256,
    )


def load_training(folder: Path, weights: int = MAX_WEIGHTS) -> dict[str, Tensor]:
    """What `save` was given as training state, on the CPU; raises CheckpointError where it is damaged, or larger than
    that of a policy with so many `weights`."""

    def check(found: dict[str, Spec]) -> None:
        numbers = sum(math.prod(spec.shape) for spec in found.values())
        if numbers > 3 * weights + STATE_BESIDES:  # the weights, and two moments of each
            raise CheckpointError(f"{folder}/{TRAINING} holds {numbers} numbers, too many for {weights} weights")

    return _read_tensors(folder, TRAINING, read_contents(folder), check)


def find(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest one inside; raises CheckpointError."""
    if os.path.lexists(path / "config.json"):
        return path
    steps = steps_of(path)
    if not steps:
        raise CheckpointError(f"no checkpoint at {path}: neither config.json nor a folder step-... is there")
    return steps[-1]


def steps_of(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    folders = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name, re.ASCII)]
    return sorted((path for path in folders if os.path.lexists(path / "config.json")), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


class without_memory(TorchFunctionMode):
    """Within it weights have a shape but take no memory; tables, such as a schedule's, are made as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def _read_tensors(
    folder: Path, name: str, contents: Contents, check: Callable[[dict[str, Spec]], None]
) -> dict[str, Tensor]:
    """Tensors of a checkpoint, in today's format."""

    def today(name: str, dtype: torch.dtype) -> tuple[str, torch.dtype]:
        for version in range(contents.format_version, FORMAT_VERSION):
            name, dtype = TENSORS.get(version, lambda *same: same)(name, dtype)
        return name, dtype

    def check_migrated(found: dict[str, Spec]) -> None:
        migrated = {today(name, spec.dtype): spec.shape for name, spec in found.items()}
        check({name: Spec(dtype, shape) for (name, dtype), shape in migrated.items()})

    tensors = read_tensors(folder / name, contents.files[name], check_migrated)
    migrated = ((*today(name, tensor.dtype), tensor) for name, tensor in tensors.items())
    return {name: tensor.to(dtype) for name, dtype, tensor in migrated}


def _check_specs(folder: Path, expected: Mapping[str, Spec], found: Mapping[str, Spec]) -> None:
    """Raise CheckpointError unless the tensors of a file are those that its configuration needs."""
    weights = sum(math.prod(spec.shape) for spec in expected.values())
    if weights > MAX_WEIGHTS:
        raise CheckpointError(f"{folder} would have {weights} weights; at most {MAX_WEIGHTS} are loaded")
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    if any(name.startswith("normalizer.") for name in missing):
        raise CheckpointError(f"{folder} has no normalizer ({missing[0]} is missing): its actions would be meaningless")
    if missing or unknown:
        raise CheckpointError(f"{folder} does not fit its configuration: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, spec in expected.items():
        if spec.shape != found[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {found[name].shape}; its configuration needs {spec.shape}"
            )
        if spec.dtype != found[name].dtype:
            raise CheckpointError(f"{folder}: {name} is {found[name].dtype}; its configuration needs {spec.dtype}")


def _check_numbers(folder: object, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for weights that are not finite, and for scales below 0; 0 is that of a constant."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity")
        if name.startswith("normalizer.") and name.endswith("_scale") and not (tensor >= 0).all():
            raise CheckpointError(f"{folder}: {name} must be at least 0; got {tensor.min().item():g}")

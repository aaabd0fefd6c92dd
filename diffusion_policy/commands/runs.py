"""The folder of a training: what it was told (run.json, written before the first step), so that it can go on after any
interruption, and only as the same training."""

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.basics.files import MAX_JSON_BYTES, FileError, read_bytes, write_whole
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.commands.options.train import RUN_FILE, to_fields
from diffusion_policy.commands.outputs import holding, require_fresh
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, flat_options
from diffusion_policy.training.trainer import Diverged

FREE = {"keep_checkpoints", "checkpoint_every", "rollout_every", "rollout_episodes"}
"""Options of training that may change when it goes on: the weights do not depend on them."""


def write_options(run: Path, options: Mapping[str, Any]) -> None:
    """Write what a training was told, whole or not at all, unless it stands there already; raises FileError where it
    cannot be written."""
    text = json.dumps(options, indent=2) + "\n"
    with contextlib.suppress(FileError):
        if read_bytes(run / RUN_FILE, MAX_JSON_BYTES) == text.encode():
            return
    write_whole(run / RUN_FILE, text)


def require_same(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError, listing what differs, unless two trainings would be the same."""
    defaults = {"policy": PolicyConfig(), "training": TrainConfig()}
    old, new = defaults | to_fields(before, f"{run}/{RUN_FILE}"), defaults | to_fields(now, "this training")
    differences = []
    for part in defaults:
        was = flat_options(old[part])
        for option, value in flat_options(new[part]).items():
            if was.get(option, value) != value and option not in FREE:
                differences.append(f"{option.replace('_', '-')} {say(was[option])}, now {say(value)}")
    for name in ("observation", "action", "angles"):
        if old.get(name) != new.get(name):
            differences.append(f"{name} {say(old.get(name))}, now {say(new.get(name))}")
    fingerprints = [options["dataset"]["fingerprint"] for options in (before, now)]
    if fingerprints[0] != fingerprints[1]:
        differences.append(f"the data are others (SHA-256 {fingerprints[0][:8]}..., now {fingerprints[1][:8]}...)")
    if differences:
        raise ConfigError(f"{run} cannot go on as another training: {'; '.join(differences)}")


def say(value: object) -> str:
    """A value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@contextlib.contextmanager
def lock(run: Path, options: Mapping[str, Any], begun: bool) -> Iterator[None]:
    """Keep other trainings away from a folder, and write there what this one is told; `begun`: whether the folder
    is its own already. Raises ValueError where another process holds it, or it is not empty."""
    with holding(run):
        if not begun:
            require_fresh(run)  # another may have been quicker
        write_options(run, options)
        yield


def last_checkpoint(run: Path) -> str:
    """Which checkpoint there is, in words."""
    saved = checkpoint.steps_of(run)
    return f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"


def resume_command(run: Path) -> str:
    """How to go on with a run, in words."""
    return f"go on with: diffusion-policy train --resume {shlex.quote(str(run))}"


def what_is_left(run: Path) -> str:
    """Which checkpoint there is after an interruption, and how to go on."""
    return f"{last_checkpoint(run)}; {resume_command(run)}"


def divergence_report(run: Path, error: Diverged, episode_ends: np.ndarray) -> str:
    """What is known of a divergence, and what is left; the windows of its batch go into diverged.json."""
    told = ""
    if error.rows is not None:
        episodes = np.searchsorted(episode_ends, error.rows, side="right")
        steps = error.rows - np.concatenate([[0], episode_ends])[episodes]
        windows = [{"episode": int(e), "step": int(s)} for e, s in zip(episodes, steps, strict=True)]
        some = ", ".join(f"episode {one['episode']} step {one['step']}" for one in windows[:3])
        told = f"; its batch held {some}{' ...' if len(windows) > 3 else ''}"
        report = run / "diverged.json"
        with contextlib.suppress(FileError):  # a full disk does not hide what happened
            write_whole(report, json.dumps({"step": error.step, "windows": windows}, indent=1) + "\n")
            told += f" (all in {report})"
    return f"{error}{told}; {last_checkpoint(run)}; look at these steps, or begin a new run with a lower learning rate"

"""The folder of a training: what it was told (run.json, written before the first step), so that it can go on after any
interruption, and only as the same training. Nothing here imports torch before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_policy.basics.files import MAX_JSON_BYTES, FileError, once_each, read_bytes, read_json, write_whole
from diffusion_policy.commands.outputs import holding, require_fresh
from diffusion_policy.commands.stores import join_actions
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, decode, did_you_mean
from diffusion_policy.training.trackers import TrackerName

if TYPE_CHECKING:
    import numpy as np

    from diffusion_policy.commands.train import Train
    from diffusion_policy.training.trainer import Diverged

OPTIONS = "run.json"
FREE = {"keep_checkpoints", "checkpoint_every", "rollout_every", "rollout_episodes"}
"""Options of training that may change when it goes on: the weights do not depend on them."""
TAKEN: dict[str, Any] = {
    "observation": tuple[str, ...],
    "action": str | None,
    "angles": tuple[str, ...],
    "device": str | None,
    "tracker": tuple[TrackerName, ...],
    "env": str | None,
    "env_kwargs": str | None,
    "policy": PolicyConfig,
    "training": TrainConfig,
}
"""What a file of options may say of a training: fields of `Train` ..."""
KNOWN = {*TAKEN, "dataset", "format", "format_version", "package_version", "step", "metrics", "shapes", "environment",
         "files"}  # fmt: skip
"""... and what else a run.json or a checkpoint's config.json holds."""


@dataclass(frozen=True)
class Data:
    """What a run.json says of its dataset."""

    location: str
    fingerprint: str


def write_options(run: Path, options: Mapping[str, Any]) -> None:
    """Write what a training was told, whole or not at all, unless it stands there already; raises FileError where it
    cannot be written."""
    text = json.dumps(options, indent=2) + "\n"
    with contextlib.suppress(FileError):
        if read_bytes(run / OPTIONS, MAX_JSON_BYTES) == text.encode():
            return
    write_whole(run / OPTIONS, text)


def read_options(path: Path) -> dict[str, Any]:
    """A JSON that holds options of training: a run.json, or the config.json of a checkpoint. Raises ValueError."""
    options = read_json(path, pairs=once_each)
    if not isinstance(options, dict) or not options.keys() & {"policy", "training"}:
        raise ConfigError(f"{path} must be a JSON object with `policy` or `training`")
    for name in options.keys() - KNOWN:
        raise ConfigError(f"{path}: unknown option {reprlib.repr(name)}; {did_you_mean(name, sorted(KNOWN))}")
    return options


def read_run(run: Path) -> dict[str, Any]:
    """What the training in a folder was told; raises ValueError where there is none."""
    if not os.path.lexists(run / OPTIONS):
        raise ConfigError(f"{run} holds no training to go on with: it has no {OPTIONS}")
    options = read_options(run / OPTIONS)
    try:
        decode(options.get("dataset"), Data, "dataset")
    except ConfigError as error:
        raise ConfigError(f"{run}/{OPTIONS} does not say which dataset it was: {error}") from error
    return options


def to_fields(options: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Options that a file (`source`) gives as fields of `Train`; raises ConfigError for unknown names, with the
    nearest, and for wrong types."""
    try:
        found = {name: decode(options[name], hint, name) for name, hint in TAKEN.items() if name in options}
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    if found.get("action") is not None:
        found["action"] = (found["action"],)
    return {name: value for name, value in found.items() if value is not None}


def to_options(train: Train, fingerprint: str, modes: Sequence[Any] = ()) -> dict[str, Any]:
    """What a training is told, as JSON; `fingerprint`: that of its rows; `modes`: what it learns of modes."""
    if modes:
        fingerprint = hashlib.sha256(json.dumps([fingerprint, *modes]).encode()).hexdigest()
    return {
        "dataset": {"location": absolute(train.dataset), "fingerprint": fingerprint},
        "observation": list(train.observation),
        "action": join_actions(train.action) or None,
        "angles": list(train.angles),
        "device": train.device,
        "tracker": list(train.tracker),
        "env": train.env,
        "env_kwargs": train.env_kwargs,
        "policy": asdict(train.policy),
        "training": asdict(train.training),
    }


def require_same(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError, listing what differs, unless two trainings would be the same."""
    defaults = {"policy": PolicyConfig(), "training": TrainConfig()}
    old, new = defaults | to_fields(before, f"{run}/{OPTIONS}"), defaults | to_fields(now, "this training")
    differences = []
    for part in defaults:
        for option in fields(new[part]):
            was, becomes = getattr(old[part], option.name), getattr(new[part], option.name)
            if was != becomes and option.name not in FREE:
                differences.append(f"{option.name.replace('_', '-')} {say(was)}, now {say(becomes)}")
    for name in ("observation", "action", "angles"):
        if old.get(name) != new.get(name):
            differences.append(f"{name} {say(old.get(name))}, now {say(new.get(name))}")
    fingerprints = [options["dataset"]["fingerprint"] for options in (before, now)]
    if fingerprints[0] != fingerprints[1]:
        differences.append(f"the data are others (SHA-256 {fingerprints[0][:8]}..., now {fingerprints[1][:8]}...)")
    if differences:
        raise ConfigError(f"{run} cannot go on as another training: {'; '.join(differences)}")


def absolute(location: str) -> str:
    """A path that does not depend on the working directory; a URL as it is."""
    return str(Path(location).resolve()) if Path(location).exists() else location


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
    from diffusion_policy.checkpoints import checkpoint

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
    import numpy as np

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

"""The folder of a training: what it was told (run.json, written before the first step), so that it can go on after any
interruption, and only as the same training. Nothing here imports torch before it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, from_dict

if TYPE_CHECKING:
    from diffusion_policy.commands.train import Train

OPTIONS = "run.json"
FREE = {"keep", "keep_best", "checkpoint_every", "rollout_every", "rollout_episodes"}
"""Options of training that may change when it goes on: the weights do not depend on them."""


def write_options(run: Path, options: Mapping[str, Any]) -> None:
    """Write what a training was told, whole or not at all."""
    temporary = run / f".{OPTIONS}.{os.getpid()}"
    with temporary.open("w") as file:
        json.dump(options, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(run / OPTIONS)


def read_options(path: Path) -> dict[str, Any]:
    """A JSON that holds options of training: a run.json, or the config.json of a checkpoint. Raises ConfigError."""
    try:
        options = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(options, dict) or not options.keys() & {"policy", "training"}:
        raise ConfigError(f"{path} must be a JSON object with `policy` or `training`")
    return options


def read_run(run: Path) -> dict[str, Any]:
    """What the training in a folder was told; raises ConfigError where there is none."""
    if not (run / OPTIONS).is_file():
        raise ConfigError(f"{run} holds no training to go on with: it has no {OPTIONS}")
    return read_options(run / OPTIONS)


def to_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as fields of `Train`; raises ConfigError for unknown names, with the nearest, and for wrong types."""
    action = options.get("action")
    if action is not None and not isinstance(action, str):
        raise ConfigError(f"action must be the name of a key; got {action!r}")
    lists = {name: options.get(name, ()) for name in ("observation", "angles")}
    for name, texts in lists.items():
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{name} must be a list of texts; got {texts!r}")
    return {
        **{name: tuple(texts) for name, texts in lists.items()},
        "action": action,
        "policy": from_dict(PolicyConfig, options.get("policy", {})),
        "training": from_dict(TrainConfig, options.get("training", {})),
    }


def to_options(train: Train, fingerprint: str) -> dict[str, Any]:
    """What a training is told, as JSON; `fingerprint`: that of its rows."""
    return {
        "dataset": {"location": absolute(train.dataset), "fingerprint": fingerprint},
        "observation": list(train.observation),
        "action": train.action,
        "angles": list(train.angles),
        "policy": asdict(train.policy),
        "training": asdict(train.training),
    }


def require_same(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError, listing what differs, unless two trainings would be the same."""
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))  # tuples became lists
    differences = []
    for part in ("policy", "training"):
        defaults = asdict(to_fields(before)[part])
        for name, value in now[part].items():
            old = before.get(part, {}).get(name, defaults[name])
            if name not in FREE and json.loads(json.dumps(old)) != value:
                differences.append(f"{name.replace('_', '-')} {_say(old)}, now {_say(value)}")
    for name in ("observation", "action", "angles"):
        if before.get(name) != now[name]:
            differences.append(f"{name} {_say(before.get(name))}, now {_say(now[name])}")
    fingerprints = [options["dataset"]["fingerprint"] for options in (before, now)]
    if fingerprints[0] != fingerprints[1]:
        differences.append(f"the data are others (SHA-256 {fingerprints[0][:8]}..., now {fingerprints[1][:8]}...)")
    if differences:
        raise ConfigError(f"{run} cannot go on as another training: {'; '.join(differences)}")


def absolute(location: str) -> str:
    """A path that does not depend on the working directory; a URL as it is."""
    return str(Path(location).resolve()) if Path(location).exists() else location


def _say(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

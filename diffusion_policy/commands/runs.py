"""The folder of a training: what it was told (run.json, written before the first step), so that it can go on after any
interruption, and only as the same training. Nothing here imports torch before it is used."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_policy.commands.common import require_fresh
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, from_dict

if TYPE_CHECKING:
    import numpy as np

    from diffusion_policy.commands.train import Train
    from diffusion_policy.trainer import Diverged

OPTIONS = "run.json"
FREE = {"keep", "checkpoint_every", "rollout_every", "rollout_episodes"}
"""Options of training that may change when it goes on: the weights do not depend on them."""
TAKEN = {"dataset", "observation", "action", "angles", "device", "tracker", "env", "env_kwargs", "policy", "training"}
"""What a file of options may say of a training ..."""
KNOWN = TAKEN | {"format", "format_version", "package_version", "step", "metrics", "shapes", "environment", "files"}
"""... and what else a checkpoint's config.json holds."""


def write_options(run: Path, options: Mapping[str, Any]) -> None:
    """Write what a training was told, whole or not at all, unless it stands there already; raises ConfigError where it
    cannot be written."""
    text = json.dumps(options, indent=2) + "\n"
    if (run / OPTIONS).is_file() and (run / OPTIONS).read_text() == text:
        return
    temporary = run / f".{OPTIONS}.{os.getpid()}"
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(run / OPTIONS)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{run}/{OPTIONS} cannot be written: {error}") from error


def read_options(path: Path) -> dict[str, Any]:
    """A JSON that holds options of training: a run.json, or the config.json of a checkpoint. Raises ConfigError."""
    try:
        options = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(options, dict) or not options.keys() & {"policy", "training"}:
        raise ConfigError(f"{path} must be a JSON object with `policy` or `training`")
    for name in options.keys() - KNOWN:
        nearest = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(sorted(KNOWN))}"
        raise ConfigError(f"{path}: unknown option {name!r}; {hint}")
    return options


def read_run(run: Path) -> dict[str, Any]:
    """What the training in a folder was told; raises ConfigError where there is none."""
    if not (run / OPTIONS).is_file():
        raise ConfigError(f"{run} holds no training to go on with: it has no {OPTIONS}")
    options = read_options(run / OPTIONS)
    dataset = options.get("dataset")
    if not isinstance(dataset, dict) or {type(dataset.get(name)) for name in ("location", "fingerprint")} != {str}:
        raise ConfigError(f"{run}/{OPTIONS} does not say which data set it was")
    return options


def to_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as fields of `Train`; raises ConfigError for unknown names, with the nearest, and for wrong types."""
    texts = {name: options[name] for name in ("action", "device", "env", "env_kwargs") if options.get(name) is not None}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ConfigError(f"{name} must be a text; got {text!r}")
    lists = {name: options.get(name, ()) for name in ("observation", "angles", "tracker")}
    for name, values in lists.items():
        if not isinstance(values, list | tuple) or not all(isinstance(text, str) for text in values):
            raise ConfigError(f"{name} must be a list of texts; got {values!r}")
    return {
        **{name: tuple(values) for name, values in lists.items()},
        "action": None,
        "env": None,
        **texts,
        "policy": from_dict(PolicyConfig, options.get("policy", {})),
        "training": from_dict(TrainConfig, options.get("training", {})),
    }


def to_options(train: Train, fingerprint: str, modes: Sequence[Any] = ()) -> dict[str, Any]:
    """What a training is told, as JSON; `fingerprint`: that of its rows; `modes`: what it learns of modes."""
    if modes:
        fingerprint = hashlib.sha256(json.dumps([fingerprint, *modes]).encode()).hexdigest()
    return {
        "dataset": {"location": absolute(train.dataset), "fingerprint": fingerprint},
        "observation": list(train.observation),
        "action": train.action,
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


@contextlib.contextmanager
def hold(run: Path, options: Mapping[str, Any], begun: bool) -> Iterator[None]:
    """Keep other trainings away from a folder, and write there what this one is told; `begun`: whether the folder
    is its own already. Raises ValueError where another process holds it, or it is not empty."""
    from diffusion_policy.datasets.storage import lock

    run.mkdir(parents=True, exist_ok=True)
    unlock = lock(run, "choose another --output")
    try:
        if not begun:
            require_fresh(run)  # another may have been quicker
        write_options(run, options)
        yield
    finally:
        unlock()


def left(run: Path) -> str:
    """Which checkpoint there is, in words."""
    from diffusion_policy import checkpoint

    saved = checkpoint.steps_of(run)
    return f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"


def again(run: Path) -> str:
    """How to go on with a run, in words."""
    return f"go on with: diffusion-policy train --resume {shlex.quote(str(run))}"


def explain(run: Path, error: Diverged, episode_ends: np.ndarray) -> str:
    """What is known of a divergence, and what is left; the windows of its batch go into diverged.json."""
    import numpy as np

    told = ""
    if error.rows is not None:
        episodes = np.searchsorted(episode_ends, error.rows, side="right")
        steps = error.rows - np.concatenate([[0], episode_ends])[episodes]
        windows = [{"episode": int(e), "step": int(s)} for e, s in zip(episodes, steps, strict=True)]
        report = run / "diverged.json"
        report.write_text(json.dumps({"step": error.step, "windows": windows}, indent=1) + "\n")
        some = ", ".join(f"episode {one['episode']} step {one['step']}" for one in windows[:3])
        told = f"; its batch held {some}{' ...' if len(windows) > 3 else ''} (all in {report})"
    return f"{error}{told}; {left(run)}; look at these steps, or begin a new run with a lower learning rate"

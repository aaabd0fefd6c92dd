"""A trial of a sweep: one training, and the evaluation of its policy, in a process of its own.

Knows how a trial runs, and what sweep.json says of it. Knows no other trial.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from diffusion_policy.basics.files import FileError, read_json, remove
from diffusion_policy.commands.episodes import require_memory
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.options.acting import FIRST_TEST_SEED, PARALLEL
from diffusion_policy.commands.options.evaluate import Evaluate
from diffusion_policy.commands.options.train import RUN_FILE, Train, join_actions
from diffusion_policy.commands.points import type_of
from diffusion_policy.commands.policy_in_env import join_environment, refuse_seen_seeds
from diffusion_policy.commands.training_plan import make_plan, make_rollouts, make_sketch
from diffusion_policy.config import (
    ConfigError,
    PolicyConfig,
    SampleConfig,
    TrainConfig,
    decode,
    flat_options,
    list_types,
    to_json,
    with_options,
    with_todays_names,
)
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.evaluation.results import MAX_BRACKETS, MAX_BYTES, read_results
from diffusion_policy.training.trackers import read_lines

CURVE = 100
"""Most points of a curve in sweep.json."""


class Trial(NamedTuple):
    """One training of a sweep, and the evaluation of its policy."""

    name: str
    options: dict[str, Any]
    """What is varied, {field: value as JSON}."""
    train: Train
    episodes: int
    sampling: SampleConfig

    @property
    def trained(self) -> bool:
        """Whether there is a checkpoint of the last step."""
        return (self.train.output / f"step-{self.train.training.steps:06d}" / "config.json").is_file()

    @property
    def evaluated(self) -> bool:
        """Whether there are the results that were asked for."""
        return not self.episodes or (self.evaluation / "results.json").is_file()

    @property
    def evaluation(self) -> Path:
        """Its folder."""
        return self.train.output / "evaluation"


def require_possible(trial: Trial, store: EpisodeStore) -> None:
    """Raise ValueError for a trial that cannot be trained on this store, or whose policy cannot be rolled out or
    evaluated as asked: before any of its work is done."""
    train = trial.train
    point = make_sketch(train, store, make_plan(train, store))
    if (trial.episodes or train.training.rollout_every) and point.environment.id is None:
        raise ConfigError(f"{train.dataset} names no environment: give --episodes 0 and --rollout-every 0")
    if train.training.rollout_every:
        make_rollouts(train, store, point)
    if trial.episodes:
        joined = join_environment(train.dataset, point, sampling=trial.sampling)
        joined.env.close()
        require_memory(point.policy, trial.sampling, PARALLEL)
        refuse_seen_seeds(joined, range(FIRST_TEST_SEED, FIRST_TEST_SEED + trial.episodes))


# Running it


def run_trial(trial: Trial) -> str | None:
    """Train and evaluate, in a process that does nothing else, what of it is missing; returns what went wrong, None for
    nothing. What is printed goes into a file beside the trial's folder."""
    with open_log(trial.train.output.with_suffix(".log")) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        if not trial.trained:
            if (trial.train.output / RUN_FILE).is_file():  # it was interrupted
                dataclasses.replace(trial.train, resume=trial.train.output).run()
            else:
                remove(trial.train.output)
                trial.train.run()
        if not trial.evaluated:
            remove(trial.evaluation)
            Evaluate(
                trial.train.output,
                trial.evaluation,
                trial.episodes,
                sampling=trial.sampling,
                workers=1,
                videos=0,
                device=trial.train.device,
            ).run()
    except Exception as error:
        traceback.print_exc()
        expected = isinstance(error, ValueError | OSError | FloatingPointError | Failed | Interrupted)
        return " ".join(f"{'' if expected else f'{type(error).__name__}: '}{error}".split())
    return None


def open_log(path: Path) -> IO[str]:
    """A file to append to; what is no file there (a pipe would be waited for, a link leads elsewhere) is deleted."""
    if path.is_symlink() or not path.is_file():
        remove(path)
    return path.open("a")


# What it was told


def vary(config: Any, point: Mapping[str, Any]) -> Any:
    """A config with those of these options that are its own, {field: value as JSON}; raises ConfigError."""
    own = list_types(type(config)).keys() & point.keys()
    return with_options(config, **{name: decode(point[name], type_of(name), name) for name in own})


def to_flags(train: Train) -> list[str]:
    """The options of a training that are not the defaults, as its command takes them, into a folder beside it."""
    usual = flat_options(Train(train.dataset, train.output))
    given: list[str] = ["--dataset", train.dataset, "--output", f"{train.output}-again"]
    for option, value in flat_options(train).items():
        name = option.replace("_", "-")
        if option in usual and value == usual[option]:
            continue
        if isinstance(value, bool):
            given.append(f"--{name}" if value else f"--no-{name}")
        else:
            given += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return given


# Its row of sweep.json


class Data(NamedTuple):
    """What a trial was trained on."""

    dataset: str
    observation: tuple[str, ...]
    action: str | None
    angles: tuple[str, ...]


class Evaluated(NamedTuple):
    """How a trial was to be evaluated."""

    episodes: int
    sampling: SampleConfig


@dataclass(frozen=True)
class Earlier:
    """What an earlier sweep.json says of a trial, as far as it must be the same."""

    status: str
    data: Data
    evaluation: Evaluated
    policy: PolicyConfig
    training: TrainConfig

    @classmethod
    def of(cls, trial: Trial, status: str) -> "Earlier":
        """That of a trial of this sweep."""
        train = trial.train
        data = Data(train.dataset, train.observation, join_actions(train.action) or None, train.angles)
        return cls(status, data, Evaluated(trial.episodes, trial.sampling), train.policy, train.training)


def read_rows(path: Path) -> list[Earlier]:
    """The trials of a sweep.json; raises ValueError."""
    results = read_json(path, MAX_BYTES, MAX_BRACKETS)
    if not isinstance(results, dict):
        raise ConfigError(f"{path} must be a JSON object")
    rows = decode(results.get("trials"), tuple[dict[str, Any], ...], "trials")
    names = [option.name for option in dataclasses.fields(Earlier)]
    return [
        decode({name: row[name] for name in names if name in row}, Earlier, f"trials[{i}]")
        for i, row in enumerate(map(with_todays_names, rows))
    ]


def describe_trial(trial: Trial, reason: str | None = "") -> dict[str, Any]:
    """A trial's row of sweep.json; `reason`: why it failed, None if it did not, nothing if it has not run."""
    earlier = to_json(Earlier.of(trial, "finished" if reason is None else "failed" if reason else "waiting"))
    row: dict[str, Any] = {
        "name": trial.name,
        "status": earlier["status"],
        "reason": reason or None,
        "options": trial.options,
        "validation_loss": None,
        "success_rate": None,
        "curve": [],
        "command": shlex.join(["diffusion-policy", "train", *to_flags(trial.train)]),
        **earlier,
    }
    if reason == "":
        return row
    losses: list[tuple[int, float]] = []
    with contextlib.suppress(FileError):
        for _, line in read_lines(trial.train.output / "metrics.jsonl"):
            loss = line.get("validation_loss")
            if isinstance(loss, float) and math.isfinite(loss):
                losses.append((line["step"], loss))
    row["curve"] = losses[:: -math.ceil(len(losses) / CURVE) or None][::-1]
    if reason is None:
        row["validation_loss"] = losses[-1][1] if losses else None
        success = read_results(trial.evaluation)["success_rate"] if trial.episodes else {"value": None}
        row["success_rate"] = None if success["value"] is None else success
    return row

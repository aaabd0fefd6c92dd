"""What the results.json of an evaluation holds, and how one is read that anybody may have made.

Knows its fields and their types. Knows no page and no policy.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusion_policy.basics.files import plain, read_json
from diffusion_policy.basics.metric_table import evaluated_metrics
from diffusion_policy.config import ConfigError, decode
from diffusion_policy.evaluation.episode import FailedEpisode
from diffusion_policy.evaluation.intervals import Metric

FORMAT_VERSION = 1
"""Of results.json; the first had none."""
MAX_BYTES, MAX_BRACKETS = 2**25, 2**18
"""Of a results.json: some 100,000 episodes."""


@dataclass(frozen=True)
class ModeResult:
    """What was seen of one mode."""

    episodes: int
    successes: int
    success_rate: Metric


@dataclass(frozen=True)
class Demonstrated:
    """What the policy was trained on."""

    episodes: int
    modes: dict[str, int]
    mode_entropy: float | None


@dataclass(frozen=True)
class DelayRow:
    """The figures under one delay [control steps]."""

    steps: int
    success_rate: Metric
    mode_entropy: Metric
    measures: dict[str, Metric]


@dataclass(frozen=True)
class Backend:
    """What planned."""

    mode: str
    device: str
    threads: int
    machine: str


@dataclass(frozen=True)
class Versions:
    """Of the software."""

    package: str
    torch: str
    python: str


@dataclass(frozen=True)
class Outcome:
    """How one episode ended."""

    seed: int
    repeat: int
    success: bool
    mode: str | None
    steps: int
    measures: dict[str, float | None]


Setting = str | int | float | bool | None


@dataclass(frozen=True)
class BesideTeacher:
    """What a student's teacher did on the same seeds and noise."""

    checkpoint: str
    sampling: dict[str, Setting]
    success_rate: Metric
    mode_entropy: Metric
    commitment: Metric
    mode_agreement: Metric
    """Share of the episodes of a mode that the student ended in the same one."""
    milliseconds: dict[str, float]
    """Median time of a plan, of `teacher` and `student`."""


@dataclass(frozen=True)
class Results:
    """The fields of results.json beside its metrics and its LISTS; those with a default are younger than the first
    evaluations."""

    environment: str
    env_kwargs: dict[str, Any]
    signals: dict[str, Any]
    checkpoint: str
    training_steps: int
    episodes: int
    repeats: int
    measures: dict[str, Metric]
    modes: dict[str, ModeResult]
    mode_base: str | None
    demonstrations: Demonstrated
    delay: tuple[DelayRow, ...]
    control_period: float | None
    sampling: dict[str, Setting]
    planning_batch: int
    backend: Backend
    versions: Versions
    seeds_repeat: bool | None = None
    """Whether a seed repeats an episode of this environment; None where nobody knows."""
    wrappers: tuple[dict[str, Any], ...] = ()
    """Around the environment, the inner first."""
    weights_sha256: str = ""
    """Of the policy's weights, by which an evaluation knows its own results again."""
    action_horizon: int | None = None
    """Steps that were executed of each plan."""
    chunking: dict[str, Setting] | None = None
    """How plans were joined; None: receding horizon."""
    teacher: BesideTeacher | None = None
    """Of a student."""
    capped_steps: int | None = None
    """Steps after which the toolkit ended the episodes, where the environment has no time limit."""


ASKED = (
    "environment", "env_kwargs", "wrappers", "signals", "checkpoint", "training_steps", "weights_sha256", "repeats",
    "seeds", "sampling", "planning_batch", "action_horizon", "chunking", "costs",
)  # fmt: skip
"""The fields that say what was asked, and so decide the outcomes."""
LISTS = {"seeds": int, "errors": FailedEpisode, "outcomes": Outcome, "mode_failures": FailedEpisode}
"""What else it holds, as many as there are episodes."""
YOUNGER = {"mode_failures"}
"""Not in the first evaluations."""


def read_results(path: Path) -> dict[str, Any]:
    """What an evaluation's folder, or its results.json, holds, as plain JSON; raises ValueError for anything else, and
    for a newer format. Fields that are not known are left as they are; a metric that is younger than the file is
    undefined."""
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"there is no results.json of an evaluation at {path}")
    tree = plain(read_json(file, MAX_BYTES, MAX_BRACKETS))
    if isinstance(tree, dict):
        _refuse_newer(file, tree.get("format_version", 0))
        undefined = {"value": None, "low": None, "high": None}
        tree = {row.name: {} if row.parts else undefined for row in evaluated_metrics()} | tree
    try:
        _check(tree)
    except ConfigError as error:
        raise ConfigError(f"{file} holds no outcomes and numbers as evaluate writes them: {error}") from error
    return tree


def fingerprint(results: Mapping[str, Any]) -> str:
    """SHA-256 of what was evaluated and how each episode ended, which no later measurement changes: by it a page and
    kept episodes know their evaluation."""
    tree = {name: results.get(name) for name in (*ASKED, "outcomes")}
    if tree["chunking"] is None:  # as in evaluations that are older than it
        del tree["chunking"]
    return hashlib.sha256(json.dumps(plain(tree), sort_keys=True).encode()).hexdigest()


def _refuse_newer(file: Path, version: Any) -> None:
    """Raise ConfigError for a format that this package does not know."""
    if type(version) is not int or not 0 <= version <= FORMAT_VERSION:
        raise ConfigError(f"{file} has format version {version!r:.40}; this package reads up to {FORMAT_VERSION}")


def _check(tree: Any) -> None:
    """Raise ConfigError for what is no results.json."""
    if not isinstance(tree, dict):
        raise ConfigError("it is no JSON object")
    for name, kind in LISTS.items():
        if name in YOUNGER and name not in tree:
            continue
        if not isinstance(tree.get(name), list):
            raise ConfigError(f"{name} must be a list; got {tree.get(name)!r:.100}")
        for i, item in enumerate(tree[name]):
            decode(item, kind, f"{name}[{i}]")
    for row in evaluated_metrics():
        decode(tree[row.name], dict[str, Metric] if row.parts else Metric, row.name)
    known = {field.name for field in fields(Results)}
    decode({name: value for name, value in tree.items() if name in known}, Results, "")
    if not {"sampler", "sampling_steps"} <= tree["sampling"].keys():
        raise ConfigError("sampling must have sampler and sampling_steps")

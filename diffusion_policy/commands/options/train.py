"""What `diffusion-policy train` can be told: by flags, or by the run.json and config.json that earlier trainings wrote.

Knows JSON and the checks of each option. Imports neither torch nor a store, and starts no training.
"""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from diffusion_policy.basics.files import once_each, read_json
from diffusion_policy.commands.options.command import Command
from diffusion_policy.commands.trust import recorded_location, refuse_modules
from diffusion_policy.config import (
    ConfigError,
    Group,
    PolicyConfig,
    TrainConfig,
    decode,
    did_you_mean,
    to_json,
    with_options,
    with_todays_names,
)
from diffusion_policy.training.trackers import TrackerName

RUN_FILE = "run.json"
"""What a training was told, in its folder, written before the first step."""


@dataclass(frozen=True)
class Train(Command):
    """Train a diffusion policy on a dataset; write checkpoints and metrics.jsonl into a new folder.

    Ctrl-C and SIGTERM leave a checkpoint of the last step, after what is to be measured there; --resume goes on from
    there, or from the newest checkpoint after any other end. It is then the same training, on the CPU bit by bit.
    Started by torchrun or accelerate launch, several processes divide every batch.
    """

    program: ClassVar[str] = "diffusion_policy.commands.train"

    dataset: Annotated[str, Group("data")]
    """Store of demonstrations: a path or URL."""
    output: Annotated[Path, Group("")]
    """Folder of this run."""
    resume: Path | None = None
    """Go on with the training in this folder. It needs no other option; of those of policy and training only
    keep-checkpoints, checkpoint-every, rollout-every and rollout-episodes can change."""
    config: Path | None = None
    """Take policy and training options from this JSON, such as a checkpoint's config.json; flags override it."""
    observation: Annotated[tuple[str, ...], Group("data")] = ()
    """Keys of the store that the policy observes; by default those that the store names, else all but the action."""
    action: tuple[str, ...] = ()
    """Key of the store that holds the actions, or several, whose columns stand side by side; by default the one that
    the store names, else action."""
    angles: tuple[str, ...] = ()
    """Columns that are angles [rad], as state:4 or pose:3,4,5: the network sees their cosine and sine. By default those
    that the store names."""
    device: Annotated[str, Group("")] = "auto"
    """Device to train on: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""
    tracker: tuple[TrackerName, ...] = ()
    """Where numbers go beside metrics.jsonl. Each needs the extra of its name."""
    env: Annotated[str | None, Group("rollout")] = None
    """Environment of the rollouts, if not that of the demonstrations."""
    env_kwargs: str | None = None
    """Arguments of the rollouts' environment, as JSON."""
    image_size: int | None = None
    """Width and height [px] of an image that is observed in the rollouts, if their environment is not that of the
    demonstrations: of the task's own camera, in environments other than ours the picture that their render draws."""
    policy: Annotated[PolicyConfig, Group("policy")] = field(default_factory=PolicyConfig)
    training: Annotated[TrainConfig, Group("training")] = field(default_factory=TrainConfig)

    @classmethod
    def to_resume(cls, run: Path, dataset: str | None = None, trust: bool = False) -> Self:
        """The training of this folder, to go on with, on its own dataset unless one is named; raises ConfigError where
        there is none, where it alone names a URL, and, unless there is `trust`, where it names a module to import for
        its environment."""
        options = read_run(run)
        fields = to_fields(options, f"{run}/{RUN_FILE}")
        if not trust:
            refuse_modules(run, [fields.get("env")], [f"--env {fields.get('env')}"])
        return cls(dataset or recorded_location(run, options["dataset"]["location"]), run, resume=run, **fields)


@dataclass(frozen=True)
class TrainLatent(Train):
    """Train an autoencoder of action sequences, in whose latent space train --latent then has diffusion run.

    It is trained as policies are, and takes their options: of the policy those of horizons, target and normalization
    count, and those of the latent space. The validation's action error is that of what comes back.
    """

    def __post_init__(self) -> None:
        if self.policy.objective not in ("denoising", "autoencoding"):
            raise ConfigError(f"train-latent has no other objective; got --objective {self.policy.objective}")
        object.__setattr__(self, "policy", replace(self.policy, objective="autoencoding"))


@dataclass(frozen=True)
class TrainClassifier(Train):
    """Train a classifier of the modes of noised action sequences, which then leads any policy of the same actions to a
    mode: --classifier of evaluate, rollout, live, study and forecast.

    It is trained as policies are, on demonstrations with modes, and takes their options: horizons, target,
    normalization and noise schedule are those of the policy that it shall lead. The loss is the cross-entropy over all
    noise levels.
    """

    def __post_init__(self) -> None:
        if self.policy.objective not in ("denoising", "classifying"):
            raise ConfigError(f"train-classifier has no other objective; got --objective {self.policy.objective}")
        policy = replace(self.policy, objective="classifying", condition_on_mode=True)
        object.__setattr__(self, "policy", policy)


NOT_KEPT = {"dataset", "output", "resume", "config"}
"""Fields of `Train` that no file says: where it lies, and what it learns from, which has a form of its own there."""
KEPT = {name: hint for name, hint in get_type_hints(Train).items() if name not in NOT_KEPT | {"program"}}
"""Fields of `Train` that a file of options may say, with their types."""
IN_JSON = KEPT | {"action": str | None}
"""Those types in JSON, where the actions of several arrays are one key, `a+b`."""
BESIDE = {
    "dataset", "format", "format_version", "package_version", "step", "metrics", "shapes", "environment", "files",
    "instructions", "embedding_size",
}  # fmt: skip
"""What else a run.json or a checkpoint's config.json holds."""


@dataclass(frozen=True)
class Data:
    """What a run.json says of its dataset."""

    location: str
    fingerprint: str


def read_options(path: Path) -> dict[str, Any]:
    """A JSON that holds options of training: a run.json, or the config.json of a checkpoint. Raises ValueError."""
    options = read_json(path, pairs=once_each)
    if not isinstance(options, dict) or not options.keys() & {"policy", "training"}:
        raise ConfigError(f"{path} must be a JSON object with `policy` or `training`")
    known = [*KEPT, *sorted(BESIDE)]
    for name in options.keys() - set(known):
        raise ConfigError(f"{path}: unknown option {reprlib.repr(name)}; {did_you_mean(name, sorted(known))}")
    return options


def fields_of_teacher(teacher: Path) -> dict[str, Any]:
    """What a student is told as its teacher was, as fields of `Train`: policy, keys and angles. Raises ValueError where
    there is none."""
    folders = [
        path.parent
        for path in teacher.glob("step-*/config.json")
        if re.fullmatch(r"\d{1,18}", path.parent.name[5:], re.ASCII)
    ]
    newest = max(folders, key=lambda folder: int(folder.name[5:]), default=teacher)
    path = (teacher if os.path.lexists(teacher / "config.json") else newest) / "config.json"
    if not os.path.lexists(path):
        raise ConfigError(f"no teacher at {teacher}: neither config.json nor a folder step-... is there")
    fields = to_fields(read_options(path), path)
    fields["policy"] = with_options(fields["policy"], objective="denoising", student_steps=0)
    return {name: value for name, value in fields.items() if name in ("policy", "observation", "action", "angles")}


def read_run(run: Path) -> dict[str, Any]:
    """What the training in a folder was told; raises ValueError where there is none."""
    if not os.path.lexists(run / RUN_FILE):
        raise ConfigError(f"{run} holds no training to go on with: it has no {RUN_FILE}")
    options = read_options(run / RUN_FILE)
    try:
        decode(options.get("dataset"), Data, "dataset")
    except ConfigError as error:
        raise ConfigError(f"{run}/{RUN_FILE} does not say which dataset it was: {error}") from error
    return options


def to_fields(options: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Options that a file (`source`) gives as fields of `Train`; raises ConfigError for unknown names, with the
    nearest, and for wrong types."""
    options = with_todays_names(options)
    try:
        found = {name: decode(options[name], hint, name) for name, hint in IN_JSON.items() if name in options}
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    if found.get("action") is not None:
        found["action"] = (found["action"],)
    return {name: value for name, value in found.items() if value is not None}


def to_options(train: Train, fingerprint: str, labels: Sequence[Any] = ()) -> dict[str, Any]:
    """What a training is told, as JSON; `fingerprint`: that of its rows; `labels`: what it learns of modes or
    instructions."""
    if labels:
        fingerprint = hashlib.sha256(json.dumps([fingerprint, *labels]).encode()).hexdigest()
    return {
        "dataset": {"location": absolute(train.dataset), "fingerprint": fingerprint},
        **{name: to_json(getattr(train, name)) for name in KEPT},
        "action": join_actions(train.action) or None,
    }


def join_actions(names: str | Sequence[str]) -> str:
    """The one key of actions that lie in several arrays, side by side: `a+b`; empty for none."""
    return names if isinstance(names, str) else "+".join(names)


def absolute(location: str) -> str:
    """A path that does not depend on the working directory; a URL as it is."""
    return str(Path(location).resolve()) if Path(location).exists() else location

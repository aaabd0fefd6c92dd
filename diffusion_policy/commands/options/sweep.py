"""What `diffusion-policy sweep` can be told."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from diffusion_policy.commands.options.command import Command
from diffusion_policy.commands.options.train import KEPT
from diffusion_policy.config import (
    MAX_EPISODES,
    ConfigError,
    Group,
    PolicyConfig,
    SampleConfig,
    TrainConfig,
    require_at_least,
    require_at_most,
)
from diffusion_policy.evaluation.engines import Engine, require_engine

MAX_TRIALS = 1000


@dataclass(frozen=True)
class Sweep(Command):
    """Train a policy for each point of a grid, or for random draws, each in a process of its own, and evaluate it.

    Writes a folder for each trial, with a log file beside it, sweep.json, and sweep.html, which works offline. A trial
    that fails is listed with its reason. --resume leaves out the trials that are finished.
    """

    program: ClassVar[str] = "diffusion_policy.commands.sweep"

    dataset: Annotated[str, Group("data")]
    """Store of demonstrations: a path or URL."""
    output: Annotated[Path, Group("")]
    """Folder of this sweep."""
    grid: Annotated[tuple[str, ...], Group("search")] = ()
    """Options and their values, any of those of policy and training: learning-rate=1e-4,3e-4 widths=32:64,64:128. Every
    combination is a trial."""
    random: tuple[str, ...] = ()
    """Options and what to draw them from, by --seed, instead of a grid: learning-rate=log:1e-5:1e-3
    condition-dropout=uniform:0:0.2 steps=int:1000:2000 widths=choice:32:64,64:128."""
    runs: int = 8
    """Trials of a random search; the first ones stay the same when there are more."""
    episodes: Annotated[int, Group("evaluation")] = 20
    """Unseen seeds that each policy is evaluated on; 0 for none."""
    metric: Annotated[Literal["validation_loss", "success_rate"], Group("search")] = "validation_loss"
    """What the best trial is best in."""
    workers: Annotated[int, Group("")] = 1
    """Trials at a time; they share the processor cores."""
    engine: Engine = "local"
    """Where the trials run: on this machine, or on the Ray cluster of the environment variable RAY_ADDRESS, whose
    machines must all see dataset and output."""
    gpus: float = 0.0
    """GPUs of the cluster that each trial takes; with 0.5, two share one."""
    resume: bool = False
    """Go on with the sweep in the output folder; its trials must be the same, but there may be more."""
    config: Path | None = None
    """Take policy and training options from this JSON, such as a checkpoint's config.json; flags override it."""
    observation: Annotated[tuple[str, ...], Group("data")] = ()
    """Keys of the store that the policies observe; by default those that the store names, else all but the action."""
    action: tuple[str, ...] = ()
    """Key of the store that holds the actions, or several, whose columns stand side by side; by default the one that
    the store names, else action."""
    angles: tuple[str, ...] = ()
    """Columns that are angles [rad], as state:4 or pose:3,4,5. By default those that the store names."""
    device: Annotated[str, Group("")] = "auto"
    """Device of each trial: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""
    policy: Annotated[PolicyConfig, Group("policy")] = field(default_factory=PolicyConfig)
    training: Annotated[TrainConfig, Group("training")] = field(default_factory=TrainConfig)
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("runs", "workers"))
        require_at_least(self, 0, ("episodes", "gpus"))
        require_at_most(self, MAX_TRIALS, ("runs", "workers", "gpus"))
        require_at_most(self, MAX_EPISODES, ("episodes",))
        require_engine(self.engine)
        if self.gpus and self.engine == "local":
            raise ConfigError(f"gpus are those of a Ray cluster: they need --engine ray; got {self.gpus:g}")
        if self.metric == "success_rate" and self.episodes == 0:
            raise ConfigError("the metric success_rate needs episodes of at least 1; got 0")


OF_A_TRAINING = tuple(option.name for option in fields(Sweep) if option.name in KEPT)
"""What every trial is told alike, but for what is varied: fields of `Train` that a file of options may say, too."""

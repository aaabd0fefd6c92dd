"""What `diffusion-policy doctor` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import ConfigError, Group, PolicyConfig, SampleConfig, require_at_least, require_seed


@dataclass(frozen=True)
class Doctor(Command):
    """Check a dataset, a trained policy, or both, and say what to do. Exit status 1 when a check fails.

    With a dataset alone the options of the policy are those given here; with a checkpoint they are its own. Without
    --dataset a checkpoint's own dataset is looked for where it was.
    """

    program: ClassVar[str] = "diffusion_policy.commands.doctor"

    dataset: Annotated[str | None, Group("data")] = None
    """Store of demonstrations: a path or URL."""
    checkpoint: Annotated[Path | None, Group("")] = None
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    output: Path | None = None
    """Folder for doctor.json and noised.png, a picture of an action sequence at a low, a middle and a high noise level;
    without it neither is written."""
    observation: Annotated[tuple[str, ...], Group("data")] = ()
    """Keys of the store to observe where no checkpoint says; by default those that it names, else all others."""
    action: tuple[str, ...] = ()
    """Key of the actions where no checkpoint says, or several, whose columns stand side by side; by default the one
    that the store names, else action."""
    angles: tuple[str, ...] = ()
    """Columns that are angles [rad] where no checkpoint says, as state:4; by default those that the store names."""
    overfit_steps: Annotated[int, Group("")] = 2000
    """Training steps of the test that a new network can learn 32 windows by heart; 0 leaves it out."""
    seed: int = 0
    """Seed of windows, noise and weights."""
    device: str = "auto"
    """Device to compute on: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)
    policy: Annotated[PolicyConfig, Group("policy")] = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        require_at_least(self, 0, ("overfit_steps",))
        require_seed(self)
        if self.dataset is None and self.checkpoint is None:
            raise ConfigError("the doctor needs a --dataset, a --checkpoint, or both")

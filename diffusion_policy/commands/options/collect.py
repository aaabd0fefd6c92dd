"""What `diffusion-policy collect` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from diffusion_policy.commands.options.acting import parse_env_kwargs
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import ConfigError, Group, SuccessAndModes, require_at_least, require_numbers, require_seed
from diffusion_policy.evaluation.engines import Engine, available_cores, require_engine


@dataclass(frozen=True)
class Collect(Command):
    """Collect demonstrations with the environment's scripted experts, every mode in turn, into a zarr store.

    Only successful episodes are stored. Ctrl-C and SIGTERM end it at once, also where a simulator hangs. Whatever ends
    it, these or a crash, the episodes that have finished are kept; --resume STORE goes on with the next seed, and ends
    with the same store as if it had never stopped.
    """

    program: ClassVar[str] = "diffusion_policy.commands.collect"

    output: Path | None = None
    """Store to create, such as demonstrations.zarr."""
    resume: Path | None = None
    """Store of an interrupted collection to go on with, instead of --output."""
    env: Annotated[str | None, Group("environment")] = None
    """Gymnasium id of the environment; by default diffusion_policy/Avoid-v0."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON: '{"rows": 3}'."""
    image_size: int | None = None
    """Observe an image of this width and height [px] beside the state: of the task's own camera, in environments other
    than ours the picture that their render draws."""
    expert: str | None = None
    """Expert, module:Class, called with a mode's label (None where the environment lists no modes), if not ours
    for this environment. The module may lie in the working directory."""
    signals: Annotated[SuccessAndModes, Group("environment")] = field(default_factory=SuccessAndModes)
    episodes: Annotated[int | None, Group("episode")] = None
    """Successful episodes to store; by default 240, or what the interrupted collection was asked for."""
    seed: int | None = None
    """Seed of the first episode, by default 0; the next episode has the next seed."""
    noise: float | None = None
    """Standard deviation of the noise on each executed action, as a share of its length; by default 0.4. The clean
    action is recorded, so the policy learns to come back from where the noise leads."""
    workers: Annotated[int, Group("simulation")] = field(default_factory=available_cores)
    """Worker processes; the result is the same for any number. An episode whose process dies is begun again in a fresh
    one; with 1 worker it runs in the command's own process, which dies with it."""
    engine: Engine = "local"
    """Where the episodes run: on this machine, or on the Ray cluster of the environment variable RAY_ADDRESS (without
    it, one is started here). The result is the same."""
    sync: Annotated[bool, Group("")] = True
    """Put each commit on the disk before going on, so that a loss of power takes no committed episode. Without it the
    system writes when it sees fit, some seconds later, and short episodes are collected faster."""

    def __post_init__(self) -> None:
        if (self.output is None) == (self.resume is None):
            raise ConfigError("collect needs either --output, a store to create, or --resume, one to go on with")
        if self.image_size is not None and self.resume is not None:
            raise ConfigError("--image-size is for --output; a collection goes on with the images it was begun with")
        require_at_least(self, 1, ("workers",))
        require_engine(self.engine)
        if self.episodes is not None:
            require_at_least(self, 1, ("episodes",))
        if self.noise is not None:
            require_at_least(self, 0, ("noise",))
        if self.seed is not None:
            require_seed(self)
        require_numbers(self)
        if self.env_kwargs is not None:
            parse_env_kwargs(self.env_kwargs)
        if self.signals.mode_function and not self.signals.mode_labels:
            raise ConfigError("a dataset lists all its modes: give those of --mode-function with --mode-labels")

"""What `diffusion-policy run-robot` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from diffusion_policy.commands.options.acting import anchor
from diffusion_policy.commands.options.command import Command
from diffusion_policy.commands.options.remote import RemoteOptions
from diffusion_policy.config import (
    BackendName,
    ChunkingConfig,
    ConfigError,
    Group,
    PlanningPrecision,
    SampleConfig,
    require_at_least,
    require_seed,
)


@dataclass(frozen=True)
class RunRobot(Command):
    """Steer a robot at a fixed rate, while plans are made beside it, and keep all that happened.

    A robot is a class, module:Class, with observe() -> {key: values} (None ends the run), act(action) and stop(). Where
    one of them raises, hangs or gives NaN, on Ctrl-C and on SIGTERM, stop() is called at once, and the log is kept.
    OUTPUT/log.zarr is a dataset like demonstrations, with the plans beside the actions; OUTPUT/run.html shows rate,
    jitter, latency and plans.
    """

    program: ClassVar[str] = "diffusion_policy.commands.run_robot"

    robot: tyro.conf.Positional[str]
    """The robot, module:Class; the module may lie in the working directory."""
    output: Path
    """Folder to create for the log and its page."""
    hz: float
    """Control steps in a second."""
    checkpoint: Path | None = None
    """Folder of a run (its newest checkpoint), of one checkpoint, or of an exported policy; or give --server."""
    steps: int | None = None
    """Control steps after which the run ends; by default it goes on until the robot ends it, or Ctrl-C."""
    robot_kwargs: str | None = None
    """Arguments of the robot's class, as JSON: '{"seed": 3}'."""
    seed: int = 0
    """Seed of the planning noise."""
    dry_run: bool = False
    """Observe and plan, but do not act."""
    action_horizon: Annotated[int | None, Group("control")] = None
    """Steps executed before planning again (Ta); by default that of the policy's training."""
    delay_steps: int | None = None
    """Control steps that plans are made to be late for; by default as many as the last plans took, counted in actions;
    0 waits for each plan."""
    chunking: Annotated[ChunkingConfig, Group("control")] = field(default_factory=ChunkingConfig)
    watchdog: Annotated[float, Group("safety")] = 1.0
    """Longest time for which the robot may not answer, or be without a plan, before it is stopped [s]."""
    low: tuple[float, ...] | None = None
    """Least value of an action: a number for all, or one for each of its numbers."""
    high: tuple[float, ...] | None = None
    """Greatest value of an action."""
    change: tuple[float, ...] | None = None
    """Largest change from one action to the next."""
    rate: tuple[float, ...] | None = None
    """Largest change of an action in a second."""
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)
    backend: Annotated[BackendName, Group("sampling")] = "auto"
    """What samples, as in rollout; of an exported policy onnx (auto) or openvino."""
    precision: PlanningPrecision = "fp32"
    """Numbers that the network computes with: fp32, or bf16, which onnx has not."""
    remote: Annotated[RemoteOptions, Group("server")] = field(default_factory=RemoteOptions)
    device: Annotated[str, Group("")] = "auto"
    """Device that plans: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""

    def __post_init__(self) -> None:
        anchor(self)
        self.remote.refuse(self, "backend", "precision", "device")
        require_seed(self)
        if (self.checkpoint is None) == (self.remote.server is None):
            raise ConfigError("run-robot takes --checkpoint or --server, one of them")
        for name in ("hz", "watchdog"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name)}")
        if self.steps is not None:
            require_at_least(self, 1, ("steps",))
        if self.delay_steps is not None:
            require_at_least(self, 0, ("delay_steps",))

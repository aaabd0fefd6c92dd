"""What `diffusion-policy benchmark` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from diffusion_policy.commands.options.acting import anchor
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import BackendName, ConfigError, Group, PolicyConfig, SampleConfig, require_at_least
from diffusion_policy.evaluation.engines import available_cores

PartName = Literal["planning", "training", "data", "rollout"]
MOST_SEQUENCES = 4096
"""In one planning call."""


@dataclass(frozen=True)
class Benchmark(Command):
    """Measure this machine: how long a plan takes by each backend, and how many windows a second are trained on and
    gathered, and how many steps a second are rolled out.

    Each figure stands beside the plain way of doing it, measured in the same run, and beside what the machine allows:
    the memory's bandwidth, which bounds a plan for one robot, and the rate of matrix products. Run nothing else
    meanwhile.

    From Python: `Benchmark(sampling=SampleConfig(sampling_steps=10)).run()` returns what benchmark.json holds.
    """

    program: ClassVar[str] = "diffusion_policy.commands.benchmark"

    checkpoint: Path | None = None
    """Folder of a run or of one checkpoint; without it, a policy that is not trained, for --env."""
    output: Path | None = None
    """Folder to create, for benchmark.json and benchmark.png."""
    only: tuple[PartName, ...] = ("planning", "training", "data", "rollout")
    """Parts to measure."""
    profile: bool = False
    """Name the operators that cost most, in a plan and in a training step."""
    env: Annotated[str | None, Group("rollout")] = None
    """Gymnasium id of the rollouts; by default that of the checkpoint, or diffusion_policy/BlockPush-v0."""
    episodes: int = 50
    """Episodes of the rollouts."""
    workers: int = field(default_factory=available_cores)
    """Processes that simulate in them."""
    rows: Annotated[tuple[int, ...], Group("planning")] = (1, 16, 64)
    """Observations in one planning call, one after another."""
    samples: tuple[int, ...] = (16, 64)
    """Sequences sampled for one observation, one after another."""
    backends: tuple[BackendName, ...] = ()
    """Backends to measure; by default eager, onnx and openvino where they are installed, and graph on a GPU."""
    plans: int = 50
    """Plans of each backend and size, fewer where that takes longer than ten seconds."""
    control_rate: float | None = None
    """Control steps of the robot in a second [1/s], to say whether a plan fits."""
    device: Annotated[str, Group("")] = "auto"
    """Device that plans and trains: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""
    policy: Annotated[PolicyConfig, Group("policy")] = field(default_factory=PolicyConfig)
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        anchor(self)
        require_at_least(self, 1, ("episodes", "workers", "plans"))
        for name in ("rows", "samples"):
            wrong = [number for number in getattr(self, name) if not 1 <= number <= MOST_SEQUENCES]
            if wrong:
                raise ConfigError(f"{name} must be from 1 to {MOST_SEQUENCES}; got {wrong[0]}")
        if not self.only:
            raise ConfigError("only must name at least one part: planning, training, data, rollout")
        if self.control_rate is not None and not 0 < self.control_rate < float("inf"):
            raise ConfigError(f"control-rate must be above 0; got {self.control_rate}")

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Observations and samples of each size that is measured."""
        return [*((rows, 1) for rows in self.rows), *((1, number) for number in self.samples if number > 1)]

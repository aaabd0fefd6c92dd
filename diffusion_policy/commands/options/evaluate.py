"""What `diffusion-policy evaluate` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from diffusion_policy.commands.options.acting import (
    FIRST_TEST_SEED,
    PARALLEL,
    ActingCommand,
    anchor,
    require_episodes,
)
from diffusion_policy.commands.options.remote import RemoteOptions
from diffusion_policy.config import BackendName, ConfigError, Group, SampleConfig, require_at_least, require_seed
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine, require_engine

MOST_VIDEOS = 200
"""All of them lie in one page."""


@dataclass(frozen=True)
class Evaluate(ActingCommand):
    """Roll a policy out on unseen seeds; write results.json, episodes.zarr and report.html into a new folder.

    Everything in results.json but the times is the same for any number of workers. An episode whose simulator raises an
    error, crashes or hangs is begun again; if that happens twice it is listed under `errors` and counts nowhere else.
    Results and episodes are kept before anything is filmed or drawn; where that fails or is stopped, the same command
    does not run the episodes again, but writes the page. episodes.zarr is a dataset of the first delay's episodes, of
    the first of them where all would take more than 512 MB; `report` and `compare` draw their paths from it.
    """

    program: ClassVar[str] = "diffusion_policy.commands.evaluate"

    output: Path
    """Folder of this evaluation."""
    episodes: Annotated[int, Group("episode")] = 100
    """Seeds, one after another; each gives an episode, or several with --repeats."""
    seed: int = FIRST_TEST_SEED
    """Seed of the first episode; seeds of the demonstrations are refused."""
    repeats: int = 1
    """Episodes of each seed: the same initial state under other planning noise. More than 1 gives the conditional
    entropy."""
    delay_steps: tuple[int, ...] = (0,)
    """Control steps that planning takes, while the plan before runs on. Several, as in 0 2 4, give curves of success
    and entropy against delay; the scorecard is that of the first."""
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)
    parallel: Annotated[int, Group("simulation")] = PARALLEL
    """Environments that run at once; a planning batch has half as many observations. It is part of the result: another
    number can change the last digits of a plan."""
    engine: Engine = "local"
    """Where the episodes run: on this machine, or on the Ray cluster of the environment variable RAY_ADDRESS (without
    it, one is started here). The result is the same."""
    hang_after: float = HANG_AFTER
    """A simulator that does not answer within this time [s] hangs: its episode is begun again. Needs two workers, or
    Ray."""
    teacher: bool = True
    """Run the teacher of a student on the same seeds too, and show both side by side."""
    videos: Annotated[int, Group("")] = 6
    """Episodes to film for the page: one of each mode, then failures."""
    backend: Annotated[BackendName, Group("sampling")] = "eager"
    """What samples: torch, operator by operator (eager, which repeats to the bit on one machine); a network compiled by
    torch.compile; one CUDA graph (graph); onnxruntime (onnx); OpenVINO (openvino); or the fastest of eager, onnx and
    openvino here, measured (auto). All but eager can change the last digits of an action."""

    remote: Annotated[RemoteOptions, Group("server")] = field(default_factory=RemoteOptions)

    def __post_init__(self) -> None:
        anchor(self)
        self.remote.refuse(self, "backend")
        self.remote.refuse_costs(self.costs)
        require_at_least(self, 1, ("episodes", "workers", "parallel", "repeats"))
        require_at_least(self, 0, ("videos",))
        if self.videos > MOST_VIDEOS:
            raise ConfigError(f"videos must be at most {MOST_VIDEOS}, since one page holds them; got {self.videos}")
        require_episodes(self.episodes * self.repeats * len(self.delay_steps), self.parallel)
        require_seed(self)
        require_engine(self.engine)
        if not self.hang_after > 0:
            raise ConfigError(f"hang-after must be above 0; got {self.hang_after}")
        if not self.delay_steps or len(set(self.delay_steps)) < len(self.delay_steps):
            raise ConfigError(f"delay-steps must be different numbers, at least one; got {self.delay_steps}")

    @property
    def seeds(self) -> range:
        """Those of the episodes."""
        return range(self.seed, self.seed + self.episodes)

"""What `diffusion-policy rollout` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from diffusion_policy.commands.options.acting import (
    FIRST_TEST_SEED,
    ActingCommand,
    anchor,
    require_episodes,
    require_video,
)
from diffusion_policy.commands.options.remote import RemoteOptions
from diffusion_policy.config import (
    BackendName,
    ConfigError,
    Group,
    PlanningPrecision,
    SampleConfig,
    require_at_least,
    require_seed,
)


@dataclass(frozen=True)
class Rollout(ActingCommand):
    """Run a few episodes of a policy, print how each ended, and film them if asked."""

    program: ClassVar[str] = "diffusion_policy.commands.rollout"

    episodes: Annotated[int, Group("episode")] = 4
    """Episodes to run, one a seed."""
    seed: int = FIRST_TEST_SEED
    """Seed of the first episode."""
    delay_steps: int = 0
    """Control steps that planning takes, while the plan before runs on."""
    video: Annotated[Path | None, Group("")] = None
    """Film the episodes side by side into this .mp4 or .gif, with sampled sequences drawn in at every re-planning where
    the environment says where they would lead."""
    render: Literal["human"] | None = None
    """Where to show the episodes: human opens the simulator's window, and they run one after another, in real time."""
    record: Path | None = None
    """Store to create with these episodes, observations and actions as they were; failures are stored too."""
    keep_images: bool = False
    """Store the images that were observed with --record too. They are held in memory until then, at most 2 GB; without
    this, `dataset render` adds them later."""
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)
    backend: Annotated[BackendName, Group("sampling")] = "auto"
    """What samples: the fastest of eager, onnx and openvino here, measured (auto); torch, operator by operator (eager);
    a network compiled by torch.compile; one CUDA graph (graph); onnxruntime (onnx); OpenVINO (openvino). They differ in
    the last digits of an action."""
    precision: PlanningPrecision = "fp32"
    """Numbers that the network computes with: fp32, or bf16, which onnx has not."""
    remote: Annotated[RemoteOptions, Group("server")] = field(default_factory=RemoteOptions)

    def __post_init__(self) -> None:
        anchor(self)
        self.remote.refuse(self, "backend")
        self.remote.refuse_costs(self.costs)
        require_at_least(self, 1, ("episodes", "workers"))
        if self.keep_images and self.record is None:
            raise ConfigError("--keep-images is for --record; without it no image is stored")
        require_at_least(self, 0, ("delay_steps",))
        require_episodes(self.episodes)
        require_seed(self)
        require_video(self.video, self.episodes)

    @property
    def seeds(self) -> range:
        """Those of the episodes."""
        return range(self.seed, self.seed + self.episodes)

"""What `diffusion-policy study` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import tyro

from diffusion_policy.commands.options.acting import FIRST_TEST_SEED, ActingCommand, anchor, require_episodes
from diffusion_policy.config import ConfigError, Group, SampleConfig, SamplerName, require_at_least, require_seed


@dataclass(frozen=True)
class Study(ActingCommand):
    """Roll one checkpoint out under each sampler at several numbers of steps: success, mode entropy and milliseconds,
    as a table, results.json and samplers.png. What is done is kept in results.json at every moment. Episodes that could
    not be run are counted for each of them; where none could be run, it says why, and the study goes on."""

    program: ClassVar[str] = "diffusion_policy.commands.study"

    output: Path
    """Folder of this study."""
    what: tyro.conf.Positional[Literal["samplers"]] = field(kw_only=True)
    """What the study varies."""
    samplers: Annotated[tuple[SamplerName, ...], Group("sampling")] = get_args(SamplerName)
    """Samplers to try; by default all."""
    steps: tuple[int, ...] = ()
    """Numbers of sampling steps to try; by default 1, 2, 4, 8, 16, 32 and all noise levels that a sampler can use."""
    mode: str | None = None
    """Steer a policy that was trained with --condition-on-mode to this mode."""
    guidance: float = 0.0
    """Weight of classifier-free guidance, as in evaluate."""
    episodes: Annotated[int, Group("episode")] = 100
    """Episodes for each sampler and number of steps, the same seeds each time."""
    seed: int = FIRST_TEST_SEED
    """Seed of the first episode; seeds of the demonstrations are refused."""

    def __post_init__(self) -> None:
        anchor(self)
        require_at_least(self, 1, ("episodes", "workers"))
        require_seed(self)
        require_episodes(self.episodes)
        if not self.samplers:
            raise ConfigError(f"name at least one of the samplers {', '.join(get_args(SamplerName))}")
        for name in self.samplers:
            for steps in self.steps or (1,):
                self.sampling(name, steps)

    @property
    def seeds(self) -> range:
        """Those of the episodes, for each sampler and number of steps."""
        return range(self.seed, self.seed + self.episodes)

    def sampling(self, name: SamplerName, steps: int) -> SampleConfig:
        """How one sampler draws at one number of steps; raises ConfigError where it cannot."""
        return SampleConfig(name, steps, mode=self.mode, guidance=self.guidance)

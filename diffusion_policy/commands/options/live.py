"""What `diffusion-policy live` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from diffusion_policy.commands.options.acting import FIRST_TEST_SEED, ActingCommand, anchor
from diffusion_policy.config import ConfigError, Group, SampleConfig, require_at_least, require_seed


@dataclass(frozen=True)
class Live(ActingCommand):
    """Watch a policy act in the browser, steer it, take over with the mouse, and record demonstrations.

    Prints an address of this machine alone, with a token in it; whoever has that may steer. The page shows the plans
    that the policy could have made, the one it follows, and how that came out of noise. Mode, guidance, sampler, steps,
    chunking and delay can be changed while it runs; in BlockPush and Push-T, the mouse can also push a block. With
    --record what is done by mouse becomes demonstrations, and so do corrections; the store's column actor says who
    acted (0 the policy, 1 a person), its column pushed in which steps a block was pushed. Needs the extra serve.
    """

    program: ClassVar[str] = "diffusion_policy.commands.live"

    port: Annotated[int, Group("")] = 8010
    """Port to listen on; 0 takes a free one."""
    record: Path | None = None
    """Store to create for demonstrations, or one that `live` has made, to go on with."""
    seed: Annotated[int, Group("episode")] = FIRST_TEST_SEED
    """Seed of the first episode."""
    delay_steps: Annotated[int, Group("control")] = 0
    """Control steps that planning takes, while the plan before runs on."""
    fan: Annotated[int, Group("sampling")] = 12
    """Plans that are drawn beside the one that is followed; 0 draws none, which is faster."""
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        anchor(self)
        require_seed(self)
        require_at_least(self, 0, ("delay_steps", "fan"))
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port must be from 0 to 65535; got {self.port}")
        if self.fan > 64:
            raise ConfigError(f"fan must be at most 64; got {self.fan}")

"""What `diffusion-policy demo` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.commands.options.acting import FIRST_TEST_SEED
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import ConfigError, require_seed

EPISODES = 100
"""Of the evaluation."""


@dataclass(frozen=True)
class Demo(Command):
    """Collect, train, evaluate, and write a page: a robot arm that has learned six ways past its obstacles.

    It takes some ten minutes on two CPU cores. The same steps by hand are the commands collect, train and evaluate.
    """

    program: ClassVar[str] = "diffusion_policy.commands.demo"

    output: Path = Path("runs/demo")
    """Folder for the demonstrations, the policy and the evaluation."""
    seed: int = 0
    """Seed of demonstrations and training; the evaluation's seeds start 100,000 later."""

    def __post_init__(self) -> None:
        require_seed(self)
        if self.seed + FIRST_TEST_SEED + EPISODES - 1 > MOST_SEED:
            raise ConfigError(f"seed must be at most {MOST_SEED - FIRST_TEST_SEED - EPISODES + 1}; got {self.seed}")

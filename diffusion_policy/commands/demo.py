"""diffusion-policy demo: the whole job in some minutes."""

from dataclasses import dataclass
from pathlib import Path

from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.episodes import FIRST_TEST_SEED
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.terminal import console
from diffusion_policy.commands.train import Train
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, require_seed

STEPS = 5000
"""Of the training."""
EPISODES = 100
"""Of the evaluation."""


@dataclass(frozen=True)
class Demo:
    """Collect, train, evaluate, and write a page: a robot arm that has learned six ways past its obstacles.

    It takes some ten minutes on two CPU cores. The same steps by hand are the commands collect, train and evaluate.
    """

    output: Path = Path("runs/demo")
    """Folder for the demonstrations, the policy and the evaluation."""
    seed: int = 0
    """Seed of demonstrations and training; the evaluation's seeds start 100,000 later."""

    def __post_init__(self) -> None:
        require_seed(self)
        if self.seed + FIRST_TEST_SEED + EPISODES - 1 > MOST_SEED:
            raise ConfigError(f"seed must be at most {MOST_SEED - FIRST_TEST_SEED - EPISODES + 1}; got {self.seed}")

    def run(self) -> None:
        """Run everything; raises ConfigError when the output folder holds something."""
        require_fresh(self.output)
        demonstrations, policy, evaluation = (
            self.output / name for name in ("demonstrations.zarr", "policy", "evaluation")
        )
        console.rule("1 of 3: demonstrations")
        Collect(demonstrations, seed=self.seed).run()
        console.rule("2 of 3: training")
        Train(
            str(demonstrations),
            policy,
            policy=PolicyConfig(widths=(32, 64, 128)),
            training=TrainConfig(steps=STEPS, learning_rate=1e-3, seed=self.seed),
        ).run()
        console.rule("3 of 3: evaluation")
        Evaluate(policy, evaluation, episodes=EPISODES, seed=self.seed + FIRST_TEST_SEED).run()
        console.print()
        console.print(f"Open {(evaluation / 'report.html').resolve()} in a browser.", soft_wrap=True)

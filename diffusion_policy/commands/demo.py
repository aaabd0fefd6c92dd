"""diffusion-policy demo: the whole job in some minutes."""

from diffusion_policy.commands.options.acting import FIRST_TEST_SEED
from diffusion_policy.commands.options.collect import Collect
from diffusion_policy.commands.options.demo import EPISODES, Demo
from diffusion_policy.commands.options.evaluate import Evaluate
from diffusion_policy.commands.options.train import Train
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import PolicyConfig, TrainConfig, with_options

STEPS = 5000
"""Of the training."""


def run(options: Demo) -> None:
    """Run everything; raises ConfigError when the output folder holds something."""
    require_fresh(options.output)
    demonstrations, policy, evaluation = (
        options.output / name for name in ("demonstrations.zarr", "policy", "evaluation")
    )
    console.rule("1 of 3: demonstrations")
    Collect(demonstrations, seed=options.seed).run()
    console.rule("2 of 3: training")
    Train(
        str(demonstrations),
        policy,
        policy=with_options(PolicyConfig(), widths=(32, 64, 128)),
        training=TrainConfig(steps=STEPS, learning_rate=1e-3, seed=options.seed),
    ).run()
    console.rule("3 of 3: evaluation")
    Evaluate(policy, evaluation, episodes=EPISODES, seed=options.seed + FIRST_TEST_SEED).run()
    console.print()
    console.print(f"Open {(evaluation / 'report.html').resolve()} in a browser.", soft_wrap=True)

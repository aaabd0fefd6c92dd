"""What a program needs of a checkpoint and the environment that its policy acts in: both, fitting each other, the modes
that are counted, and the seeds that it has not seen.

Knows checkpoints and environments. Runs no episode.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium

from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands.costs import with_costs
from diffusion_policy.commands.environment import choose_env_spec, is_same_id, say_cap
from diffusion_policy.commands.labels import learn_instructions
from diffusion_policy.commands.options.acting import FIRST_ROLLOUT_SEED, FIRST_TEST_SEED, ActingCommand
from diffusion_policy.config import ConfigError, CostConfig, SampleConfig, SuccessAndModes
from diffusion_policy.envs.contract import control_rate
from diffusion_policy.envs.protocols import as_multimodal
from diffusion_policy.evaluation.metrics import NONE
from diffusion_policy.policy import DiffusionPolicy, choose_device


class PolicyInEnv(NamedTuple):
    """A checkpoint and the environment that it acts in."""

    checkpoint: Checkpoint
    env_id: str
    env_kwargs: dict[str, Any]
    signals: SuccessAndModes
    make_env: Callable[..., gymnasium.Env]
    """Picklable; takes `render_mode`."""
    env: gymnasium.Env
    """One instance, for modes and drawing."""
    wrappers: tuple[Mapping[str, Any], ...] = ()
    """Around the environment, as `envs.wrappers` writes them."""

    @property
    def policy(self) -> DiffusionPolicy:
        """That of the checkpoint."""
        return self.checkpoint.policy

    @property
    def frames_per_second(self) -> float:
        """How many control steps the environment takes in a second; 30 where it does not say."""
        return control_rate(self.env) or 30


def load_with_environment(
    options: ActingCommand, sampling: SampleConfig | None = None, instructions: Sequence[str] = ()
) -> PolicyInEnv:
    """Load the checkpoint and make its environment, or the one named instead. What the policy is told, by `sampling` or
    as one of `instructions`, may be new to it where the options name an encoder.

    Raises ValueError when there is no environment, when its spaces do not fit the policy, or when the policy cannot
    sample as `sampling` says.
    """
    loaded = checkpoint.load(options.checkpoint, choose_device(options.device))
    told = [sampling.instruction] if sampling is not None and sampling.instruction is not None else []
    loaded = learn_instructions(loaded, [*told, *instructions], options.instruction_encoder)
    return join_environment(
        options.checkpoint,
        loaded,
        env=options.env,
        env_kwargs=options.env_kwargs,
        image_size=options.image_size,
        sampling=sampling,
        signals=options.signals,
        costs=options.costs,
    )


def join_environment(
    path: object,
    loaded: Checkpoint,
    *,
    env: str | None = None,
    env_kwargs: str | None = None,
    image_size: int | None = None,
    sampling: SampleConfig | None = None,
    signals: SuccessAndModes = SuccessAndModes(),  # noqa: B008  (frozen)
    costs: CostConfig = CostConfig(),  # noqa: B008
) -> PolicyInEnv:
    """As `load_with_environment`, of a checkpoint that is loaded, or one without weights."""
    if sampling is not None:
        loaded.policy.resolve_sampling(sampling)
    recorded = dataclasses.asdict(loaded.environment)
    task, signals = choose_env_spec(path, recorded, env, env_kwargs, signals, image_size)
    instance = task()
    offered = {key: part.shape for key, part in instance.observation_space.items()}  # pyright: ignore
    needed = loaded.policy.shapes.observations
    if any(offered.get(key) != shape for key, shape in needed.items()):
        raise ConfigError(f"{path} observes {needed}; {task.env} offers {offered}")
    action = loaded.policy.shapes.action
    if math.prod(instance.action_space.shape or ()) != math.prod(action):
        raise ConfigError(f"{path} acts with shape {action}; {task.env} takes {instance.action_space.shape}")
    say_cap(task.env, instance)
    loaded = with_costs(loaded, instance, costs)
    return PolicyInEnv(loaded, task.env, task.arguments, signals, task, instance, task.wrappers)


def choose_modes(loaded: PolicyInEnv) -> tuple[tuple[str, ...], str | None]:
    """The modes that entropy and coverage are measured against, and whose list it is: the environment's, or where that
    knows none, those among the demonstrations."""
    task = as_multimodal(loaded.env)
    if task is not None and task.modes:
        return tuple(task.modes), "environment"
    shown = tuple(mode for mode in loaded.checkpoint.dataset.modes if mode != NONE)
    return shown, "demonstrations" if shown else None


def refuse_seen_seeds(loaded: PolicyInEnv, seeds: range) -> None:
    """Raise ConfigError when test seeds lie among those of the same environment that the training has seen: its
    demonstrations', and its rollouts', by which the best checkpoint may have been chosen; or beyond what a seed can
    be."""
    if seeds[-1] > MOST_SEED:
        raise ConfigError(f"seeds go up to {MOST_SEED}; got {seeds[0]} to {seeds[-1]}; choose a lower --seed")
    if not is_same_id(loaded.env_id, loaded.checkpoint.environment.id):
        return
    seen: dict[str, tuple[int, int]] = {}
    training, demonstrated = loaded.checkpoint.training, loaded.checkpoint.dataset.seeds
    if demonstrated is not None:
        seen["demonstrations'"] = demonstrated
    if training.rollout_every:
        seen["training rollouts'"] = (FIRST_ROLLOUT_SEED, FIRST_ROLLOUT_SEED + training.rollout_episodes - 1)
    for whose, (first, last) in seen.items():
        if seeds[0] <= last and first <= seeds[-1]:
            free = find_free_seed(list(seen.values()), len(seeds))
            raise ConfigError(
                f"test seeds {seeds[0]} to {seeds[-1]} overlap the {whose} seeds {first} to {last}; "
                f"choose another --seed, such as {free}"
            )


def find_free_seed(taken: Sequence[tuple[int, int]], count: int) -> int:
    """The first seed from FIRST_TEST_SEED on that begins so many which are not taken."""
    free = FIRST_TEST_SEED
    for first, last in sorted(taken):
        if free <= last and first <= free + count - 1:
            free = last + 1
    return free

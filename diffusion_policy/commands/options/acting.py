"""What the verbs that act in an environment are told alike: where a policy acts, the seeds that are theirs, what a film
or a number of episodes may be.

Knows options and their checks. Makes no environment and loads no checkpoint.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from diffusion_policy.basics.files import once_each, parse_json
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import MAX_EPISODES, ChunkingConfig, ConfigError, CostConfig, Group, SuccessAndModes
from diffusion_policy.evaluation.engines import available_cores

FIRST_TEST_SEED, FIRST_ROLLOUT_SEED = 100_000, 200_000
"""Seeds of evaluations and those of rollouts in training begin here; those of demonstrations begin at 0."""
PARALLEL = 25
"""Environments that run together; half of them plan together."""
MOST_PARALLEL = 1024
"""Environments that the user may have run together."""
MOST_FILMED = 16
"""Episodes in one video: they are tiles of one picture."""


@dataclass(frozen=True)
class ActingCommand(Command):
    """A policy acts in an environment: its own, or the one named instead."""

    checkpoint: Path
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    env: Annotated[str | None, Group("environment")] = field(default=None, kw_only=True)
    """Gymnasium id, if not the environment that the policy was trained for."""
    env_kwargs: str | None = field(default=None, kw_only=True)
    """Arguments of the environment, as JSON, if not those that the policy was trained with."""
    image_size: int | None = field(default=None, kw_only=True)
    """Observe an image of this width and height [px] too, if the policy was trained where none was: of the task's own
    camera, in environments other than ours the picture that their render draws."""
    signals: Annotated[SuccessAndModes, Group("environment")] = field(default_factory=SuccessAndModes, kw_only=True)
    action_horizon: Annotated[int | None, Group("control")] = field(default=None, kw_only=True)
    """Steps executed before planning again (Ta); by default that of the policy's training."""
    chunking: Annotated[ChunkingConfig, Group("control")] = field(default_factory=ChunkingConfig, kw_only=True)
    costs: Annotated[CostConfig, Group("costs")] = field(default_factory=CostConfig, kw_only=True)
    instruction_encoder: Annotated[str | None, Group("control")] = field(default=None, kw_only=True)
    """Function, as module:function, that makes the embedding of an --instruction that is new to the policy: that by
    which its dataset was instructed. The module may lie in the working directory."""
    workers: Annotated[int, Group("simulation")] = field(default_factory=available_cores, kw_only=True)
    """Processes that simulate; the result is the same for any number."""
    device: Annotated[str, Group("")] = field(default="auto", kw_only=True)
    """Device that plans: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""


def anchor(command: object) -> None:
    """Make the paths of a command absolute: a simulator may change the working folder."""
    for option in dataclasses.fields(command):  # pyright: ignore[reportArgumentType]
        value = getattr(command, option.name)
        if isinstance(value, Path):
            object.__setattr__(command, option.name, value.absolute())


def require_episodes(episodes: int, parallel: int = 1) -> None:
    """Raise ConfigError for more episodes than are kept in memory, or more environments at once than a machine runs."""
    if episodes > MAX_EPISODES:
        raise ConfigError(f"at most {MAX_EPISODES} episodes are run, all repeats and delays counted; got {episodes}")
    if parallel > MOST_PARALLEL:
        raise ConfigError(f"parallel must be at most {MOST_PARALLEL}; got {parallel}")


def require_video(video: Path | None, episodes: int) -> None:
    """Raise ConfigError where so many episodes cannot be filmed into this file."""
    if video is None:
        return
    if episodes > MOST_FILMED:
        raise ConfigError(f"a --video shows at most {MOST_FILMED} episodes; got {episodes}")
    if video.suffix not in (".mp4", ".gif"):
        raise ConfigError(f"--video must end in .mp4 or .gif; got {video}")
    if video.exists():
        raise ConfigError(f"{video} already exists; choose another --video or delete it first")


def parse_env_kwargs(text: str, flag: str = "--env-kwargs") -> dict[str, Any]:
    """A JSON object of arguments; raises ConfigError."""
    try:
        arguments = parse_json(text, pairs=once_each)
        json.dumps(arguments, allow_nan=False)
    except ValueError as error:
        arguments, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(arguments, dict):
        raise ConfigError(f"{flag} must be a JSON object such as '{{\"rows\": 2}}'; got {text!r:.100}{reason}")
    return arguments

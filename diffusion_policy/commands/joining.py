"""What options name to join plans with: functions of the user, another checkpoint, what an environment foresees."""

from functools import partial
from pathlib import Path

import gymnasium

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.config import BackendName, ChunkingConfig, ConfigError, SampleConfig
from diffusion_policy.control.chunking import Chunking, Guided, Roll, Score, make_chunking, scored
from diffusion_policy.control.costs import Costs
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.envs import modules
from diffusion_policy.envs.protocols import as_foreseeing
from diffusion_policy.policy import DiffusionPolicy


def choose_chunking(
    config: ChunkingConfig, policy: DiffusionPolicy, sampling: SampleConfig, roll: Roll | None = None
) -> Chunking:
    """The strategy that the options name. Raises ConfigError for one that lacks what it takes."""
    weak = None
    if config.weak_checkpoint is not None:
        weak = PolicyPlanner(checkpoint.load(Path(config.weak_checkpoint), policy.device).policy, sampling)
    return make_chunking(config, roll=roll, score=find_score(config, policy), weak=weak)


def find_score(config: ChunkingConfig, policy: DiffusionPolicy | None = None) -> Score | None:
    """The score that is named, of the user or of the costs that lead the policy; None for none. Raises ConfigError for
    costs where there are none."""
    if config.score == "costs":
        costs = [one for one in (policy.leads if policy else ()) if isinstance(one, Costs)]
        if not costs:
            raise ConfigError("--score costs chooses by what --cost names; got none")
        return scored(costs[0].score)
    return None if config.score is None else scored(partial(modules.call, modules.load(config.score)))


def find_roll(env: gymnasium.Env) -> Roll | None:
    """How an environment foresees what is observed, None where it does not."""
    foreseeing = as_foreseeing(env)
    return None if foreseeing is None else partial(modules.call, foreseeing.roll_forward)


def choose_backend(backend: BackendName, chunking: Chunking) -> BackendName:
    """What samples: `auto` is eager where sampling is guided, since graphs have no gradient."""
    return "eager" if backend == "auto" and isinstance(chunking.steer, Guided) else backend

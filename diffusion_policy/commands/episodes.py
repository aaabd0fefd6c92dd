"""What evaluate, rollout and study share: running a policy's episodes, and asking it what it would plan."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_policy import __version__
from diffusion_policy.commands.common import Interrupted, Loaded, progress_bar
from diffusion_policy.config import ConfigError, SampleConfig
from diffusion_policy.engines import HANG_AFTER, Engine

if TYPE_CHECKING:
    import numpy as np
    import torch

    from diffusion_policy.metrics import Episode, Lost
    from diffusion_policy.policy import DiffusionPolicy

FIRST_TEST_SEED = 100_000
PLANNING_BATCH = 25
"""Environments that run, and plan, together."""
DIVERSITY_STATES, DIVERSITY_PLANS = 20, 32
"""Initial states, and sequences sampled for each, that the diversity is taken from."""


class RolledOut(NamedTuple):
    """What came of an evaluation's episodes."""

    episodes: list[Episode]
    lost: list[Lost]


def choose_modes(loaded: Loaded) -> tuple[tuple[str, ...], str | None]:
    """The modes that entropy and coverage are measured against, and whose list it is: the environment's, or where that
    knows none, those among the demonstrations."""
    from diffusion_policy.metrics import NONE

    if loaded.env.get_wrapper_attr("modes"):
        return tuple(loaded.env.get_wrapper_attr("modes")), "environment"
    shown = tuple(mode for mode in loaded.checkpoint.dataset.modes if mode != NONE)
    return shown, "demonstrations" if shown else None


def describe_machine(policy: DiffusionPolicy, backend: str = "eager") -> dict[str, Any]:
    """Where the numbers were made."""
    import torch

    return {
        "backend": {
            "mode": backend,
            "device": str(policy.device),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "versions": {"package": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def refuse_seen_seeds(loaded: Loaded, seeds: range) -> None:
    """Raise ConfigError when test seeds lie among the demonstrations' seeds of the same environment."""
    demonstrated = loaded.checkpoint.dataset.seeds
    if demonstrated is None or loaded.env_id != loaded.checkpoint.environment.id:
        return
    first, last = demonstrated
    if seeds[0] <= last and first <= seeds[-1]:
        raise ConfigError(
            f"test seeds {seeds[0]} to {seeds[-1]} overlap the demonstrations' seeds {first} to {last}; "
            f"choose a --seed of at least {last + 1}"
        )


def run_episodes(
    loaded: Loaded,
    seeds: range,
    sampling: SampleConfig,
    parallel: int,
    workers: int,
    repeats: int = 1,
    delay_steps: int = 0,
    hang_after: float = HANG_AFTER,
    engine: Engine = "local",
) -> RolledOut:
    """The episodes of these seeds, behind a progress bar; raises Interrupted on Ctrl-C."""
    finished = successes = 0
    lost: list[Lost] = []
    try:
        from diffusion_policy.controller import Controller
        from diffusion_policy.rollout import rollout

        with progress_bar("episodes") as bar:
            task = bar.add_task("rolling out", total=len(seeds) * repeats, note="")

            def show(episode: Episode) -> None:
                nonlocal finished, successes
                finished += 1
                successes += episode.success
                bar.update(task, completed=finished, note=f"{successes} successful")

            policy = loaded.checkpoint.policy
            episodes = rollout(
                loaded.make_env,
                partial(Controller, policy, sampling=sampling, plan_batch=parallel, delay_steps=delay_steps),
                seeds,
                loaded.env.get_wrapper_attr("mode"),
                parallel,
                workers,
                show,
                repeats,
                lost.append,
                hang_after,
                engine,
            )
            return RolledOut(episodes, lost)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped after {finished} episodes; nothing was written") from None


def sample_starts(policy: DiffusionPolicy, episodes: Sequence[Episode], sampling: SampleConfig) -> np.ndarray:
    """Normalized sequences sampled for the first observation of a few seeds, (states, N, T, A)."""
    import numpy as np
    import torch

    from diffusion_policy.policy import derive_generator

    firsts = list({episode.seed: episode for episode in reversed(episodes)}.values())[-DIVERSITY_STATES:]
    plans = []
    for episode in firsts:
        observations = observe(policy, episode, 0)
        plan = policy.sample(observations, [derive_generator("diversity", episode.seed)], DIVERSITY_PLANS, sampling)
        plans.append(policy.normalizer.normalize("action", plan)[0].cpu())
    return np.asarray(torch.stack(plans))


def observe(policy: DiffusionPolicy, episode: Episode, step: int) -> dict[str, torch.Tensor]:
    """What the policy sees at a step of an episode, {key: (1, To, ...)}; the first step stands for those before it."""
    import numpy as np
    import torch

    rows = np.maximum(np.arange(step - policy.config.observation_horizon + 1, step + 1), 0)
    return {
        key: torch.as_tensor(episode.observations[key][rows], dtype=torch.float32)[None].to(policy.device)
        for key in policy.shapes.observations
    }


def measure_latency(policy: DiffusionPolicy, episode: Episode, sampling: SampleConfig, plans: int) -> list[float]:
    """Wall times [ms] of so many plans for one environment, after a warm-up, with nothing else running."""
    import torch

    observations = observe(policy, episode, 0)
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(plans + 3):
        started = time.perf_counter()
        policy.sample(observations, [generator], config=sampling).cpu()
        times.append(1000 * (time.perf_counter() - started))
    return times[3:]

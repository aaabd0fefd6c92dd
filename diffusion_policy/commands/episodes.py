"""What evaluate, rollout and study share: running a policy's episodes, and asking it what it would plan."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_policy import __version__
from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.commands.environment import PolicyInEnv, is_same_id
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.options.acting import FIRST_ROLLOUT_SEED, FIRST_TEST_SEED
from diffusion_policy.commands.terminal import progress_bar
from diffusion_policy.config import ConfigError, SampleConfig
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine

if TYPE_CHECKING:
    import numpy as np
    import torch

    from diffusion_policy.commands.afterwards import Remarks
    from diffusion_policy.evaluation.episode import Episode, FailedEpisode
    from diffusion_policy.evaluation.scorecard import Scorecard
    from diffusion_policy.policy import DiffusionPolicy

MOST_NOISE_BYTES = 2**29
"""Of one planning batch; there are some three copies of it."""
DIVERSITY_STATES, DIVERSITY_PLANS = 20, 32
"""Initial states, and sequences sampled for each, that the diversity is taken from."""


class RolledOut(NamedTuple):
    """What came of an evaluation's episodes."""

    episodes: list[Episode]
    lost: list[FailedEpisode]
    mode_failures: list[FailedEpisode]
    """Episodes that count without a mode, since it could not be told."""


def choose_modes(loaded: PolicyInEnv) -> tuple[tuple[str, ...], str | None]:
    """The modes that entropy and coverage are measured against, and whose list it is: the environment's, or where that
    knows none, those among the demonstrations."""
    from diffusion_policy.envs.protocols import as_multimodal
    from diffusion_policy.evaluation.metrics import NONE

    task = as_multimodal(loaded.env)
    if task is not None and task.modes:
        return tuple(task.modes), "environment"
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


def draw_bytes(policy: DiffusionPolicy, sampling: SampleConfig) -> int:
    """Of the noise that one sequence is sampled from."""
    from diffusion_policy.diffusion.process import count_draws

    sampler, levels = policy.resolve_sampling(sampling)
    numbers = policy.config.prediction_horizon * math.prod(policy.shapes.action)
    return 4 * numbers * count_draws(sampler, levels, sampling.corrector_steps)


def require_memory(policy: DiffusionPolicy, sampling: SampleConfig, parallel: int) -> None:
    """Raise ConfigError where one planning batch, or the sequences for one state, take more noise than memory should
    hold."""
    rows = max(parallel, DIVERSITY_PLANS)
    needed = rows * draw_bytes(policy, sampling)
    if needed > MOST_NOISE_BYTES:
        raise ConfigError(
            f"{rows} sequences at once with {sampling.sampling_steps} sampling steps of {sampling.sampler} need "
            f"{needed / 2**30:.1f} GB of noise, at most {MOST_NOISE_BYTES / 2**30:g} GB are used; lower "
            "--sampling-steps, --corrector-steps or --parallel"
        )


def run_episodes(
    loaded: PolicyInEnv,
    seeds: range,
    sampling: SampleConfig,
    *,
    parallel: int,
    workers: int,
    repeats: int = 1,
    delay_steps: int = 0,
    hang_after: float = HANG_AFTER,
    engine: Engine = "local",
) -> RolledOut:
    """The episodes of these seeds, behind a progress bar; raises Interrupted on Ctrl-C."""
    from diffusion_policy.envs.protocols import as_multimodal

    finished = successes = 0
    lost: list[FailedEpisode] = []
    failures: list[FailedEpisode] = []
    task = as_multimodal(loaded.env)
    mode_of = task.mode if task else lambda _: None
    try:
        from diffusion_policy.control.controller import Controller
        from diffusion_policy.control.policy_planner import PolicyPlanner
        from diffusion_policy.evaluation.rollout import rollout

        with progress_bar("episodes") as bar:
            shown = bar.add_task("rolling out", total=len(seeds) * repeats, note="")

            def show(episode: Episode) -> None:
                nonlocal finished, successes
                finished += 1
                successes += episode.success
                bar.update(shown, completed=finished, note=f"{successes} successful")

            policy, dtype = loaded.checkpoint.policy, loaded.env.action_space.dtype
            options = {"plan_batch": parallel, "delay_steps": delay_steps, "dtype": dtype}
            episodes = rollout(
                loaded.make_env,
                partial(Controller, PolicyPlanner(policy, sampling), **options),
                seeds,
                mode_of,
                parallel,
                workers=workers,
                on_episode=show,
                repeats=repeats,
                on_lost=lost.append,
                hang_after=hang_after,
                engine=engine,
                on_mode_failure=failures.append,
            )
            return RolledOut(episodes, lost, failures)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped after {finished} episodes; nothing was written") from None


def measure_episodes(
    loaded: PolicyInEnv, episodes: Sequence[Episode], modes: Sequence[str], period: float, remarks: Remarks
) -> Scorecard:
    """The scorecard of episodes; jerk and commitment, for which the environment's own functions are asked, are
    undefined where those fail."""
    from diffusion_policy.envs.protocols import as_choosing, as_drawable
    from diffusion_policy.evaluation.scorecard import scorecard

    drawable, choosing = as_drawable(loaded.env), as_choosing(loaded.env)
    path, choice = drawable and drawable.path, choosing and choosing.choice
    demonstrated = loaded.checkpoint.dataset.modes

    def measure(path: Any, choice: Any) -> Scorecard:
        return scorecard(episodes, modes, demonstrated, period, path=path, choice=choice)

    card = remarks.attempt("jerk and commitment are not measured", lambda: measure(path, choice), None)
    return card or measure(None, None).without("jerk")


def sample_starts(policy: DiffusionPolicy, episodes: Sequence[Episode], sampling: SampleConfig) -> np.ndarray:
    """Normalized sequences sampled for the first observation of a few seeds, (states, N, T, A)."""
    import numpy as np
    import torch

    from diffusion_policy.basics.streams import derive_rng

    firsts = list({episode.seed: episode for episode in reversed(episodes)}.values())[-DIVERSITY_STATES:]
    plans = []
    for episode in firsts:
        observations = observe(policy, episode, 0)
        plan = policy.sample(observations, [derive_rng("diversity", episode.seed)], DIVERSITY_PLANS, sampling)
        plans.append(policy.normalizer.normalize(policy.target.key, plan)[0].cpu())
    return np.asarray(torch.stack(plans))


def observe(policy: DiffusionPolicy, episode: Episode, step: int) -> dict[str, torch.Tensor]:
    """What the policy sees at a step of an episode, {key: (1, To, ...)}; the first step stands for those before it."""
    import numpy as np
    import torch

    rows = np.maximum(np.arange(step - policy.config.observation_horizon + 1, step + 1), 0)
    seen = {key: episode.observations[key][rows] for key in policy.shapes.observations}
    return {
        key: torch.as_tensor(values if values.dtype == np.float64 else values.astype(np.float32))[None].to(
            policy.device
        )
        for key, values in seen.items()
    }


def measure_latency(policy: DiffusionPolicy, episode: Episode, sampling: SampleConfig, plans: int) -> list[float]:
    """Wall times [ms] of so many plans for one environment, after a warm-up, with nothing else running."""
    from diffusion_policy.basics.streams import derive_rng

    observations = observe(policy, episode, 0)
    generator = derive_rng("latency")
    times = []
    for _ in range(plans + 3):
        started = time.perf_counter()
        policy.sample(observations, [generator], config=sampling).cpu()
        times.append(1000 * (time.perf_counter() - started))
    return times[3:]

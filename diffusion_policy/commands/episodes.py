"""What evaluate, rollout and study share: running a policy's episodes, and asking it what it would plan.

Knows what an episode and a policy are. Writes nothing.
"""

import contextlib
import math
import platform
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import Progress

from diffusion_policy import __version__
from diffusion_policy.basics.images import as_observed
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.commands.seen_again import see_again
from diffusion_policy.commands.terminal import progress_bar
from diffusion_policy.config import BackendName, ConfigError, PlanningPrecision, SampleConfig
from diffusion_policy.control.chunking import Chunking
from diffusion_policy.control.controller import Controller, require_horizons
from diffusion_policy.control.planner import Planner
from diffusion_policy.diffusion.process import count_draws
from diffusion_policy.envs.protocols import as_choosing, as_drawable, as_multimodal
from diffusion_policy.envs.wrappers import look
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine, available_cores
from diffusion_policy.evaluation.episode import Episode, FailedEpisode
from diffusion_policy.evaluation.rollout import GROUPS, MakeController, planning_batch, rollout
from diffusion_policy.evaluation.scorecard import Scorecard, scorecard
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.backends import make_planner, resolve_backend

MOST_NOISE_BYTES = 2**29
"""Of one planning batch; there are some three copies of it."""
USUAL_STEPS = 300
"""Of an episode that its environment does not limit, to judge whether a backend pays."""
DIVERSITY_STATES, DIVERSITY_PLANS = 20, 32
"""Initial states, and sequences sampled for each, that the diversity is taken from."""


class RolledOut(NamedTuple):
    """What came of an evaluation's episodes."""

    episodes: list[Episode]
    lost: list[FailedEpisode]
    mode_failures: list[FailedEpisode]
    """Episodes that count without a mode, since it could not be told."""


def describe_machine(policy: DiffusionPolicy, backend: str = "eager") -> dict[str, Any]:
    """Where the numbers were made."""

    return {
        "backend": {
            "mode": backend,
            "device": str(policy.device),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "versions": {"package": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def draw_bytes(policy: DiffusionPolicy, sampling: SampleConfig) -> int:
    """Of the noise that one sequence is sampled from."""

    sampler, levels = policy.resolve_sampling(sampling)
    numbers = math.prod(policy.sequences.shape)
    return 4 * numbers * count_draws(sampler, levels, sampling.corrector_steps)


def require_memory(policy: DiffusionPolicy, sampling: SampleConfig, parallel: int) -> None:
    """Raise ConfigError where one planning batch, or the sequences for one state, take more noise than memory should
    hold."""
    rows = max(planning_batch(parallel), DIVERSITY_PLANS)
    needed = rows * draw_bytes(policy, sampling)
    if needed > MOST_NOISE_BYTES:
        raise ConfigError(
            f"{rows} sequences at once with {policy.complete(sampling).sampling_steps} sampling steps of "
            f"{sampling.sampler} need "
            f"{needed / 2**30:.1f} GB of noise, at most {MOST_NOISE_BYTES / 2**30:g} GB are used; lower "
            "--sampling-steps, --corrector-steps or --parallel"
        )


class _Counter:
    """Episodes that have finished, as a progress bar shows them."""

    def __init__(self, bar: Progress, total: int) -> None:
        self.finished = self.successes = 0
        self._bar = bar
        self._task = bar.add_task("rolling out", total=total, note="")

    def add(self, episode: Episode) -> None:
        self.finished += 1
        self.successes += episode.success
        self._bar.update(self._task, completed=self.finished, note=f"{self.successes} successful")


def run_episodes(
    loaded: PolicyInEnv,
    seeds: range,
    planner: Planner,
    *,
    backend: BackendName = "eager",
    parallel: int,
    workers: int,
    repeats: int = 1,
    delay_steps: int = 0,
    action_horizon: int | None = None,
    chunking: Chunking | None = None,
    hang_after: float = HANG_AFTER,
    engine: Engine = "local",
    keep_images: bool = False,
) -> RolledOut:
    """The episodes of these seeds, behind a progress bar; `backend`: that of the planner; `keep_images`: see `rollout`.
    Raises Interrupted on Ctrl-C."""
    rolled_out = RolledOut([], [], [])
    task = as_multimodal(loaded.env)
    bar = progress_bar("episodes")
    counter = _Counter(bar, len(seeds) * repeats)
    try:
        with bar, sharing_cores(loaded.policy):
            episodes = rollout(
                loaded.make_env,
                make_controllers(loaded, planner, delay_steps, action_horizon, chunking),
                seeds,
                task.mode if task else lambda _: None,
                parallel,
                workers=workers,
                on_episode=counter.add,
                repeats=repeats,
                on_lost=rolled_out.lost.append,
                hang_after=hang_after,
                engine=engine,
                on_mode_failure=rolled_out.mode_failures.append,
                planning_threads=GROUPS if shares_cores(loaded.policy) and backend != "compile" else 1,
                look=look,
                keep_images=keep_images,
            )
    except KeyboardInterrupt:
        raise Interrupted(f"stopped after {counter.finished} episodes; nothing was written") from None
    return rolled_out._replace(episodes=episodes)


def resolve_for_episodes(
    loaded: PolicyInEnv, sampling: SampleConfig, backend: BackendName, parallel: int, episodes: int
) -> BackendName:
    """What samples so many episodes, of which so many run at once: what `auto` means here, another one as it is."""
    limit = loaded.env.spec and loaded.env.spec.max_episode_steps
    turns = -(-episodes // parallel) * 2  # each group plans for itself
    plans = turns * (limit or USUAL_STEPS) / loaded.policy.config.action_horizon
    with sharing_cores(loaded.policy):
        return resolve_backend(loaded.policy, sampling, backend, planning_batch(parallel), plans)


BEYOND = {"limits": 1.05, "quantiles": 1.5, "moments": 4.0}
"""Normalized numbers beyond these lie outside of the demonstrations, by normalization."""


def make_group_planner(
    policy: DiffusionPolicy,
    sampling: SampleConfig,
    backend: BackendName,
    parallel: int,
    precision: PlanningPrecision = "fp32",
    samples: int = 1,
) -> Planner:
    """What makes so many plans for each of a group's environments, of which so many run at once."""
    with sharing_cores(policy):
        rows = planning_batch(parallel)
        return make_planner(policy, sampling, backend, rows=rows, samples=samples, precision=precision)


def shares_cores(policy: DiffusionPolicy) -> bool:
    """Whether planning takes the cores that simulation needs."""
    return policy.device.type == "cpu"


def planning_threads(policy: DiffusionPolicy) -> int:
    """Threads that plan in rollouts; see `sharing_cores`."""
    threads = torch.get_num_threads()
    return max(1, min(threads, available_cores() // 2 // GROUPS)) if shares_cores(policy) else threads


@contextlib.contextmanager
def sharing_cores(policy: DiffusionPolicy) -> Iterator[None]:
    """Within the context torch, and onnxruntime if it is begun here, take half of the cores for both groups together,
    at least one for each: threads of one operator wait for each other, and so for every core that simulates. The
    number does not depend on that of the workers, since it can change last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(planning_threads(policy))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_controllers(
    loaded: PolicyInEnv,
    planner: Planner,
    delay_steps: int,
    action_horizon: int | None,
    chunking: Chunking | None = None,
) -> MakeController:
    """What makes a controller that asks the planner, for so many environments."""
    require_horizons(planner.steps, action_horizon or planner.action_horizon, delay_steps)
    (chunking or Chunking()).require(planner, delay_steps)
    dtype = loaded.env.action_space.dtype
    options = {"delay_steps": delay_steps, "action_horizon": action_horizon, "chunking": chunking, "dtype": dtype}
    return partial(Controller, planner, **options)


def measure_episodes(
    loaded: PolicyInEnv, episodes: Sequence[Episode], modes: Sequence[str], period: float, remarks: Remarks
) -> Scorecard:
    """The scorecard of episodes; jerk and commitment, for which the environment's own functions are asked, are
    undefined where those fail."""

    drawable, choosing = as_drawable(loaded.env), as_choosing(loaded.env)
    path, choice = drawable and drawable.path, choosing and choosing.choice
    demonstrated = loaded.checkpoint.dataset.modes

    def measure(path: Any, choice: Any) -> Scorecard:
        return scorecard(episodes, modes, demonstrated, period, path=path, choice=choice)

    card = remarks.attempt("jerk and commitment are not measured", lambda: measure(path, choice), None)
    return card or measure(None, None).without("jerk")


def describe_far_goals(policy: DiffusionPolicy, episodes: Sequence[Episode]) -> str | None:
    """In how many episodes a goal lies beyond what was demonstrated, in a sentence; None for none."""
    keys = {*policy.config.goal, policy.config.inpaint_goal} & {*policy.shapes.observations} - {*policy.images}
    reach = BEYOND[policy.config.normalization]
    far = {
        key: sum(_is_beyond(policy, key, episode.observations[key][-1:], reach) for episode in episodes) for key in keys
    }
    said = [f"{key} in {count} of {len(episodes)} episodes" for key, count in sorted(far.items()) if count]
    return f"goals lie beyond what was demonstrated: {', '.join(said)}" if said else None


def _is_beyond(policy: DiffusionPolicy, key: str, row: np.ndarray, reach: float) -> bool:
    normalized = policy.normalizer.normalize(key, torch.from_numpy(np.asarray(row)).to(policy.device))
    return bool((normalized.abs() > reach).any())


def sample_starts(loaded: PolicyInEnv, episodes: Sequence[Episode], sampling: SampleConfig) -> np.ndarray:
    """Normalized sequences sampled for the first observation of a few seeds, (states, N, T, A)."""
    policy = loaded.policy

    firsts = list({episode.seed: episode for episode in reversed(episodes)}.values())[-DIVERSITY_STATES:]
    plans = []
    for episode in firsts:
        observations = observe(policy, see_again(loaded, episode, [0]), 0)
        plan = policy.sample(observations, [derive_rng("diversity", episode.seed)], DIVERSITY_PLANS, sampling)
        plans.append(policy.sequences.in_units(plan)[0].cpu())
    return np.asarray(torch.stack(plans))


def observe(policy: DiffusionPolicy, episode: Episode, step: int) -> dict[str, torch.Tensor]:
    """What the policy sees at a step of an episode, {key: (1, To, ...)}; the first step stands for those before it."""

    rows = np.maximum(np.arange(step - policy.config.observation_horizon + 1, step + 1), 0)
    seen = {key: episode.observations[key][rows] for key in policy.watched}
    shapes = policy.watched
    return {
        key: torch.as_tensor(as_observed(values, key, shapes[key]))[None].to(policy.device)
        for key, values in seen.items()
    }

"""What a training learns from and what it will end with, found before anything is learned; and the rollouts that
measure its policy on the way.

Knows datasets, policies and environments. Trains nothing and writes nothing.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint, Dataset, Environment
from diffusion_policy.commands.environment import is_same_id
from diffusion_policy.commands.labels import Labels, count_instructions, read_labels
from diffusion_policy.commands.options.acting import FIRST_ROLLOUT_SEED
from diffusion_policy.commands.options.train import Train
from diffusion_policy.commands.policy_in_env import join_environment
from diffusion_policy.commands.stores import Keys, choose_angles, choose_keys
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError, SampleConfig, decode, parse_source
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.streaming import StreamedWindows, episodes_within, hold_windows, load_windows
from diffusion_policy.datasets.windows import Hindsight, Windows, split_episodes
from diffusion_policy.envs.wrappers import look
from diffusion_policy.evaluation.metrics import NONE
from diffusion_policy.evaluation.rollout import RolloutError, rollout
from diffusion_policy.policy import DiffusionPolicy, Shapes, choose_device

VALIDATION_BYTES = 2**24
"""Memory of the held-out windows where the others are streamed."""


class Plan(NamedTuple):
    """What of a dataset is learned from."""

    keys: Keys
    angles: dict[str, tuple[int, ...]]
    chosen: np.ndarray
    """Indices of the episodes to train on."""
    held_out: np.ndarray
    labels: Labels


def make_plan(options: Train, store: EpisodeStore) -> Plan:
    """What is learned from; raises ValueError for keys and angles that are not there, and for episodes that are too
    few or too short."""
    keys, settings = choose_keys(store, options.observation, options.action, options.policy), options.training
    lengths = np.diff(store.episode_ends, prepend=0)
    chosen, held_out = split_episodes(len(lengths), settings.validation_share, settings.seed, settings.max_episodes)
    require_lengths(options, lengths[chosen])
    angles, labels = choose_angles(store, options.angles, keys), read_labels(store, options.policy)
    return Plan(keys, angles, chosen, held_out, labels)


def make_sketch(options: Train, store: EpisodeStore, plan: Plan) -> Checkpoint:
    """The checkpoint that a training ends with, but for what the data say: weights, which take no memory here,
    normalizer and fingerprint. Raises ValueError where it could not be trained or saved."""
    choose_device(options.device)
    shapes = Shapes(
        {key: store.shape(key) for key in plan.keys.observations},
        store.shape(plan.keys.action),
        plan.angles,
        plan.keys.sizes(store),
    )
    with checkpoint.without_memory():
        size = 0 if plan.labels.embeddings is None else plan.labels.embeddings.shape[1]
        policy = DiffusionPolicy(options.policy, shapes, store.modes, plan.labels.instructions, size)
    best = options.training.keep_best or ""
    if policy.labels and not options.policy.condition_dropout and best.startswith("action"):
        told = "condition-on-mode" if policy.modes else "condition-on-instruction"
        raise ConfigError(
            f"a policy with {told} and without condition-dropout has no action error; choose another --keep-best"
        )
    environment, dataset = describe_store(store, plan.keys)
    sketch = Checkpoint(policy, options.training, environment, dataset, options.training.steps)
    checkpoint.require_savable(sketch)
    return sketch


def describe_store(store: EpisodeStore, keys: Keys) -> tuple[Environment, Dataset]:
    """What a checkpoint says of its dataset, but for the fingerprint."""
    recorded = store.attributes.get("environment", {})
    modes = [mode or NONE for mode in store.episode_modes()]
    seeds = store.seeds()
    local = Path(store.location)
    environment = Environment(
        recorded.get("id"),
        recorded.get("arguments", {}),
        store.modes,
        recorded.get("signals", {}),
        decode(recorded.get("wrappers", []), tuple[dict[str, Any], ...], f"{store.location}, wrappers"),
    )
    dataset = Dataset(
        location=str(local.resolve()) if local.exists() else store.location,
        fingerprint="",
        episodes=len(modes),
        steps=int(store.episode_ends[-1]),
        modes=dict(sorted(Counter(modes).items())),
        seeds=(int(seeds.min()), int(seeds.max())) if len(seeds) else None,
        action_key=keys.action,
        control_rate=_control_rate(store),
        instructions=count_instructions(store),
    )
    return environment, dataset


def _control_rate(store: EpisodeStore) -> float | None:
    """Steps in a second, where the store says a number that can be one."""
    said = store.attributes.get("control_frequency")
    if isinstance(said, int | float) and not isinstance(said, bool) and 0 < said < math.inf:
        return float(said)
    return None


def require_lengths(options: Train, lengths: np.ndarray) -> None:
    """Raise ConfigError when no episode is as long as a window, unless plans end at a goal, where they stay; say so
    when some are not."""
    horizon = options.policy.prediction_horizon
    short = int((lengths < horizon).sum())
    if short == len(lengths) and options.policy.inpaint_goal is None:
        raise ConfigError(
            f"no episode of {options.dataset} is as long as a window: the longest has {lengths.max()} steps, the "
            f"prediction-horizon is {horizon}; lower it"
        )
    if short:
        console.print(
            f"{short} of {len(lengths)} episodes are shorter than a window of {horizon} steps (the shortest has "
            f"{lengths.min()}); their last action is repeated"
        )


def require_batch_memory(options: Train, batch: int, processes: int, device: torch.device) -> None:
    """Raise ConfigError where a part of a batch cannot fit the memory, which would end the training without a word."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    policy, parts = options.policy, processes * options.training.accumulation
    needed = batch // parts * options.training.noise_draws * policy.network.least_memory(policy.predicted_steps)
    if needed > there:
        raise ConfigError(
            f"a batch of {batch} windows takes at least {needed / 1e9:.0f} GB, and {device} has {there / 1e9:.0f} "
            "GB; lower --batch-size, or compute it in parts with --accumulation"
        )


def cut_windows(
    options: Train, store: EpisodeStore, plan: Plan, device: torch.device
) -> tuple[Windows | StreamedWindows, Windows | None]:
    """The windows to train on, and those of as many held-out episodes as fit the memory."""
    names = plan.keys.names
    horizons = options.policy.observation_horizon, options.policy.prediction_horizon
    labels = plan.labels.of_episodes
    memory = options.training.memory_gb * 1e9
    hindsight = parse_hindsight(options.training.hindsight, options.training.hindsight_share, plan.keys.observations)
    windows = load_windows(
        store,
        names,
        plan.chosen,
        *horizons,
        device=device,
        labels=labels,
        memory_bytes=memory,
        hindsight=hindsight,
        mark_padding=options.training.mask_padding,
    )
    choose = Windows.whole if options.training.whole_windows else lambda windows: windows
    if isinstance(windows, Windows):
        windows = choose(windows)
    elif options.training.whole_windows:
        raise ConfigError("--whole-windows needs all episodes in memory; raise --memory-gb")
    if len(plan.held_out) == 0:
        return windows, None
    few = episodes_within(
        store, names.values(), plan.held_out, memory if isinstance(windows, Windows) else VALIDATION_BYTES
    )
    return windows, choose(hold_windows(store, names, few, *horizons, device=device, labels=labels))


def parse_hindsight(texts: Sequence[str], share: float, keys: Collection[str]) -> Hindsight | None:
    """--hindsight: texts such as `goal=state` or `goal=state:2,3,4`, of these keys; None for none. Raises ConfigError
    for others."""
    sources: dict[str, tuple[str, tuple[int, ...]]] = {}
    for text in texts:
        goal, (source, columns) = parse_source(text)
        if goal not in keys or source not in keys:
            raise ConfigError(
                f"--hindsight must name a goal and where it comes from, of the keys {', '.join(keys)}, as in "
                f"goal=state or goal=state:2,3,4; got {text!r}"
            )
        sources[goal] = source, columns
    return Hindsight(sources, share) if sources else None


def make_rollouts(options: Train, store: EpisodeStore, point: Checkpoint) -> Callable[[DiffusionPolicy], float | None]:
    """Measures the success rate of a policy on a few seeds, None where the simulator fails; raises ValueError where
    there is no environment, or another than the policy's, where the demonstrations have these seeds, and for a policy
    that cannot act without being told a mode."""
    sampling = point.policy.complete(SampleConfig())
    chosen = {"env": options.env, "env_kwargs": options.env_kwargs, "image_size": options.image_size}
    joined = join_environment(options.dataset, point, **chosen, sampling=sampling)
    seeds = range(FIRST_ROLLOUT_SEED, FIRST_ROLLOUT_SEED + options.training.rollout_episodes)
    shown = np.intersect1d(store.seeds(), seeds)
    if len(shown) and is_same_id(joined.env_id, point.environment.id):
        raise ConfigError(
            f"rollouts in training take the seeds {seeds[0]} to {seeds[-1]}, of which {len(shown)} are "
            f"demonstrations' of {options.dataset}, first {shown[0]}; fewer --rollout-episodes, or --rollout-every 0"
        )

    def success_rate(policy: DiffusionPolicy) -> float | None:
        planner = PolicyPlanner(policy, sampling)
        make_controller = partial(Controller, planner, dtype=joined.env.action_space.dtype)
        try:
            episodes = rollout(joined.make_env, make_controller, seeds, lambda _: None, look=look)
        except RolloutError as error:
            console.print(f"no rollouts at this step: {error}", soft_wrap=True)
            return None
        return sum(episode.success for episode in episodes) / len(episodes)

    return success_rate

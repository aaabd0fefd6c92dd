"""diffusion-policy rollout: a few episodes to look at."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium

from diffusion_policy.basics.bounds import MOST_STEPS
from diffusion_policy.basics.images import is_image
from diffusion_policy.commands.afterwards import explain
from diffusion_policy.commands.environment import describe_episodes
from diffusion_policy.commands.episodes import (
    make_group_planner,
    require_memory,
    resolve_for_episodes,
    run_episodes,
)
from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.joining import choose_backend, choose_chunking, find_roll
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.rollout import Rollout
from diffusion_policy.commands.pictures import draw_plans, pixels_of
from diffusion_policy.commands.policy_in_env import PolicyInEnv, load_with_environment
from diffusion_policy.commands.remote import find_server_of
from diffusion_policy.commands.seen_again import see_again
from diffusion_policy.commands.terminal import console, out, progress_bar
from diffusion_policy.config import BackendName, ConfigError
from diffusion_policy.control.planner import Planner
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.protocols import as_multimodal, as_pictured, repeats_by_seed
from diffusion_policy.evaluation.engines import imap
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.report.video import FrameRecorder, Script, tile, write_video

DRAWN_PLANS = 12
"""Sequences drawn into a video at each re-planning."""
MOST_IMAGE_BYTES = 2**31
"""Of the images of all episodes that are to be recorded."""


def run(options: Rollout) -> None:
    """Roll out; raises ValueError for a checkpoint that does not fit the environment."""
    loaded = load_with_environment(options, options.sampling)
    options = replace(options, sampling=loaded.policy.complete(options.sampling))
    require_memory(loaded.policy, options.sampling, PARALLEL)
    require_pictures(options, loaded)
    if options.keep_images:
        require_image_memory(options, loaded.env)
    if options.record and options.record.exists():
        raise ConfigError(f"{options.record} already exists; choose another --record or delete it first")
    if options.video:
        options.video.parent.mkdir(parents=True, exist_ok=True)
    episodes = roll_out(options, loaded)
    for episode in episodes:
        outcome = "success" if episode.success else "failure"
        out.print(f"seed {episode.seed}: {outcome} after {len(episode.actions)} steps, mode {episode.mode or 'none'}")
    if options.record:
        record_episodes(options.record, loaded, episodes, options.sampling.instruction)
        console.print(f"{len(episodes)} episodes in {options.record}")
    if options.video:
        try:
            film(options, options.video, loaded, episodes)
        except (Exception, SystemExit) as error:  # somebody else's simulator draws
            raise Failed(f"no video: {explain(error)}") from error
        console.print(f"video in {options.video}", soft_wrap=True)


def require_pictures(options: Rollout, loaded: PolicyInEnv) -> None:
    """Raise ConfigError where the environment cannot be shown as asked."""
    modes = loaded.env.metadata.get("render_modes", ())
    for mode, wanted in (("human", options.render), ("rgb_array", options.video)):
        if wanted and mode not in modes:
            raise ConfigError(f"{loaded.env_id} has no render mode {mode}; it has {', '.join(modes) or 'none'}")


def require_image_memory(options: Rollout, env: gymnasium.Env) -> None:
    """Raise ConfigError where the images of all episodes would not fit into memory."""
    space: Any = env.observation_space
    images = [part for part in space.values() if is_image(part.shape)]
    steps = 1 + ((env.spec and env.spec.max_episode_steps) or MOST_STEPS)
    needed = options.episodes * steps * sum(math.prod(part.shape) * part.dtype.itemsize for part in images)
    if needed > MOST_IMAGE_BYTES:
        raise ConfigError(
            f"the images of {options.episodes} episodes may take {needed / 2**30:.1f} GB; at most "
            f"{MOST_IMAGE_BYTES / 2**30:g} GB are kept: lower --episodes, or add images later with dataset render"
        )


def roll_out(options: Rollout, loaded: PolicyInEnv) -> list[Episode]:
    """The episodes; raises Failed when every one was lost."""
    parallel, workers = PARALLEL, options.workers
    if options.render:
        loaded = loaded._replace(make_env=partial(loaded.make_env, render_mode=options.render))
        parallel = workers = 1
    sampling = options.sampling
    chunking = choose_chunking(options.chunking, loaded.policy, sampling, find_roll(loaded.env))
    planner: Planner | None = find_server_of(options.remote, loaded.checkpoint, sampling, options.precision)
    backend: BackendName = "eager"
    if planner is None:
        asked = choose_backend(options.backend, chunking)
        backend = resolve_for_episodes(loaded, sampling, asked, parallel, options.episodes)
        planner = make_group_planner(loaded.policy, sampling, backend, parallel, options.precision, chunking.samples)
    episodes, lost, mode_failures = run_episodes(
        loaded,
        options.seeds,
        planner,
        backend=backend,
        parallel=parallel,
        workers=workers,
        delay_steps=options.delay_steps,
        action_horizon=options.action_horizon,
        chunking=chunking,
        keep_images=options.keep_images,
    )
    for one in lost:
        console.print(f"seed {one.seed} could not be run: {one.reason}", soft_wrap=True)
    for one in mode_failures:
        console.print(f"seed {one.seed} counts without a mode: {one.reason}", soft_wrap=True)
    if not episodes:
        raise Failed("every episode failed")
    return episodes


def film(options: Rollout, path: Path, loaded: PolicyInEnv, episodes: Sequence[Episode]) -> None:
    """Write the video."""
    if not repeats_by_seed(loaded.make_env, options.seed):
        raise Failed("a film replays episodes from their seeds, which do not repeat them here")
    plane, policy = as_pictured(loaded.env), loaded.policy
    scripts = []
    with progress_bar("episodes") as bar:
        for episode in bar.track(episodes, task_id=bar.add_task("planning", total=len(episodes), note="")):
            steps = [plan.step for plan in episode.plans]
            sampled = partial(draw_plans, policy, count=DRAWN_PLANS, sampling=options.sampling)
            plans = sampled(see_again(loaded, episode, steps), plane, steps) if plane else {}
            scripts.append(Script(episode.seed, episode.actions, plans))
        make_recorder = partial(FrameRecorder, loaded.make_env, pixels_of=pixels_of)
        films = imap(make_recorder, scripts, min(options.workers, len(scripts)))
        filmed = list(bar.track(films, task_id=bar.add_task("filming", total=len(scripts), note="")))
    write_video(path, tile(filmed, columns=2), loaded.frames_per_second)


def record_episodes(path: Path, loaded: PolicyInEnv, episodes: Sequence[Episode], told: str | None = None) -> None:
    """Make a store of rollouts, in which the policy was `told` something; raises StoreError where something already
    lies at the path."""
    task = as_multimodal(loaded.env)
    attributes = describe_episodes(loaded.env) | {"observation_keys": sorted(episodes[0].observations)}
    attributes |= {} if told is None else {"instructions": [told]}
    with EpisodeStore.create(path, attributes, tuple(task.modes) if task else ()) as store:
        for episode in episodes:
            data = {key: rows[:-1] for key, rows in episode.observations.items()} | {"action": episode.actions}
            final = {key: rows[-1] for key, rows in episode.observations.items()}
            done = Demonstration(data, episode.seed, episode.mode, episode.success, final)
            store.append([done._replace(instruction=told)])

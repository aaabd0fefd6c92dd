"""diffusion-policy rollout: a few episodes to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffusion_policy.commands.afterwards import explain
from diffusion_policy.commands.environment import PolicyInEnv, describe_episodes, load_with_environment
from diffusion_policy.commands.episodes import (
    FIRST_TEST_SEED,
    PLANNING_BATCH,
    require_episodes,
    require_memory,
    run_episodes,
)
from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.outputs import anchor, require_video
from diffusion_policy.commands.terminal import console, out, progress_bar
from diffusion_policy.config import ConfigError, SampleConfig, SuccessAndModes, require_at_least, require_seed
from diffusion_policy.evaluation.engines import available_cores, imap

if TYPE_CHECKING:
    from diffusion_policy.evaluation.episode import Episode

DRAWN_PLANS = 12
"""Sequences drawn into a video at each re-planning."""


@dataclass(frozen=True)
class Rollout:
    """Run a few episodes of a policy, print how each ended, and film them if asked."""

    checkpoint: Path
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    episodes: int = 4
    """Episodes, one a seed."""
    seed: int = FIRST_TEST_SEED
    """Seed of the first episode."""
    video: Path | None = None
    """Film the episodes side by side into this .mp4 or .gif, with sampled sequences drawn in at every re-planning where
    the environment says where they would lead."""
    render: Literal["human"] | None = None
    """human opens the simulator's window; the episodes then run one after another, in real time."""
    record: Path | None = None
    """Store to create with these episodes, observations and actions as they were; failures are stored too."""
    env: str | None = None
    """Gymnasium id, if not the environment that the policy was trained for."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON, if not those it was trained with."""
    signals: Annotated[SuccessAndModes, tyro.conf.arg(name="")] = field(default_factory=SuccessAndModes)
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    workers: int = dataclasses.field(default_factory=available_cores)
    """Distributed that simulate."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        anchor(self)
        require_at_least(self, 1, ("episodes", "workers"))
        require_episodes(self.episodes)
        require_seed(self)
        require_video(self.video, self.episodes)

    def run(self) -> None:
        """Roll out; raises ValueError for a checkpoint that does not fit the environment."""
        loaded = load_with_environment(
            self.checkpoint, self.env, self.env_kwargs, self.sampling, self.device, self.signals
        )
        require_memory(loaded.checkpoint.policy, self.sampling, PLANNING_BATCH)
        self._require_pictures(loaded)
        seeds = range(self.seed, self.seed + self.episodes)
        if self.record and self.record.exists():
            raise ConfigError(f"{self.record} already exists; choose another --record or delete it first")
        if self.video:
            self.video.parent.mkdir(parents=True, exist_ok=True)
        episodes = self._roll_out(loaded, seeds)
        for episode in episodes:
            outcome = "success" if episode.success else "failure"
            out.print(
                f"seed {episode.seed}: {outcome} after {len(episode.actions)} steps, mode {episode.mode or 'none'}"
            )
        if self.record:
            record_episodes(self.record, loaded, episodes)
            console.print(f"{len(episodes)} episodes in {self.record}")
        if self.video:
            try:
                self._film(self.video, loaded, episodes)
            except (Exception, SystemExit) as error:  # somebody else's simulator draws
                raise Failed(f"no video: {explain(error)}") from error
            console.print(f"video in {self.video}", soft_wrap=True)

    def _require_pictures(self, loaded: PolicyInEnv) -> None:
        """Raise ConfigError where the environment cannot be shown as asked."""
        modes = loaded.env.metadata.get("render_modes", ())
        for mode, wanted in (("human", self.render), ("rgb_array", self.video)):
            if wanted and mode not in modes:
                raise ConfigError(f"{loaded.env_id} has no render mode {mode}; it has {', '.join(modes) or 'none'}")

    def _roll_out(self, loaded: PolicyInEnv, seeds: range) -> list[Episode]:
        """The episodes; raises Failed when every one was lost."""
        parallel, workers = PLANNING_BATCH, self.workers
        if self.render:
            loaded = loaded._replace(make_env=partial(loaded.make_env, render_mode=self.render))
            parallel = workers = 1
        episodes, lost, mode_failures = run_episodes(loaded, seeds, self.sampling, parallel, workers)
        for one in lost:
            console.print(f"seed {one.seed} could not be run: {one.reason}", soft_wrap=True)
        for one in mode_failures:
            console.print(f"seed {one.seed} counts without a mode: {one.reason}", soft_wrap=True)
        if not episodes:
            raise Failed("every episode failed")
        return episodes

    def _film(self, path: Path, loaded: PolicyInEnv, episodes: Sequence[Episode]) -> None:
        """Write the video."""
        from diffusion_policy.commands.pictures import draw_plans, pixels_of
        from diffusion_policy.envs.protocols import as_pictured, repeats_by_seed
        from diffusion_policy.report.video import Camera, Script, tile, write_video

        if not repeats_by_seed(loaded.make_env, self.seed):
            raise Failed("a film replays episodes from their seeds, which do not repeat them here")
        plane, policy = as_pictured(loaded.env), loaded.checkpoint.policy
        scripts = []
        with progress_bar("episodes") as bar:
            for episode in bar.track(episodes, task_id=bar.add_task("planning", total=len(episodes), note="")):
                steps = [plan.step for plan in episode.plans]
                plans = draw_plans(policy, episode, plane, steps, DRAWN_PLANS, self.sampling) if plane else {}
                scripts.append(Script(episode.seed, episode.actions, plans))
            films = imap(
                partial(Camera, loaded.make_env, pixels_of=pixels_of), scripts, min(self.workers, len(scripts))
            )
            filmed = list(bar.track(films, task_id=bar.add_task("filming", total=len(scripts), note="")))
        write_video(path, tile(filmed, columns=2), loaded.frames_per_second)


def record_episodes(path: Path, loaded: PolicyInEnv, episodes: Sequence[Episode]) -> None:
    """Make a store of rollouts; raises StoreError where something already lies at the path."""
    from diffusion_policy.datasets.store import Demonstration, EpisodeStore
    from diffusion_policy.envs.protocols import as_multimodal

    task = as_multimodal(loaded.env)
    attributes = describe_episodes(loaded.env)
    with EpisodeStore.create(path, attributes, tuple(task.modes) if task else ()) as store:
        for episode in episodes:
            data = {key: rows[:-1] for key, rows in episode.observations.items()} | {"action": episode.actions}
            final = {key: rows[-1] for key, rows in episode.observations.items()}
            store.append([Demonstration(data, episode.seed, episode.mode, episode.success, final)])

"""diffusion-policy rollout: a few episodes to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffusion_policy.commands.common import (
    MOST_FILMED,
    Loaded,
    available_cores,
    console,
    describe_episodes,
    load_with_environment,
    progress_bar,
)
from diffusion_policy.commands.evaluate import FIRST_TEST_SEED, PLANNING_BATCH, run_episodes
from diffusion_policy.config import ConfigError, SampleConfig, require_at_least, require_seed

if TYPE_CHECKING:
    from diffusion_policy.metrics import Episode


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
    """Film the episodes side by side into this .mp4 or .gif."""
    record: Path | None = None
    """Store to create with these episodes, observations and actions as they were; failures are stored too."""
    env: str | None = None
    """Gymnasium id, if not the environment that the policy was trained for."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON, if not those it was trained with."""
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    workers: int = dataclasses.field(default_factory=available_cores)
    """Processes that simulate."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("episodes", "workers"))
        require_seed(self)
        if self.video and self.episodes > MOST_FILMED:
            raise ConfigError(f"a --video shows at most {MOST_FILMED} episodes; got {self.episodes}")
        if self.video and self.video.suffix not in (".mp4", ".gif"):
            raise ConfigError(f"--video must end in .mp4 or .gif; got {self.video}")
        if self.video and self.video.exists():
            raise ConfigError(f"{self.video} already exists; choose another --video or delete it first")

    def run(self) -> None:
        """Roll out; raises ValueError for a checkpoint that does not fit the environment."""
        from diffusion_policy.engines import ordered_map
        from diffusion_policy.video import Camera, Script, tile, write_video

        loaded = load_with_environment(self.checkpoint, self.env, self.env_kwargs, self.sampling, self.device)
        seeds = range(self.seed, self.seed + self.episodes)
        if self.record and self.record.exists():
            raise ConfigError(f"{self.record} already exists; choose another --record or delete it first")
        if self.video:
            self.video.parent.mkdir(parents=True, exist_ok=True)
        episodes = run_episodes(loaded, seeds, self.sampling, PLANNING_BATCH, self.workers)
        for episode in episodes:
            outcome = "success" if episode.success else "failure"
            print(f"seed {episode.seed}: {outcome} after {len(episode.actions)} steps, mode {episode.mode or 'none'}")
        if self.record:
            record_episodes(self.record, loaded, episodes)
            console.print(f"{len(episodes)} episodes in {self.record}")
        if self.video:
            scripts = [Script(episode.seed, episode.actions) for episode in episodes]
            with progress_bar("episodes") as bar:
                films = ordered_map(partial(Camera, loaded.make_env), scripts, min(self.workers, len(scripts)))
                task = bar.add_task("filming", total=len(scripts), note="")
                filmed = list(bar.track(films, task_id=task))
            write_video(self.video, tile(filmed, columns=2), loaded.frames_per_second)
            console.print(f"video in {self.video}")


def record_episodes(path: Path, loaded: Loaded, episodes: Sequence[Episode]) -> None:
    """Make a store of rollouts; raises StoreError where something already lies at the path."""
    from diffusion_policy.datasets.store import Demonstration, EpisodeStore

    attributes = describe_episodes(loaded.env, loaded.env_id, loaded.env_kwargs)
    with EpisodeStore.create(path, attributes, loaded.env.get_wrapper_attr("modes")) as store:
        for episode in episodes:
            data = {key: rows[:-1] for key, rows in episode.observations.items()} | {"action": episode.actions}
            final = {key: rows[-1] for key, rows in episode.observations.items()}
            store.append([Demonstration(data, episode.seed, episode.mode, episode.success, final)])

"""What the report shows beside numbers, gathered from environment, data set, policy and simulator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_policy import checkpoint
from diffusion_policy.config import SampleConfig
from diffusion_policy.datasets.store import EpisodeStore, StoreError
from diffusion_policy.engines import ordered_map
from diffusion_policy.metrics import Episode
from diffusion_policy.report import Pictures, PlanePath, Video
from diffusion_policy.video import Camera, Script, write_video

if TYPE_CHECKING:
    from diffusion_policy.commands.common import Loaded
    from diffusion_policy.policy import DiffusionPolicy

FAN = 32
"""Action sequences sampled from the start state."""
MOST_VIDEOS = 6
MOST_DRAWN = 500
"""Demonstrated paths in one picture."""


def gather_pictures(
    loaded: Loaded, episodes: Sequence[Episode], run: Path, sampling: SampleConfig, workers: int
) -> Pictures:
    """Everything that this environment can show; `run` is the folder that holds the checkpoint."""
    env = loaded.env.unwrapped
    plane: Any = env if hasattr(env, "scene") else None
    return Pictures(
        scene=plane.scene if plane else None,
        demonstrated=_demonstrated_paths(loaded, plane) if plane else [],
        rolled_out=[PlanePath(e.mode, e.success, plane.path(e.observations)) for e in episodes] if plane else [],
        fan=_fan(loaded.checkpoint.policy, episodes[0], plane, sampling) if plane else None,
        videos=_videos(loaded, episodes, workers),
        training=_training(run),
    )


def first_observation(policy: DiffusionPolicy, episode: Episode) -> dict[str, torch.Tensor]:
    """What the policy sees at the first step of an episode, {key: (1, To, ...)}: that step, repeated."""
    return {
        key: torch.as_tensor(episode.observations[key][:1])
        .expand(policy.config.observation_horizon, *shape)[None]
        .to(policy.device)
        for key, shape in policy.shapes.observations.items()
    }


def _demonstrated_paths(loaded: Loaded, plane: Any) -> list[PlanePath]:
    """Paths of the demonstrations, where they are of this environment, still there and still the same."""
    environment, recorded = loaded.checkpoint.environment, loaded.checkpoint.dataset
    if (loaded.env_id, loaded.env_kwargs) != (environment.id, environment.arguments):
        return []
    keys = tuple(loaded.checkpoint.policy.shapes.observations)
    try:
        store = EpisodeStore.open(recorded.location)
        if store.fingerprint(keys, recorded.action_key) != recorded.fingerprint:
            return []
        return [PlanePath(e.mode, True, plane.path(e.data)) for e in store.episodes(choose_drawn(store))]
    except (StoreError, OSError):
        return []


def choose_drawn(store: EpisodeStore) -> np.ndarray:
    """Indices of the episodes that are drawn, evenly from all when there are many."""
    count = len(store.episode_ends)
    return np.unique(np.linspace(0, count - 1, min(count, MOST_DRAWN)).astype(int))


def _fan(policy: DiffusionPolicy, episode: Episode, plane: Any, sampling: SampleConfig) -> np.ndarray:
    """Planned paths from the first state of an episode, (FAN, steps + 1, 2) [m]."""
    generator = torch.Generator().manual_seed(0)
    plans = policy.sample(first_observation(policy, episode), [generator], FAN, sampling)[0].cpu().numpy()
    now = {key: rows[0] for key, rows in episode.observations.items()}
    return plane.planned_path(now, plans[:, policy.config.observation_horizon - 1 :])


def _videos(loaded: Loaded, episodes: Sequence[Episode], workers: int) -> list[Video]:
    """One episode of each mode, a success where there is one; nothing where the environment cannot be filmed."""
    if "rgb_array" not in loaded.env.metadata.get("render_modes", ()):
        return []
    chosen: dict[str | None, Episode] = {}
    for episode in sorted(episodes, key=lambda episode: not episode.success):  # successes first, else as they came
        chosen.setdefault(episode.mode, episode)
    modes = loaded.env.get_wrapper_attr("modes")
    order = [mode for mode in (*modes, None) if mode in chosen][:MOST_VIDEOS]
    scripts = [Script(chosen[mode].seed, chosen[mode].actions) for mode in order]
    films = ordered_map(partial(Camera, loaded.make_env, every=2), scripts, min(workers, len(scripts)))
    videos = []
    with tempfile.TemporaryDirectory() as folder:
        for mode, frames in zip(order, films, strict=True):
            path = Path(folder) / "video.mp4"
            write_video(path, frames, loaded.frames_per_second / 2)
            videos.append(Video(mode, chosen[mode].success, chosen[mode].seed, path.read_bytes()))
    return videos


def _training(run: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics file beside the checkpoint; empty where there is none."""
    for folder in (run, checkpoint.find(run).parent):
        path = folder / "metrics.jsonl"
        if path.is_file():
            return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return []

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
from diffusion_policy.commands.episodes import choose_modes, observe
from diffusion_policy.config import SampleConfig
from diffusion_policy.datasets.store import EpisodeStore, StoreError
from diffusion_policy.engines import ordered_map
from diffusion_policy.metrics import Episode
from diffusion_policy.policy import derive_generator
from diffusion_policy.report import Fan, Moment, Pictures, PlanePath, Video
from diffusion_policy.video import Camera, Script, write_video

if TYPE_CHECKING:
    import gymnasium

    from diffusion_policy.commands.common import Loaded
    from diffusion_policy.policy import DiffusionPolicy

FANS, FAN_MOMENTS, FAN_PLANS = 6, 12, 24
"""Episodes whose plans are sampled again, re-plannings of each that are looked at, and sequences for each of those."""
MOST_DRAWN = 500
"""Demonstrated paths in one picture."""


def gather_pictures(
    loaded: Loaded, episodes: Sequence[Episode], run: Path, sampling: SampleConfig, films: int, workers: int
) -> Pictures:
    """Everything that this environment can show, so many films among it; `run` is the folder that holds the
    checkpoint."""
    plane = find_plane(loaded.env)
    shown = _one_of_each_mode(loaded, episodes)
    return Pictures(
        scene=plane.scene if plane else None,
        demonstrated=_demonstrated_paths(loaded, plane) if plane else [],
        rolled_out=[_plane_path(plane, episode) for episode in episodes] if plane else [],
        fans=[_fan(loaded.checkpoint.policy, episode, plane, sampling) for episode in shown[:FANS]] if plane else [],
        videos=_videos(loaded, shown[:films], workers),
        training=_training(run),
    )


def find_plane(env: gymnasium.Env) -> Any:
    """The environment itself where it can say how its episodes are drawn in a plane, else None."""
    task = env.unwrapped
    return task if all(hasattr(task, name) for name in ("scene", "path", "planned_path")) else None


def _plane_path(plane: Any, episode: Episode) -> PlanePath:
    return PlanePath(episode.mode, episode.success, plane.path(episode.observations), episode.seed, episode.repeat)


def _one_of_each_mode(loaded: Loaded, episodes: Sequence[Episode]) -> list[Episode]:
    """A success of each mode where there is one, else a failure; then failures until there are enough."""
    chosen: dict[str | None, Episode] = {}
    for episode in sorted(episodes, key=lambda episode: not episode.success):  # successes first, else as they came
        chosen.setdefault(episode.mode, episode)
    order = [mode for mode in (*choose_modes(loaded)[0], None) if mode in chosen]
    first = [chosen[mode] for mode in order]
    names = {(episode.seed, episode.repeat) for episode in first}
    return first + [e for e in episodes if not e.success and (e.seed, e.repeat) not in names]


def sample_plans(
    policy: DiffusionPolicy, episode: Episode, steps: Sequence[int], count: int, sampling: SampleConfig
) -> np.ndarray:
    """Sequences that the policy might have planned at some steps of an episode, raw actions from those steps on,
    (steps, count, T - To + 1, A)."""
    observed = [observe(policy, episode, step) for step in steps]
    together = {key: torch.cat([one[key] for one in observed]) for key in policy.shapes.observations}
    generators = [derive_generator("pictures", episode.seed, episode.repeat, step) for step in steps]
    plans = policy.sample(together, generators, count, sampling)
    return plans[:, :, policy.config.observation_horizon - 1 :].cpu().numpy()


def draw_plans(
    policy: DiffusionPolicy, episode: Episode, plane: Any, steps: Sequence[int], count: int, sampling: SampleConfig
) -> dict[int, np.ndarray]:
    """The paths along which such sequences would lead, by step, (count, T - To + 2, 2) in the plane of the scene."""
    plans = sample_plans(policy, episode, steps, count, sampling)
    return {
        step: plane.planned_path({key: rows[step] for key, rows in episode.observations.items()}, plan)
        for step, plan in zip(steps, plans, strict=True)
    }


def _fan(policy: DiffusionPolicy, episode: Episode, plane: Any, sampling: SampleConfig) -> Fan:
    """What was, and what might have been, planned in an episode: at its re-plannings, evenly from all if they are
    many."""
    steps = [plan.step for plan in episode.plans]
    evenly = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), FAN_MOMENTS)).astype(int))
    paths = draw_plans(policy, episode, plane, [steps[i] for i in evenly], FAN_PLANS, sampling)
    moments = [Moment(step, path) for step, path in paths.items()]
    xy = plane.path(episode.observations)
    return Fan(episode.seed, episode.repeat, episode.mode, episode.success, xy, moments)


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
    """Indices of the episodes that are drawn, at random when there are many: modes take turns, and an even choice could
    miss some of them."""
    count = len(store.episode_ends)
    return np.sort(np.random.default_rng(0).choice(count, min(count, MOST_DRAWN), replace=False))


def _videos(loaded: Loaded, episodes: Sequence[Episode], workers: int) -> list[Video]:
    """Films of episodes; none where the environment cannot be filmed."""
    if not episodes or "rgb_array" not in loaded.env.metadata.get("render_modes", ()):
        return []
    scripts = [Script(episode.seed, episode.actions) for episode in episodes]
    films = ordered_map(partial(Camera, loaded.make_env, every=2), scripts, min(workers, len(scripts)))
    videos = []
    with tempfile.TemporaryDirectory() as folder:
        for episode, frames in zip(episodes, films, strict=True):
            path = Path(folder) / "video.mp4"
            write_video(path, frames, loaded.frames_per_second / 2)
            videos.append(Video(episode.mode, episode.success, episode.seed, path.read_bytes()))
    return videos


def _training(run: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics file beside the checkpoint; empty where there is none."""
    for folder in (run, checkpoint.find(run).parent):
        path = folder / "metrics.jsonl"
        if path.is_file():
            return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return []

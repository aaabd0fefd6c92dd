"""What the report shows beside numbers, gathered from environment, dataset, policy and simulator."""

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from diffusion_policy.basics.files import parse_json, read_bytes
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.environment import is_same_id
from diffusion_policy.commands.episodes import draw_bytes, observe
from diffusion_policy.commands.policy_in_env import PolicyInEnv, choose_modes
from diffusion_policy.commands.stores import open_recorded
from diffusion_policy.config import SampleConfig
from diffusion_policy.envs.protocols import Drawable, as_drawable, as_pictured
from diffusion_policy.evaluation.engines import imap
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.report.evaluation_figures import choose_drawn
from diffusion_policy.report.page import NO_PICTURES, Fan, Moment, Pictures, PlanePath, Video
from diffusion_policy.report.video import Filmer, Pixels, Script

FANS, FAN_MOMENTS, FAN_PLANS = 6, 12, 24
"""Episodes whose plans are sampled again, re-plannings of each that are looked at, and sequences for each of those."""
MOST_FRAMES = 300
"""Of one film; a longer episode is filmed at fewer of its steps."""
MOST_DRAW_BYTES = 2**27
"""Of the noise of sequences that are sampled at once."""
MOST_METRICS_BYTES = 2**27
"""A larger metrics file is not read."""
MOST_LOSSES = 20_000
"""Points of the curve of losses; of a longer training every n-th line is read."""


def gather_pictures(
    loaded: PolicyInEnv,
    episodes: Sequence[Episode],
    sampling: SampleConfig,
    remarks: Remarks,
    *,
    run: Path,
    films: int,
    workers: int,
) -> Pictures:
    """Everything that this environment can show, so many films among it; `run` is the folder that holds the checkpoint.
    What cannot be shown is a remark."""
    shown = remarks.attempt("no episodes could be chosen to show", lambda: _one_of_each_mode(loaded, episodes), [])
    drawn = remarks.attempt(
        "no paths could be drawn", lambda: _drawn(loaded, episodes, shown[:FANS], sampling, remarks), NO_PICTURES
    )
    return drawn._replace(
        videos=remarks.attempt("no films", lambda: _videos(loaded, shown[:films], workers, remarks), []),
        training=_training(run, remarks),
    )


def without_episodes(run: Path, remarks: Remarks) -> Pictures:
    """What can be shown where only the numbers of the episodes are left."""
    return NO_PICTURES._replace(training=_training(run, remarks))


def _drawn(
    loaded: PolicyInEnv, episodes: Sequence[Episode], fans: Sequence[Episode], sampling: SampleConfig, remarks: Remarks
) -> Pictures:
    """What lies in the plane of the environment, where it has one."""
    plane, policy = as_drawable(loaded.env), loaded.policy
    if plane is None:
        return NO_PICTURES
    return NO_PICTURES._replace(
        scene=plane.scene,
        demonstrated=remarks.attempt("no demonstrations are drawn", lambda: _demonstrated_paths(loaded, plane), []),
        rolled_out=[_plane_path(plane, episode) for episode in episodes],
        fans=remarks.attempt(
            "no sampled plans are drawn", lambda: [_fan(policy, one, plane, sampling) for one in fans], []
        ),
    )


def pixels_of(env: gymnasium.Env) -> Pixels | None:
    """How plans are drawn into an environment's pictures, where it says so."""
    pictured = as_pictured(env)
    return None if pictured is None else pictured.pixels


def _plane_path(plane: Drawable, episode: Episode) -> PlanePath:
    xy = as_path(plane.path(episode.observations))
    return PlanePath(episode.mode, episode.success, xy, episode.seed, episode.repeat)


def as_path(xy: Any) -> np.ndarray:
    """What an environment gives as a path, (steps, 2) finite numbers; raises ValueError for anything else."""
    path = np.asarray(xy, dtype=float)
    if path.ndim != 2 or path.shape[1] != 2 or not len(path) or not np.isfinite(path).all():
        raise ValueError(f"path() must give (steps, 2) finite numbers; got an array {path.shape}")
    return path


def _one_of_each_mode(loaded: PolicyInEnv, episodes: Sequence[Episode]) -> list[Episode]:
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
    at_once = max(1, MOST_DRAW_BYTES // (count * draw_bytes(policy, sampling)))
    plans = []
    for some in (steps[i : i + at_once] for i in range(0, len(steps), at_once)):
        observed = [observe(policy, episode, step) for step in some]
        together = {key: torch.cat([one[key] for one in observed]) for key in policy.shapes.observations}
        generators = [derive_rng("pictures", episode.seed, episode.repeat, step) for step in some]
        plans.append(policy.sample(together, generators, count, sampling).cpu())
    return torch.cat(plans)[:, :, policy.config.observation_horizon - 1 :].numpy()


def draw_plans(
    policy: DiffusionPolicy, episode: Episode, plane: Drawable, steps: Sequence[int], count: int, sampling: SampleConfig
) -> dict[int, np.ndarray]:
    """The paths along which such sequences would lead, by step, (count, T - To + 2, 2) in the plane of the scene."""
    plans = sample_plans(policy, episode, steps, count, sampling)
    return {
        step: plane.planned_path({key: rows[step] for key, rows in episode.observations.items()}, plan)
        for step, plan in zip(steps, plans, strict=True)
    }


def _fan(policy: DiffusionPolicy, episode: Episode, plane: Drawable, sampling: SampleConfig) -> Fan:
    """What was, and what might have been, planned in an episode: at its re-plannings, evenly from all if they are
    many."""
    steps = [plan.step for plan in episode.plans]
    evenly = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), FAN_MOMENTS)).astype(int))
    paths = draw_plans(policy, episode, plane, [steps[i] for i in evenly], FAN_PLANS, sampling)
    moments = [Moment(step, np.stack([as_path(one) for one in path])) for step, path in paths.items()]
    xy = as_path(plane.path(episode.observations))
    return Fan(episode.seed, episode.repeat, episode.mode, episode.success, xy, moments)


def _demonstrated_paths(loaded: PolicyInEnv, plane: Drawable) -> list[PlanePath]:
    """Paths of the demonstrations, where they are of this environment, still there and still the same."""
    environment, recorded = loaded.checkpoint.environment, loaded.checkpoint.dataset
    if not is_same_id(loaded.env_id, environment.id) or loaded.env_kwargs != environment.arguments:
        return []
    keys = tuple(loaded.policy.shapes.observations)
    store = open_recorded("the checkpoint", recorded.location)
    if store.fingerprint(keys, recorded.action_key) != recorded.fingerprint:
        raise ValueError(f"{recorded.location} has changed since the training")
    return [
        PlanePath(episode.mode, episode.success is not False, as_path(plane.path(episode.data)))
        for episode in store.episodes(choose_drawn(len(store.episode_ends)))
    ]


def _videos(loaded: PolicyInEnv, episodes: Sequence[Episode], workers: int, remarks: Remarks) -> list[Video]:
    """Films of episodes; none where the environment cannot be filmed."""
    if not episodes or "rgb_array" not in (loaded.env.metadata.get("render_modes") or ()):
        return []
    every = max(2, *(math.ceil(len(episode.actions) / MOST_FRAMES) for episode in episodes))
    scripts = [Script(episode.seed, episode.actions) for episode in episodes]
    filmer = partial(Filmer, loaded.make_env, every, loaded.frames_per_second)
    films = imap(filmer, scripts, min(workers, len(scripts)))
    videos: list[Video] = []
    failed: dict[str, list[str]] = {}  # seeds by reason

    def gather() -> None:
        for episode, film in zip(episodes, films, strict=True):
            if isinstance(film, bytes):
                videos.append(Video(episode.mode, episode.success, episode.seed, film))
            else:
                failed.setdefault(film, []).append(str(episode.seed))

    remarks.attempt("no more films", gather, None)
    for reason, seeds in failed.items():
        remarks.say(f"no film of seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}: {reason}")
    return videos


def _training(run: Path, remarks: Remarks) -> list[dict[str, Any]]:
    """What the metrics file beside the checkpoint says of the losses; lines that say something else are passed over."""

    def read() -> list[dict[str, Any]]:
        path = run / "metrics.jsonl"
        path = path if path.exists() else checkpoint.find(run).parent / path.name
        return parse_losses(read_bytes(path, MOST_METRICS_BYTES)) if path.exists() else []

    return remarks.attempt("the losses of the training are not drawn", read, [])


def parse_losses(content: bytes) -> list[dict[str, Any]]:
    """The lines of a metrics file, at most MOST_LOSSES of them, that give a step and a finite loss."""
    rows = []
    lines = content.splitlines()
    for line in lines[:: math.ceil(len(lines) / MOST_LOSSES) or 1]:
        with contextlib.suppress(ValueError, AttributeError):
            row = parse_json(line)
            numbers = [row.get(name) for name in ("step", "loss", "validation_loss")]
            if all(type(number) in (int, float) and abs(number) < 1e30 for number in numbers if number is not None):
                step, loss, validated = numbers
                if step is not None and loss is not None:
                    rows.append({"step": step, "loss": loss, "validation_loss": validated})
    return rows

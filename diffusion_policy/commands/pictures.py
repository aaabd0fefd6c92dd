"""What the report shows beside numbers, gathered from environment, dataset, policy and simulator."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.environment import is_same_id
from diffusion_policy.commands.episodes import draw_bytes, observe
from diffusion_policy.commands.kept_episodes import as_path
from diffusion_policy.commands.losses import read_losses
from diffusion_policy.commands.policy_in_env import PolicyInEnv, choose_modes
from diffusion_policy.commands.seen_again import see_again
from diffusion_policy.commands.sights import list_sights
from diffusion_policy.commands.stores import open_recorded
from diffusion_policy.config import SampleConfig
from diffusion_policy.envs.protocols import Drawable, as_drawable, as_pictured, places_of
from diffusion_policy.evaluation.engines import imap
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.report.evaluation_figures import Sight, choose_drawn
from diffusion_policy.report.page import NO_PICTURES, Fan, Moment, Pictures, PlanePath, Video
from diffusion_policy.report.shown import FANS, choose_moments, choose_shown
from diffusion_policy.report.video import Filmer, Pixels, Script

FAN_PLANS = 24
"""Sequences that are sampled again for each moment of an episode that is shown."""
SEEN, SEEN_MOMENTS = 3, 6
"""Episodes of which the images that the policy was given are shown, and how many of each."""
MOST_FRAMES = 300
"""Of one film; a longer episode is filmed at fewer of its steps."""
MOST_DRAW_BYTES = 2**27
"""Of the noise of sequences that are sampled at once."""


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
    shown = remarks.attempt(
        "no episodes could be chosen to show", lambda: choose_shown(episodes, choose_modes(loaded)[0]), []
    )
    drawn = remarks.attempt(
        "no paths could be drawn", lambda: _drawn(loaded, episodes, shown[:FANS], sampling, remarks), NO_PICTURES
    )
    return drawn._replace(
        sights=remarks.attempt("no images that it saw are shown", lambda: _sights(loaded, shown[:SEEN]), []),
        videos=remarks.attempt("no films", lambda: _videos(loaded, shown[:films], workers, remarks), []),
        training=read_losses(run, remarks),
    )


def _sights(loaded: PolicyInEnv, episodes: Sequence[Episode]) -> list[Sight]:
    """What the policy saw in some episodes, where it sees."""
    sights = []
    for episode in episodes if loaded.policy.images else ():
        steps = choose_moments(episode)
        few = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), SEEN_MOMENTS)).astype(int))]
        sights += list_sights(loaded.policy, see_again(loaded, episode, few), few)
    return sights


def without_episodes(run: Path, remarks: Remarks) -> Pictures:
    """What can be shown where only the numbers of the episodes are left."""
    return NO_PICTURES._replace(training=read_losses(run, remarks))


def _drawn(
    loaded: PolicyInEnv, episodes: Sequence[Episode], fans: Sequence[Episode], sampling: SampleConfig, remarks: Remarks
) -> Pictures:
    """What lies in the plane of the environment, where it has one."""
    plane = as_drawable(loaded.env)
    if plane is None:
        return NO_PICTURES
    return NO_PICTURES._replace(
        scene=plane.scene,
        demonstrated=remarks.attempt("no demonstrations are drawn", lambda: _demonstrated_paths(loaded, plane), []),
        rolled_out=[_plane_path(plane, episode) for episode in episodes],
        fans=remarks.attempt(
            "no sampled plans are drawn", lambda: [_fan(loaded, one, plane, sampling) for one in fans], []
        ),
    )


def pixels_of(env: gymnasium.Env) -> Pixels | None:
    """How plans are drawn into an environment's pictures, where it says so."""
    pictured = as_pictured(env)
    return None if pictured is None else pictured.pixels


def _plane_path(plane: Drawable, episode: Episode) -> PlanePath:
    xy = as_path(plane.path(episode.observations))
    return PlanePath(episode.mode, episode.success, xy, episode.seed, episode.repeat)


def sample_plans(
    policy: DiffusionPolicy, episode: Episode, steps: Sequence[int], count: int, sampling: SampleConfig
) -> np.ndarray:
    """Sequences that the policy might have planned at some steps of an episode, raw actions from those steps on,
    (steps, count, T - To + 1, A)."""
    at_once = max(1, MOST_DRAW_BYTES // (count * draw_bytes(policy, sampling)))
    plans = []
    for some in (steps[i : i + at_once] for i in range(0, len(steps), at_once)):
        observed = [observe(policy, episode, step) for step in some]
        together = {key: torch.cat([one[key] for one in observed]) for key in policy.watched}
        generators = [derive_rng("pictures", episode.seed, episode.repeat, step) for step in some]
        plans.append(policy.sample(together, generators, count, sampling).cpu())
    return torch.cat(plans)[:, :, policy.config.observation_horizon - 1 :].numpy()


def draw_plans(
    policy: DiffusionPolicy,
    episode: Episode,
    plane: Drawable,
    steps: Sequence[int],
    *,
    count: int,
    sampling: SampleConfig,
) -> dict[int, np.ndarray]:
    """The paths along which such sequences would lead, by step, (count, T - To + 2, 2) in the plane of the scene."""
    plans = sample_plans(policy, episode, steps, count, sampling)
    return {
        step: plane.planned_path({key: rows[step] for key, rows in episode.observations.items()}, plan)
        for step, plan in zip(steps, plans, strict=True)
    }


def _fan(loaded: PolicyInEnv, episode: Episode, plane: Drawable, sampling: SampleConfig) -> Fan:
    """What was, and what might have been, planned in an episode: at its re-plannings, evenly from all if they are
    many."""
    steps = choose_moments(episode)
    seen = see_again(loaded, episode, steps)
    paths = draw_plans(loaded.policy, seen, plane, steps, count=FAN_PLANS, sampling=sampling)
    moments = [Moment(step, np.stack([as_path(one) for one in path])) for step, path in paths.items()]
    xy = as_path(plane.path(episode.observations))
    places = places_of(plane, {key: rows[0] for key, rows in episode.observations.items()})
    return Fan(episode.seed, episode.repeat, episode.mode, episode.success, xy, moments, places)


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

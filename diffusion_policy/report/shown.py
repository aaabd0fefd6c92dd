"""Which episodes a page shows at length, and what it draws of episodes that were kept.

Knows episodes and their traces. Knows no simulator, no policy and no store.
"""

from collections.abc import Sequence

import numpy as np

from diffusion_policy.evaluation.episode import Episode, Trace
from diffusion_policy.report.evaluation_figures import PlanePath
from diffusion_policy.report.page import NO_PICTURES, Fan, Moment, Pictures
from diffusion_policy.report.svg import SceneLike

FANS, FAN_MOMENTS = 6, 12
"""Episodes whose plans are shown, and the re-plannings of each that are looked at."""


def choose_shown(episodes: Sequence[Episode], modes: Sequence[str]) -> list[Episode]:
    """A success of each mode where there is one, else a failure, in the order of the modes; then the other failures."""
    chosen: dict[str | None, Episode] = {}
    for episode in sorted(episodes, key=lambda episode: not episode.success):  # successes first, else as they came
        chosen.setdefault(episode.mode, episode)
    order = [mode for mode in (*modes, None) if mode in chosen]
    first = [chosen[mode] for mode in order]
    names = {(episode.seed, episode.repeat) for episode in first}
    return first + [e for e in episodes if not e.success and (e.seed, e.repeat) not in names]


def choose_moments(episode: Episode) -> list[int]:
    """Steps at which an episode was planned again, evenly chosen where they are many."""
    steps = [plan.step for plan in episode.plans]
    evenly = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), FAN_MOMENTS)).astype(int))
    return [steps[i] for i in evenly]


def draw_kept(scene: SceneLike, episodes: Sequence[Episode], traces: Sequence[Trace], modes: Sequence[str]) -> Pictures:
    """The paths of episodes, and of some of them the plans as they were made."""
    traced = {(episode.seed, episode.repeat): one for episode, one in zip(episodes, traces, strict=True)}
    fans = []
    for episode in choose_shown(episodes, modes)[:FANS]:
        path, plans = traced[episode.seed, episode.repeat]
        moments = [Moment(step, plans[step][None]) for step in choose_moments(episode) if step in plans]
        fans.append(Fan(episode.seed, episode.repeat, episode.mode, episode.success, path, moments))
    return NO_PICTURES._replace(
        scene=scene,
        rolled_out=[
            PlanePath(episode.mode, episode.success, trace.path, episode.seed, episode.repeat)
            for episode, trace in zip(episodes, traces, strict=True)
        ],
        fans=fans,
    )

"""diffusion-policy study plans: what the plans of a planner are worth, before they are executed and after.

A row is a way to come to a plan: a plain sample; a sample that is led by the costs; the best of several by the costs;
and both. Each seed's first observation is planned from, and the environment judges the plans.
"""

import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from diffusion_policy.basics.files import plain, write_whole
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.episodes import require_memory
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import Study
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.commands.study_cells import Refused, keep, naming_a_stop, roll_out, show, tell_asked
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ChunkingConfig, ConfigError
from diffusion_policy.control.costs import Costs
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.diffusion.samplers import Denoise
from diffusion_policy.envs.protocols import Judging, Verdict, as_drawable, as_judging
from diffusion_policy.evaluation.intervals import Metric, clustered_mean, wilson
from diffusion_policy.evaluation.metrics import success_rate
from diffusion_policy.report.evaluation_figures import to_png
from diffusion_policy.report.plan_figures import Judged, draw_plans
from diffusion_policy.report.plans_page import write_plans_page
from diffusion_policy.report.video import write_video

CHOSEN_OF = 16
"""Plans of which the best is executed, where no --plans says otherwise."""
SHOWN = 4
"""Seeds whose plans are drawn."""
FRAMES_A_SECOND, FRAMES_HELD = 4, 8
"""Of the film, a denoising step each; and how often the last one is shown again."""
FIGURES = {
    "valid": "good plans",
    "any_valid": "seeds with one",
    "coverage": "modes with one",
    "path_ratio": "length / shortest",
    "smoothness": "bends",
    "success_open": "success, to their end",
    "success": "success, planned again",
    "milliseconds": "ms of all",
    "first_valid": "ms to a good one",
}
"""Rows of the table. A good plan comes to the goal and touches nothing; modes are those that exist from where a seed
begins; bends are the sum of squared second differences of good plans."""


class Way(NamedTuple):
    """A way to come to a plan."""

    loaded: PolicyInEnv
    chosen: bool
    """Whether the best of several is executed."""


class Sampled(NamedTuple):
    """The plans of one seed."""

    seed: int
    paths: np.ndarray
    """(N, steps, 2)"""
    verdicts: list[Verdict]
    modes: tuple[str, ...]
    """Those that exist."""
    milliseconds: float
    alone: float
    """[ms], of one plan."""
    observation: dict[str, np.ndarray]


def run(options: Study, loaded: PolicyInEnv) -> dict[str, Any]:
    """Study; returns what results.json holds, which is kept after each row. Raises ConfigError where no environment
    judges plans."""
    judging = as_judging(loaded.env)
    if judging is None:
        raise ConfigError("study plans needs an environment that judges plans, as Maze-v0 does")
    require_memory(loaded.policy, options.sample_config, PARALLEL)
    cells: dict[str, dict[str, Any]] = {}
    asked = {"plan_samples": options.plan_samples, "costs": dataclasses.asdict(options.costs)}
    results = {**tell_asked(options, loaded, **asked), "plans": cells}
    drawn: dict[str, list[Judged]] = {}
    for name, way in list_ways(loaded).items():
        console.print(name)
        with naming_a_stop(options, name):
            cells[name] = cell = measure(options, way, judging, drawn.setdefault(name, []))
        keep(options, results, cell)
    print_table(cells)
    scene = as_drawable(loaded.env)
    assert scene is not None
    picture, filmed = draw_plans(scene.scene, drawn), options.output / "denoising.mp4"
    remarks = Remarks()
    remarks.attempt("no picture", lambda: write_whole(options.output / "plans.png", to_png(picture, 120)), None)
    remarks.attempt("no film", lambda: film(options, loaded, judging, filmed), None)
    shown = filmed.read_bytes() if filmed.exists() else None
    page = options.output / "plans.html"
    show(options, "page", page, lambda path: write_plans_page(path, results, FIGURES, picture, shown))
    return results


def list_ways(loaded: PolicyInEnv) -> dict[str, Way]:
    """The rows: with costs plain, led, chosen and both; else plain alone."""
    costs = next((lead for lead in loaded.policy.leads if isinstance(lead, Costs)), None)
    if costs is None:
        return {"plain": Way(loaded, False)}
    idle = dataclasses.replace(costs, steps=0)
    others = [lead for lead in loaded.policy.leads if lead is not costs]
    unled = _with_policy(loaded, loaded.policy.with_leads([*others, idle], loaded.policy.watched))
    ways = {"plain": Way(unled, False), "best of several": Way(unled, True)}
    if costs.steps:
        ways |= {"led": Way(loaded, False), "best of several led": Way(loaded, True)}
    return ways


def print_table(cells: Mapping[str, Mapping[str, Any]]) -> None:
    """A row a figure, a column a way; a dash where there is none."""
    table = Table("plans", *cells)
    for figure, label in FIGURES.items():
        found = [cell.get(figure) for cell in cells.values()]
        values = [value["value"] if isinstance(value, dict) else value for value in found]
        table.add_row(label, *("-" if value is None else f"{value:.3g}" for value in values))
    console.print(table)


def _with_policy(loaded: PolicyInEnv, policy: Any) -> PolicyInEnv:
    return loaded._replace(checkpoint=dataclasses.replace(loaded.checkpoint, policy=policy))


def measure(options: Study, way: Way, judging: Judging, drawn: list[Judged]) -> dict[str, Any]:
    """What plans that are made so are worth; some of them are added to `drawn`."""
    try:
        sampled = [sample(options, way.loaded, judging, seed) for seed in options.seeds]
        plans = (options.chunking.plans or CHOSEN_OF) if way.chosen else None
        joined = ChunkingConfig(plans=plans, score="costs" if way.chosen else None)
        open_loop = dataclasses.replace(options, action_horizon=way.loaded.policy.steps_ahead)
        executed = {
            figure: roll_out(asked, way.loaded, options.sample_config, joined)
            for figure, asked in (("success_open", open_loop), ("success", options))
        }
    except Refused as error:
        return error.cell
    except ValueError as error:
        return Refused(str(error)).cell
    if not way.chosen:  # the same plans
        drawn += [Judged(one.seed, one.paths, one.verdicts, judging.places(one.observation)) for one in sampled[:SHOWN]]
    rates = {figure: dataclasses.asdict(success_rate(done.episodes)) for figure, done in executed.items()}
    return plain({**summarize(sampled), **rates, **executed["success"].faults})


def sample(options: Study, loaded: PolicyInEnv, judging: Judging, seed: int) -> Sampled:
    """The plans for a seed's first observation, and what the environment says of them."""
    env, policy = loaded.env, loaded.policy
    observation, _ = env.reset(seed=seed)
    planner = PolicyPlanner(policy, options.sample_config)
    rows = observe_start(planner, observation)
    times, plans = [], np.empty(0)
    for count in (1, 1, options.plan_samples):  # the first one warms up
        noise = policy.draw_noise([derive_rng("study of plans", seed)], count, options.sample_config)
        began = time.perf_counter()
        plans = planner.sample(rows, noise)[0]
        times.append(1000 * (time.perf_counter() - began))
    drawable = as_drawable(env)
    assert drawable is not None
    paths = np.asarray(drawable.planned_path(observation, plans))
    verdicts = judging.judge(observation, plans)
    return Sampled(seed, paths, verdicts, judging.modes_that_solve(observation), times[-1], times[1], observation)


def observe_start(planner: PolicyPlanner, observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a planner is given where an episode begins, {key: (1, To, ...)}."""
    return {
        key: np.repeat(np.asarray(observation[key], np.float64)[None, None], planner.observation_horizon, axis=1)
        for key in planner.observation_shapes
    }


def film(options: Study, loaded: PolicyInEnv, judging: Judging, path: Path) -> None:
    """Film how the plans of the first seed come out of noise: plain ones, and led ones below."""
    steps = {
        name: denoise_plans(options, way.loaded, judging) for name, way in list_ways(loaded).items() if not way.chosen
    }
    longest = max(map(len, steps.values()))
    frames = []
    for step in range(longest):
        shown = {name: [of_way[min(step, len(of_way) - 1)]] for name, of_way in steps.items()}
        picture = Image.open(io.BytesIO(to_png(draw_plans(judging.scene, shown), 100))).convert("RGB")
        frames.append(np.asarray(picture)[: picture.height // 2 * 2, : picture.width // 2 * 2])  # as H.264 has it
    write_video(path, np.stack([*frames, *[frames[-1]] * FRAMES_HELD]), FRAMES_A_SECOND)


def denoise_plans(options: Study, loaded: PolicyInEnv, judging: Judging) -> list[Judged]:
    """The plans of the first seed as they are predicted after each denoising step, the last ones as they are."""
    policy, sampling = loaded.policy, options.sample_config
    observation, _ = loaded.env.reset(seed=options.seed)
    planner = PolicyPlanner(policy, sampling)
    observed = {key: torch.from_numpy(rows) for key, rows in observe_start(planner, observation).items()}
    seen: list[torch.Tensor] = []

    def watch(denoise: Denoise) -> Denoise:
        def watched(xt: torch.Tensor, level: int) -> torch.Tensor:
            seen.append(denoise(xt, level))
            return seen[-1]

        return watched

    noise = policy.draw_noise([derive_rng("study of plans", options.seed)], options.plan_samples, sampling)
    last = policy.sample_from(observed, noise, sampling, [watch])
    every = [*(policy.sequences.unnormalize(x0.detach(), len(x0), observed) for x0 in seen), last]
    plans = [one[0, :, policy.config.observation_horizon - 1 :].cpu().numpy() for one in every]
    places, found = judging.places(observation), []
    for one in plans:
        paths = np.asarray(judging.planned_path(observation, one))
        found.append(Judged(options.seed, paths, judging.judge(observation, one), places))
    return found


def summarize(sampled: Sequence[Sampled]) -> dict[str, Any]:
    """The figures of all seeds, each with its interval over seeds."""
    valid = [np.array([one.valid for one in some.verdicts]) for some in sampled]
    found = [{v.mode for v in some.verdicts if v.valid} & set(some.modes) for some in sampled]
    firsts = [int(ok.argmax()) + 1 for ok in valid if ok.any()]
    alone = np.median([some.alone for some in sampled])
    return {
        "valid": _mean([ok.mean() for ok in valid], (0, 1)),
        "any_valid": dataclasses.asdict(wilson(sum(bool(ok.any()) for ok in valid), len(valid))),
        "coverage": _mean(
            [len(f) / len(some.modes) for f, some in zip(found, sampled, strict=True) if some.modes], (0, 1)
        ),
        "modes": float(np.mean([len(some.modes) for some in sampled])),
        "path_ratio": _mean([v.ratio for some in sampled for v in some.verdicts if v.valid]),
        "smoothness": _mean(
            [
                (np.diff(path, n=2, axis=0) ** 2).sum()
                for some, ok in zip(sampled, valid, strict=True)
                for path in some.paths[ok]
            ]
        ),
        "milliseconds": float(np.median([some.milliseconds for some in sampled])),
        "first_valid": float(alone * np.mean(firsts)) if firsts else None,
    }


def _mean(values: Sequence[float], bounds: tuple[float, float] | None = None) -> dict[str, Any]:
    if not len(values):
        return dataclasses.asdict(Metric(None))
    return dataclasses.asdict(clustered_mean(np.asarray(values, float), np.ones(len(values)), bounds))

"""diffusion-policy study plans: what the plans of a planner are worth, before they are executed and after.

A row is a way to come to a plan: a plain sample; a sample that is led by the costs; the best of several by the costs;
and both. Each seed's first observation is planned from, and the environment judges the plans.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.files import plain, write_whole
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.commands.episodes import require_memory
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import Study
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.commands.study_cells import Refused, keep, naming_a_stop, roll_out, show, tell_asked
from diffusion_policy.commands.terminal import console, print_cells
from diffusion_policy.config import ChunkingConfig, ConfigError
from diffusion_policy.control.costs import Costs
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.envs.protocols import Judging, Verdict, as_drawable, as_judging
from diffusion_policy.evaluation.intervals import Metric, clustered_mean, wilson
from diffusion_policy.evaluation.metrics import success_rate
from diffusion_policy.report.evaluation_figures import to_png
from diffusion_policy.report.plan_figures import Judged, draw_plans

CHOSEN_OF = 16
"""Plans of which the best is executed, where no --plans says otherwise."""
SHOWN = 4
"""Seeds whose plans are drawn."""
FIGURES = {
    "valid": "plans that come to the goal and touch nothing",
    "any_valid": "seeds with such a plan",
    "coverage": "modes that exist and have such a plan",
    "path_ratio": "length of such plans over the shortest way",
    "smoothness": "their sum of squared second differences",
    "success_open": "success, plans executed to their end",
    "success": "success, planned again",
    "milliseconds": "milliseconds of all plans of a seed",
    "first_valid": "milliseconds until the first such plan, planned one by one",
}


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
    for figure, title in FIGURES.items():
        print_cells(title, "plans", "", {name: {"": cell} for name, cell in cells.items()}, figure, "{:.3g}")
    scene = as_drawable(loaded.env)
    assert scene is not None
    picture = options.output / "plans.png"
    show(options, "picture", picture, lambda path: write_whole(path, to_png(draw_plans(scene.scene, drawn), 120)))
    return results


def list_ways(loaded: PolicyInEnv) -> dict[str, Way]:
    """The rows: with costs plain, led, chosen and both; else plain alone."""
    costs = next((lead for lead in loaded.policy.leads if isinstance(lead, Costs)), None)
    if costs is None:
        return {"plain": Way(loaded, False)}
    idle = dataclasses.replace(costs, steps=0)
    unled = _with_policy(loaded, loaded.policy.with_leads([idle], loaded.policy.watched))
    ways = {"plain": Way(unled, False), "best of several": Way(unled, True)}
    if costs.steps:
        ways |= {"led": Way(loaded, False), "best of several led": Way(loaded, True)}
    return ways


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
    drawn += [Judged(one.seed, one.paths, one.verdicts, judging.places(one.observation)) for one in sampled[:SHOWN]]
    rates = {figure: dataclasses.asdict(success_rate(done.episodes)) for figure, done in executed.items()}
    return plain({**summarize(sampled), **rates, **executed["success"].faults})


def sample(options: Study, loaded: PolicyInEnv, judging: Judging, seed: int) -> Sampled:
    """The plans for a seed's first observation, and what the environment says of them."""
    env, policy = loaded.env, loaded.policy
    observation, _ = env.reset(seed=seed)
    planner = PolicyPlanner(policy, options.sample_config)
    rows = {
        key: np.repeat(np.asarray(observation[key], np.float64)[None, None], planner.observation_horizon, axis=1)
        for key in planner.observation_shapes
    }
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

"""diffusion-policy study: one checkpoint under every sampler (here), every way to join plans, or every instruction; or
several policies."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_policy.basics.files import format_json, write_whole
from diffusion_policy.basics.metric_table import METRICS
from diffusion_policy.basics.text import one_line
from diffusion_policy.commands import study_chunking, study_instructions, study_policies
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.episodes import (
    describe_machine,
    make_group_planner,
    require_memory,
    run_episodes,
)
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.joining import choose_chunking, find_roll
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import Study
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.policy_in_env import (
    PolicyInEnv,
    choose_modes,
    load_with_environment,
    refuse_seen_seeds,
)
from diffusion_policy.commands.terminal import console, print_cells
from diffusion_policy.config import SampleConfig, SamplerName
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.evaluation import metrics
from diffusion_policy.evaluation.rollout import planning_batch
from diffusion_policy.report.evaluation_figures import to_png
from diffusion_policy.report.figures import draw_study

STEPS = (1, 2, 4, 8, 16, 32)
LATENCY_PLANS = 30

Cells = dict[str, dict[str, Any]]
"""What was measured, by sampler and number of steps."""


def run(options: Study) -> dict[str, Any]:
    """Study; returns what results.json holds. Raises ValueError where `evaluate` does."""
    require_fresh(options.output)
    loaded = load_with_environment(options, instructions=[*options.texts])
    refuse_seen_seeds(loaded, options.seeds)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.what == "chunking":
        return study_chunking.run(options, loaded)
    if options.what in ("networks", "students"):
        return study_policies.run(options, loaded)
    if options.what == "instructions":
        return study_instructions.run(options, loaded)
    cells: Cells = {}
    results = {**tell_asked(options, loaded), "samplers": cells}
    for name in options.samplers:
        cells[name] = {}
        for count in choose_steps(options, loaded, name):
            console.print(f"{name}, {count} steps")
            try:
                cells[name][str(count)] = cell = measure(options, loaded, options.sampling(name, count))
            except (Interrupted, KeyboardInterrupt):
                raise Interrupted(f"stopped at {name}, {count} steps; the others are in {options.output}") from None
            if "refused" in cell:
                console.print(f"  not possible: {cell['refused']}")
            write_whole(options.output / "results.json", format_json(results))
    print_tables(cells)
    draw(options, results)
    return results


def tell_asked(options: Study, loaded: PolicyInEnv) -> dict[str, Any]:
    """What is studied, and where: the first fields of results.json."""
    policy = loaded.policy
    return {
        "environment": loaded.env_id,
        "env_kwargs": loaded.env_kwargs,
        "checkpoint": str(options.checkpoint),
        "training_steps": loaded.checkpoint.step,
        "noise_levels": policy.config.noise_levels,
        "episodes": options.episodes,
        "first_seed": options.seed,
        "mode": options.mode,
        "instruction": next(iter(options.texts), None),
        "guidance": options.guidance,
        "clip": policy.choose_clip(SampleConfig()),
        "planning_batch": planning_batch(PARALLEL),
        "action_horizon": options.action_horizon or policy.config.action_horizon,
        **describe_machine(policy),
    }


def choose_steps(options: Study, loaded: PolicyInEnv, name: SamplerName) -> Sequence[int]:
    """The numbers of steps at which a sampler is tried."""
    most = loaded.policy.diffusion.most_steps(SAMPLERS[name])
    return options.steps or loaded.policy.diffusion.trained_steps or (*(n for n in STEPS if n < most), most)


def measure(options: Study, loaded: PolicyInEnv, sampling: SampleConfig) -> dict[str, Any]:
    """What one sampler does at one number of steps; why not, where it cannot."""
    policy = loaded.policy
    try:
        policy.resolve_sampling(sampling)
        require_memory(policy, sampling, PARALLEL)
        chunking = choose_chunking(options.chunking, policy, sampling, find_roll(loaded.env))
        episodes, lost, mode_failures = run_episodes(
            loaded,
            options.seeds,
            make_group_planner(policy, sampling, "eager", PARALLEL, samples=chunking.samples),
            parallel=PARALLEL,
            workers=options.workers,
            action_horizon=options.action_horizon,
            chunking=chunking,
        )
    except (ValueError, FloatingPointError) as error:
        return {"refused": one_line(str(error))}
    if not episodes:
        return {"refused": f"every episode failed: {lost[0].reason}", "lost": len(lost)}
    modes, _ = choose_modes(loaded)
    solved = metrics.successes_by_mode(episodes)
    horizon = options.action_horizon
    latencies = time_plans(PolicyPlanner(policy, sampling), 1, LATENCY_PLANS, chunking, action_horizon=horizon)
    return {
        "success_rate": dataclasses.asdict(metrics.success_rate(episodes)),
        "mode_entropy": dataclasses.asdict(metrics.behaviour_entropy(solved, modes)),
        "mode_coverage": dataclasses.asdict(metrics.behaviour_coverage(solved, modes)),
        "modes": {mode: solved.get(mode, 0) for mode in modes},
        "milliseconds": metrics.percentiles(latencies, (50,))["p50"],
        "lost": len(lost),
        "errors": [dataclasses.asdict(one) for one in lost],
        "mode_failures": [dataclasses.asdict(one) for one in mode_failures],
    }


def print_tables(cells: Cells) -> None:
    """A table a figure: a row a sampler, a column a number of steps."""
    for name in ("success_rate", "mode_entropy"):
        print_cells(METRICS[name].label, "sampler", "steps", cells, name, "{:.2f}")
    print_cells("milliseconds of one plan", "sampler", "steps", cells, "milliseconds", "{:.0f}")
    if any(cell.get("lost") for of_sampler in cells.values() for cell in of_sampler.values()):
        print_cells("episodes lost", "sampler", "steps", cells, "lost", "{:.0f}")


def draw(options: Study, results: Mapping[str, Any]) -> None:
    """Write the picture, and say where all lies; a picture that cannot be drawn is a remark."""
    picture = options.output / "samplers.png"
    Remarks().attempt("no picture", lambda: write_whole(picture, to_png(draw_study(results), 150)), None)
    beside = f", picture in {picture}" if picture.exists() else ""
    console.print(f"results in {options.output}/results.json{beside}", soft_wrap=True)

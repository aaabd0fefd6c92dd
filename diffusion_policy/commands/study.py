"""diffusion-policy study: one checkpoint under every sampler (here), every way to join plans, or every instruction; or
several policies, or plans before they are executed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffusion_policy.basics.files import write_whole
from diffusion_policy.basics.metric_table import METRICS
from diffusion_policy.commands import study_chunking, study_instructions, study_plans, study_policies
from diffusion_policy.commands.episodes import (
    require_memory,
)
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import Study
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.policy_in_env import (
    PolicyInEnv,
    choose_modes,
    load_with_environment,
    refuse_seen_seeds,
)
from diffusion_policy.commands.study_cells import Cells, Refused, keep, naming_a_stop, roll_out, show, tell_asked
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
    if options.what == "plans":
        return study_plans.run(options, loaded)
    return study_samplers(options, loaded)


def study_samplers(options: Study, loaded: PolicyInEnv) -> dict[str, Any]:
    """Every sampler; returns what results.json holds, which is kept after each cell."""
    cells: Cells = {}
    asked = {
        "noise_levels": loaded.policy.config.noise_levels,
        "mode": options.mode,
        "instruction": next(iter(options.texts), None),
        "guidance": options.guidance,
        "clip": loaded.policy.choose_clip(SampleConfig()),
        "planning_batch": planning_batch(PARALLEL),
    }
    results = {**tell_asked(options, loaded, **asked), "samplers": cells}
    for name in options.samplers:
        cells[name] = {}
        for count in choose_steps(options, loaded, name):
            console.print(f"{name}, {count} steps")
            with naming_a_stop(options, f"{name}, {count} steps"):
                cells[name][str(count)] = cell = measure(options, loaded, options.sampling(name, count))
            keep(options, results, cell)
    print_tables(cells)
    show(
        options,
        "picture",
        options.output / "samplers.png",
        lambda path: write_whole(path, to_png(draw_study(results), 150)),
    )
    return results


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
        done = roll_out(options, loaded, sampling, options.chunking)
    except Refused as error:
        return error.cell
    except ValueError as error:
        return Refused(str(error)).cell
    modes, _ = choose_modes(loaded)
    solved = metrics.successes_by_mode(done.episodes)
    horizon = options.action_horizon
    latencies = time_plans(PolicyPlanner(policy, sampling), 1, LATENCY_PLANS, done.chunking, action_horizon=horizon)
    return {
        "success_rate": dataclasses.asdict(metrics.success_rate(done.episodes)),
        "mode_entropy": dataclasses.asdict(metrics.behaviour_entropy(solved, modes)),
        "mode_coverage": dataclasses.asdict(metrics.behaviour_coverage(solved, modes)),
        "modes": {mode: solved.get(mode, 0) for mode in modes},
        "milliseconds": metrics.percentiles(latencies, (50,))["p50"],
        **done.faults,
    }


def print_tables(cells: Cells) -> None:
    """A table a figure: a row a sampler, a column a number of steps."""
    for name in ("success_rate", "mode_entropy"):
        print_cells(METRICS[name].label, "sampler", "steps", cells, name, "{:.2f}")
    print_cells("milliseconds of one plan", "sampler", "steps", cells, "milliseconds", "{:.0f}")
    if any(cell.get("lost") for of_sampler in cells.values() for cell in of_sampler.values()):
        print_cells("episodes lost", "sampler", "steps", cells, "lost", "{:.0f}")

"""diffusion-policy study chunking: one checkpoint under every way to join plans, against how long planning takes."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from diffusion_policy.basics.files import format_json, plain, write_whole
from diffusion_policy.basics.metric_table import METRICS
from diffusion_policy.basics.text import one_line
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.episodes import (
    describe_machine,
    make_group_planner,
    measure_episodes,
    require_memory,
    run_episodes,
)
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.joining import choose_chunking, find_roll
from diffusion_policy.commands.noisy_actions import make_noisy
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import ROLLED, Study
from diffusion_policy.commands.policy_in_env import PolicyInEnv, choose_modes
from diffusion_policy.commands.terminal import console, print_cells
from diffusion_policy.control.controller import require_horizons
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.report.chunking_page import FIGURES, write_chunking_page

TIMED = 30
"""Plans that the time of a plan is taken from."""

Cells = dict[str, dict[str, Any]]
"""What was measured, by strategy and delay."""


def run(options: Study, loaded: PolicyInEnv) -> dict[str, Any]:
    """Study; returns what results.json holds, which is kept after each cell."""
    require_memory(loaded.policy, options.sample_config, PARALLEL)
    cells: Cells = {}
    results = {**tell_asked(options, loaded), "strategies": cells}
    noisy = loaded
    if options.action_noise:
        noisy = loaded._replace(make_env=partial(make_noisy, loaded.make_env, options.action_noise))
    for name in options.strategies or choose_strategies(loaded):
        cells[name] = {}
        for delay in options.delay_steps:
            console.print(f"{name}, delay {delay}")
            try:
                cells[name][str(delay)] = cell = measure(options, noisy, name, delay)
            except (Interrupted, KeyboardInterrupt):
                raise Interrupted(f"stopped at {name}, delay {delay}; the others are in {options.output}") from None
            if "refused" in cell:
                console.print(f"  not possible: {cell['refused']}", soft_wrap=True)
            write_whole(options.output / "results.json", format_json(results))
    for name in FIGURES:
        print_cells(METRICS[name].label, "strategy", "delay", cells, name, "{:.2f}")
    print_cells("milliseconds of one plan", "strategy", "delay", cells, "milliseconds", "{:.0f}")
    page = options.output / "chunking.html"
    Remarks().attempt("no page", lambda: write_chunking_page(page, results), None)
    beside = f", page in {page}" if page.exists() else ""
    console.print(f"results in {options.output}/results.json{beside}", soft_wrap=True)
    return results


def tell_asked(options: Study, loaded: PolicyInEnv) -> dict[str, Any]:
    """What is studied, and where: the first fields of results.json."""
    policy = loaded.policy
    return {
        "environment": loaded.env_id,
        "env_kwargs": loaded.env_kwargs,
        "checkpoint": str(options.checkpoint),
        "training_steps": loaded.checkpoint.step,
        "episodes": options.episodes,
        "first_seed": options.seed,
        "sampling": dataclasses.asdict(options.sample_config),
        "chunking": plain(dataclasses.asdict(options.chunking)),
        "action_horizon": options.action_horizon or policy.config.action_horizon,
        "action_noise": options.action_noise,
        "control_period": 1 / loaded.frames_per_second,
        **describe_machine(policy),
    }


def choose_strategies(loaded: PolicyInEnv) -> tuple[str, ...]:
    """All that this policy and environment can do."""
    trained = ("trained-rtc",) if loaded.policy.config.max_delay else ()
    names = ("receding", "rtc", *trained, "bid", "ensemble")
    return (*names, *(name + ROLLED for name in ("receding", "rtc", *trained) if find_roll(loaded.env)))


def measure(options: Study, loaded: PolicyInEnv, name: str, delay: int) -> dict[str, Any]:
    """What one strategy does under one delay; why not, where it cannot."""
    policy, sampling = loaded.policy, options.sample_config
    try:
        config = options.strategy(name)
        chunking = choose_chunking(config, policy, sampling, find_roll(loaded.env))
        planner = make_group_planner(policy, sampling, "eager", PARALLEL, samples=chunking.samples)
        require_horizons(planner.steps, options.action_horizon or planner.action_horizon, delay)
        episodes, lost, mode_failures = run_episodes(
            loaded,
            options.seeds,
            planner,
            parallel=PARALLEL,
            workers=options.workers,
            delay_steps=delay,
            action_horizon=options.action_horizon,
            chunking=chunking,
        )
    except (ValueError, FloatingPointError) as error:
        return {"refused": one_line(str(error))}
    if not episodes:
        return {"refused": f"every episode failed: {lost[0].reason}", "lost": len(lost)}
    modes, _ = choose_modes(loaded)
    card = measure_episodes(loaded, episodes, modes, 1 / loaded.frames_per_second, Remarks()).fields()
    horizon, plain_planner = options.action_horizon, PolicyPlanner(policy, sampling)
    times = time_plans(plain_planner, 1, TIMED, chunking, delay_steps=delay, action_horizon=horizon)
    return plain(
        {figure: card[figure] for figure in FIGURES}
        | {
            "measures": card["measures"],
            "modes": card["modes"],
            "milliseconds": float(np.median(times)),
            "lost": len(lost),
            "errors": [dataclasses.asdict(one) for one in lost],
            "mode_failures": [dataclasses.asdict(one) for one in mode_failures],
        }
    )

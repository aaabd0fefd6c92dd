"""diffusion-policy study chunking: one checkpoint under every way to join plans, against how long planning takes."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from diffusion_policy.basics.files import plain
from diffusion_policy.basics.metric_table import METRICS
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.episodes import (
    measure_episodes,
    require_memory,
)
from diffusion_policy.commands.joining import find_roll
from diffusion_policy.commands.noisy_actions import make_noisy
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import ROLLED, Study
from diffusion_policy.commands.policy_in_env import PolicyInEnv, choose_modes
from diffusion_policy.commands.study_cells import Cells, Refused, keep, naming_a_stop, roll_out, show, tell_asked
from diffusion_policy.commands.terminal import console, print_cells
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.report.chunking_page import FIGURES, write_chunking_page

TIMED = 30
"""Plans that the time of a plan is taken from."""


def run(options: Study, loaded: PolicyInEnv) -> dict[str, Any]:
    """Study; returns what results.json holds, which is kept after each cell."""
    require_memory(loaded.policy, options.sample_config, PARALLEL)
    cells: Cells = {}
    asked = {
        "sampling": dataclasses.asdict(options.sample_config),
        "chunking": plain(dataclasses.asdict(options.chunking)),
        "action_noise": options.action_noise,
        "control_period": 1 / loaded.frames_per_second,
    }
    results = {**tell_asked(options, loaded, **asked), "strategies": cells}
    noisy = loaded
    if options.action_noise:
        noisy = loaded._replace(make_env=partial(make_noisy, loaded.make_env, options.action_noise))
    for name in options.strategies or choose_strategies(loaded):
        cells[name] = {}
        for delay in options.delay_steps:
            console.print(f"{name}, delay {delay}")
            with naming_a_stop(options, f"{name}, delay {delay}"):
                cells[name][str(delay)] = cell = measure(options, noisy, name, delay)
            keep(options, results, cell)
    for name in FIGURES:
        print_cells(METRICS[name].label, "strategy", "delay", cells, name, "{:.2f}")
    print_cells("milliseconds of one plan", "strategy", "delay", cells, "milliseconds", "{:.0f}")
    show(options, "page", options.output / "chunking.html", lambda path: write_chunking_page(path, results))
    return results


def choose_strategies(loaded: PolicyInEnv) -> tuple[str, ...]:
    """All that this policy and environment can do."""
    trained = ("trained-rtc",) if loaded.policy.config.max_delay else ()
    names = ("receding", "rtc", *trained, "bid", "ensemble")
    return (*names, *(name + ROLLED for name in ("receding", "rtc", *trained) if find_roll(loaded.env)))


def measure(options: Study, loaded: PolicyInEnv, name: str, delay: int) -> dict[str, Any]:
    """What one strategy does under one delay; why not, where it cannot."""
    sampling = options.sample_config
    try:
        done = roll_out(options, loaded, sampling, options.strategy(name), delay)
    except Refused as error:
        return error.cell
    modes, _ = choose_modes(loaded)
    card = measure_episodes(loaded, done.episodes, modes, 1 / loaded.frames_per_second, Remarks()).fields()
    horizon, plain_planner = options.action_horizon, PolicyPlanner(loaded.policy, sampling)
    times = time_plans(plain_planner, 1, TIMED, done.chunking, delay_steps=delay, action_horizon=horizon)
    return plain(
        {figure: card[figure] for figure in FIGURES}
        | {
            "measures": card["measures"],
            "modes": card["modes"],
            "milliseconds": float(np.median(times)),
            **done.faults,
        }
    )

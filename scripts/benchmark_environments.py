"""Control steps a second of every task: on one core, driven by its experts, and of 50 episodes of BlockPush that run at
once under an instant policy, in one process and in several: python scripts/benchmark_environments.py"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tyro

from diffusion_policy import envs
from diffusion_policy.envs.experts import EXPERTS
from diffusion_policy.evaluation.host import StepsResult
from diffusion_policy.evaluation.pool import EnvironmentPool

CASES = (
    ("diffusion_policy/Avoid-v0", {"rows": 1}),
    ("diffusion_policy/Avoid-v0", {"rows": 2}),
    ("diffusion_policy/Avoid-v0", {"rows": 3}),
    ("diffusion_policy/BlockPush-v0", {}),
)
BLOCK_PUSH = "diffusion_policy/BlockPush-v0"


@dataclass(frozen=True)
class Args:
    """Measure the simulation alone: resets and the experts' own time are left out."""

    steps: int = 5000
    """Control steps for each figure."""
    repeats: int = 5
    """Figures for each case; the median and the spread are printed."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of processes for the episodes that run at once."""
    slots: int = 50
    """Episodes that run at once."""
    rounds: int = 20
    """Plans of each of these episodes."""
    action_horizon: int = 8
    """Control steps of each plan (Ta)."""


def measure(env_id: str, arguments: dict[str, Any], steps: int) -> float:
    """Control steps a second."""
    env = envs.make(env_id, **arguments)
    modes = env.get_wrapper_attr("modes")
    seed = done = spent = 0
    while done < steps:
        expert = EXPERTS[env_id](modes[seed % len(modes)])
        observation, _ = env.reset(seed=seed)
        seed += 1
        over = False
        while not over:
            action = expert.act(observation)
            started = time.perf_counter()
            observation, _, terminated, truncated, _ = env.step(action)
            spent += time.perf_counter() - started
            done += 1
            over = terminated or truncated
    env.close()
    return done / spent


def measure_pool(workers: int, slots: int, rounds: int, action_horizon: int) -> tuple[float, float]:
    """Control steps a second of all slots together, and the share of the time that went into traffic between
    processes."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.02, 0.02, (rounds, slots, action_horizon, 2)).astype(np.float32)
    with EnvironmentPool(partial(envs.make, BLOCK_PUSH), workers) as pool:
        pool.reset({slot: slot for slot in range(slots)})
        asked, worked = pool.seconds_asked, pool.seconds_worked
        started = time.perf_counter()
        for sequences in actions:
            answers = pool.step(dict(enumerate(sequences)))
            assert all(isinstance(answer, StepsResult) for answer in answers.values()), answers
        spent = time.perf_counter() - started
        asked, worked = pool.seconds_asked - asked, pool.seconds_worked - worked
    return slots * rounds * action_horizon / spent, (asked - worked) / spent


def show(name: str, rates: list[float], unit: str) -> float:
    """Print the median and the spread; returns the median."""
    rates = sorted(rates)
    median = rates[len(rates) // 2]
    print(f"{name}: {median:.0f} {unit} ({rates[0]:.0f} to {rates[-1]:.0f})")
    return median


def main(args: Args) -> None:
    """Print a line for each case."""
    for env_id, arguments in CASES:
        name = " ".join([env_id, *(f"{key}={value}" for key, value in arguments.items())])
        show(name, [measure(env_id, arguments, args.steps) for _ in range(args.repeats)], "control steps/s")
    medians = []
    for workers in args.workers:
        figures = [measure_pool(workers, args.slots, args.rounds, args.action_horizon) for _ in range(args.repeats)]
        name = f"{args.slots} episodes of {BLOCK_PUSH} at once, {workers} processes"
        medians.append(show(name, [rate for rate, _ in figures], "control steps/s"))
        traffic = sorted(share for _, share in figures)
        print(
            f"    {medians[-1] / medians[0]:.2f} times the first; traffic {traffic[len(traffic) // 2]:.1%} of the time"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))

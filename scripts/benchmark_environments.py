"""Control steps a second of every task on one core, driven by its experts: python scripts/benchmark_environments.py"""

import time
from dataclasses import dataclass
from typing import Any

import tyro

from diffusion_policy import envs
from diffusion_policy.envs.experts import EXPERTS


@dataclass(frozen=True)
class Args:
    """Measure the simulation alone: resets and the experts' own time are left out."""

    steps: int = 5000
    """Control steps for each figure."""
    repeats: int = 5
    """Figures for each environment; the median and the spread are printed."""


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


def main(args: Args) -> None:
    """Print a line for each environment."""
    for env_id in envs.ENV_IDS:
        for rows in (1, 2, 3):
            rates = sorted(measure(env_id, {"rows": rows}, args.steps) for _ in range(args.repeats))
            median = rates[len(rates) // 2]
            print(f"{env_id} rows={rows}: {median:.0f} control steps/s ({rates[0]:.0f} to {rates[-1]:.0f})")


if __name__ == "__main__":
    main(tyro.cli(Args))

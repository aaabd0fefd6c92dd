"""How long a plan takes, whether that fits the time between two control steps, and what would make it fit.

Knows planners. Needs no torch.
"""

import time
from typing import NamedTuple

import numpy as np

from diffusion_policy.basics.images import observed_type
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.control.chunking import Chunking, Handover
from diffusion_policy.control.planner import Planner

WARM_UPS = 3
"""Plans before the first that counts."""


class Latency(NamedTuple):
    """Times of a plan [ms], and what a control step leaves for it."""

    p50: float
    p95: float
    p99: float
    period: float
    """Time between two control steps [ms]."""
    delay_steps: int
    """Control steps that a plan may take, while the one before it runs on; 0: the robot waits for it."""
    advice: tuple[str, ...]
    """What would make it fit, a sentence each; empty where it fits."""

    @property
    def fits(self) -> bool:
        """Whether 99 of 100 plans are ready in time."""
        return self.p99 <= allowed(self.period, self.delay_steps)

    def __str__(self) -> str:
        of = f"a control step of {self.period:.1f} ms" if not self.delay_steps else (
            f"{self.delay_steps} control steps of {self.period:.1f} ms"
        )  # fmt: skip
        times = f"a plan takes {self.p50:.1f} ms (p99 {self.p99:.1f} ms)"
        return f"{times}, which fits {of}" if self.fits else f"{times}, longer than {of}: {'; '.join(self.advice)}"


def allowed(period: float, delay_steps: int) -> float:
    """Time in which a plan must be ready [ms]: within the step that it is for, or within the steps of its delay."""
    return period * max(1, delay_steps)


def time_plans(
    planner: Planner,
    rows: int = 1,
    plans: int = 50,
    chunking: Chunking | None = None,
    *,
    delay_steps: int = 0,
    action_horizon: int | None = None,
) -> list[float]:
    """Wall times [ms] of planning so often for `rows` observations, after a warm-up, each plan joined to the one before
    as `chunking` says."""
    chunking, horizon = chunking or Chunking(), action_horizon or planner.action_horizon
    rng = derive_rng("latency")
    observations = {
        key: np.zeros((rows, planner.observation_horizon, *shape), observed_type(shape))
        for key, shape in planner.observation_shapes.items()
    }
    noise = rng.standard_normal((rows, chunking.samples, *planner.noise_shape), np.float32)
    executing = np.full((rows, planner.steps, *planner.action_shape), np.nan)
    times = []
    for made in range(WARM_UPS + plans):
        handover = Handover(executing, delay_steps, horizon, np.full(rows, made))
        started = time.perf_counter()
        joined = chunking.plan(planner, observations, noise, handover)
        times.append(1000 * (time.perf_counter() - started))
        executing = np.full_like(executing, np.nan)
        executing[:, : planner.steps - horizon] = joined.executed[:, horizon:]
    return times[WARM_UPS:]


def check_latency(
    planner: Planner,
    control_rate: float,
    *,
    action_horizon: int | None = None,
    delay_steps: int = 0,
    chunking: Chunking | None = None,
    sampling_steps: int | None = None,
    plans: int = 50,
) -> Latency:
    """Measure whether plans fit a control rate [1/s]; `sampling_steps`: of the planner, to say how many would fit.
    Raises ValueError for a rate that is not above 0."""
    if not 0 < control_rate < np.inf:
        raise ValueError(f"the control rate must be above 0 [1/s]; got {control_rate}")
    times = time_plans(planner, 1, plans, chunking, delay_steps=delay_steps, action_horizon=action_horizon)
    p50, p95, p99 = (float(value) for value in np.percentile(times, [50, 95, 99]))
    latency = Latency(p50, p95, p99, 1000 / control_rate, delay_steps, ())
    if latency.fits:
        return latency
    spare = planner.steps - (action_horizon or planner.action_horizon)
    return latency._replace(advice=advise(latency, spare, sampling_steps))


def advise(latency: Latency, spare_steps: int, sampling_steps: int | None = None) -> tuple[str, ...]:
    """What would make a plan fit; `spare_steps`: T - To + 1 - Ta, the longest delay."""
    share = allowed(latency.period, latency.delay_steps) / latency.p99
    advice = []
    if sampling_steps and int(sampling_steps * share) >= 1:
        advice.append(f"about {int(sampling_steps * share)} --sampling-steps instead of {sampling_steps} would fit")
    needed = int(np.ceil(latency.p99 / latency.period))
    if needed > latency.delay_steps and needed <= spare_steps:
        advice.append(f"--delay-steps {needed} lets the plan before it run on meanwhile")
    elif needed > spare_steps:
        advice.append(f"a delay would need {needed} steps of the plan, and {max(spare_steps, 0)} are left beside Ta")
    advice.append("another --backend, or a narrower network, may be faster (diffusion-policy benchmark)")
    return tuple(advice)

"""What `diffusion-policy benchmark` measures, a function each. Each gives plain numbers; printing is the program's.

Limits are measured on the spot: `bandwidth` by a product of a large matrix with a vector, which reads it once, and
`matrix_rate` by a product of two large matrices.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion_policy.basics.images import observed_type
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.commands.plain_reference import PlainSampling, PlainTraining, PlainWindows, plain_loader
from diffusion_policy.config import BackendName, SampleConfig, TrainConfig
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.planner import Planner
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.envs.quiet import silence
from diffusion_policy.envs.wrappers import look
from diffusion_policy.evaluation.rollout import GROUPS, planning_batch, rollout
from diffusion_policy.networks.sequences import TARGET
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.backends import make_planner
from diffusion_policy.training.trainer import Progress, Trainer

WARM_UPS = 3
LONGEST = 10.0
"""Time for one figure [s]; there are at least five repetitions."""
EPISODES, EPISODE_STEPS = 206, 120
"""Of the made dataset, as large as Push-T's."""
BATCH_SIZE, TRAINING_STEPS = 256, 12
FIRST_SEED = 300_000
"""Of the rollouts' episodes."""


class Limits(NamedTuple):
    """What this machine's processor and memory can do."""

    bandwidth: float
    """Weights read [bytes/s]."""
    matrix_rate: float
    """float32 [FLOP/s]."""


class Times(NamedTuple):
    """Wall times [ms]."""

    p50: float
    p95: float
    p99: float


def repeat_timed(call: Callable[[], Any], most: int, wait: Callable[[], None] = lambda: None) -> list[float]:
    """Wall times [ms] of at most so many calls after a warm-up; `wait` has a device finish."""
    times: list[float] = []
    for i in itertools.count(-WARM_UPS):
        started = time.perf_counter()
        call()
        wait()
        if i >= 0:
            times.append(1000 * (time.perf_counter() - started))
        if len(times) >= most or (len(times) >= 5 and sum(times) > 1000 * LONGEST):
            return times
    raise AssertionError


def to_times(times: Sequence[float]) -> Times:
    """Percentiles."""
    return Times(*(float(value) for value in np.percentile(times, [50, 95, 99])))


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits for the device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def measure_limits(device: torch.device) -> Limits:
    """Bandwidth and matrix rate of a device."""
    wait = waiter(device)
    matrix, vector = torch.randn(8192, 8192, device=device), torch.randn(8192, device=device)
    read = statistics.median(repeat_timed(lambda: matrix @ vector, 20, wait)) / 1000
    square = torch.randn(2048, 2048, device=device)
    product = statistics.median(repeat_timed(lambda: square @ square, 10, wait)) / 1000
    return Limits(4 * matrix.numel() / read, 2 * 2048**3 / product)


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of products in a call of torch."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def make_observations(policy: DiffusionPolicy, rows: int) -> dict[str, np.ndarray]:
    """Raw observations {key: (rows, To, ...)}."""
    horizon = policy.config.observation_horizon
    shapes = policy.shapes.observations
    return {key: np.zeros((rows, horizon, *shape), observed_type(shape)) for key, shape in shapes.items()}


def planning_limit(policy: DiffusionPolicy, sampling: SampleConfig, sequences: int, limits: Limits) -> float:
    """The least time of a plan [ms]: in each call of the network the matrices that it needs are read once, and its
    products are computed."""
    sampler, levels = policy.resolve_sampling(sampling)
    calls = len(policy.diffusion.tabulate(sampler, levels, sampling.corrector_steps).levels)
    rows = 2 * sequences if sampling.guidance else sequences
    device = policy.device
    cond = torch.zeros(rows, policy.cond_dim, device=device)
    xt = torch.zeros(rows, *policy.noise_shape(sampling)[1:], device=device)
    with torch.no_grad():
        films = policy.network.condition(policy.diffusion.list_levels([0]), cond).at(0)
        flops = count_flops(lambda: policy.network.denoise(xt, films))
    matrices = [weight for weight in policy.network.parameters() if weight.ndim > 1]
    reached = torch.autograd.grad(policy.network.denoise(xt, films).sum(), matrices, allow_unused=True)
    read = sum(4 * gradient.numel() for gradient in reached if gradient is not None)
    return 1000 * calls * max(read / limits.bandwidth, flops / limits.matrix_rate)


def reference_planner(policy: DiffusionPolicy, sampling: SampleConfig) -> PolicyPlanner | str:
    """The plain way, or why there is none."""
    try:
        return PolicyPlanner(policy, sampling, PlainSampling(policy, sampling))
    except ImportError:
        return "diffusers is not installed"
    except ValueError as error:
        return str(error)


def measure_planning(
    policy: DiffusionPolicy,
    sampling: SampleConfig,
    cases: Sequence[tuple[int, int]],
    backends: Sequence[BackendName],
    plans: int,
    limits: Limits,
    tolerance: float | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each size and backend, the reference first: times, ratio to the reference, share of the limit, and the
    largest difference of an action to eager's; `tolerance`: see `make_planner`."""
    reference = reference_planner(policy, sampling)
    for rows, samples in cases:
        limit = planning_limit(policy, sampling, rows * samples, limits)
        planners: dict[str, Any] = {} if isinstance(reference, str) else {"reference": reference}
        for name in backends:
            planners[name] = make_planner(policy, sampling, name, rows=rows, samples=samples, tolerance=tolerance)
        observations = make_observations(policy, rows)
        noise = policy.draw_noise([derive_rng("benchmark", row) for row in range(rows)], samples, sampling)
        eager = PolicyPlanner(policy, sampling).sample(observations, noise)
        base: float | None = None
        for name, planner in planners.items():
            call = partial(planner.sample, observations, noise)
            times = to_times(repeat_timed(call, plans))
            base = times.p50 if name == "reference" else base
            yield {
                "rows": rows,
                "samples": samples,
                "backend": name,
                **times._asdict(),
                "ratio": base and base / times.p50,
                "share_of_limit": limit / times.p50,
                "largest_difference": float(np.abs(call() - eager).max()),
            }


def make_data(policy: DiffusionPolicy, episodes: int = EPISODES) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random rows of the policy's shapes, and the episodes' ends."""
    rng, steps = derive_rng("benchmark data"), episodes * EPISODE_STEPS
    shapes = {**policy.shapes.observations, TARGET: policy.shapes.row}
    rows = {key: rng.uniform(-1, 1, (steps, *shape)).astype(np.float32) for key, shape in shapes.items()}
    return rows, np.arange(1, episodes + 1) * EPISODE_STEPS


def make_windows(policy: DiffusionPolicy, data: dict[str, np.ndarray], ends: np.ndarray) -> Windows:
    """Windows of all episodes, on the policy's device."""
    config = policy.config
    horizons = config.observation_horizon, config.prediction_horizon
    labels = np.zeros(len(ends), np.int64) if policy.labels else None
    return Windows(data, ends, range(len(ends)), *horizons, device=policy.device, labels=labels)


def measure_training(make_policy: Callable[[], DiffusionPolicy], limits: Limits) -> dict[str, Any]:
    """Windows a second of the trainer and of a plain loop, in turn, in float32, and of the trainer in bf16."""
    policy = make_policy()
    data, ends = make_data(policy)
    windows = make_windows(policy, data, ends)
    batch = next(windows.batches(BATCH_SIZE, seed=0))
    plain = PlainTraining(make_policy(), batch)
    flops = count_flops(plain.step)
    steps = {name: _trainer_step(make_policy(), windows, name) for name in ("fp32", "bf16")}
    times: dict[str, list[float]] = {"plain": [], "fp32": [], "bf16": []}
    wait = waiter(policy.device)
    for i in range(-WARM_UPS, TRAINING_STEPS):  # in turn, so that a machine's moods hit all alike
        for name, step in (("plain", plain.step), *steps.items()):
            started = time.perf_counter()
            step()
            wait()
            if i >= 0:
                times[name].append(1000 * (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "batch_size": BATCH_SIZE,
        "milliseconds": medians,
        "windows_per_second": {name: 1000 * BATCH_SIZE / median for name, median in medians.items()},
        "ratio": medians["plain"] / medians["fp32"],
        "bf16_ratio": medians["fp32"] / medians["bf16"],
        "share_of_limit": flops / limits.matrix_rate / (medians["fp32"] / 1000),
    }


def _trainer_step(policy: DiffusionPolicy, windows: Windows, precision: Any) -> Callable[[], None]:
    """One more step of a trainer at each call; its reports and validations are left out."""
    steps = 10 * (WARM_UPS + TRAINING_STEPS)
    config = TrainConfig(steps=steps, batch_size=BATCH_SIZE, precision=precision, rollout_every=0)
    trainer = Trainer.for_policy(policy, windows, None, config)
    silent: Callable[[Progress], None] = lambda _: None  # noqa: E731

    def step() -> None:
        until = trainer.step + 1
        trainer.run(silent, lambda: trainer.step >= until, report_every=steps)

    return step


def measure_data(policy: DiffusionPolicy) -> dict[str, Any]:
    """Windows a second that are gathered into batches, beside a `DataLoader` that takes them one by one."""
    data, ends = make_data(policy)
    batches = make_windows(policy, data, ends).batches(BATCH_SIZE, seed=0)
    ours = statistics.median(repeat_timed(lambda: next(batches), 200, waiter(policy.device)))
    config = policy.config
    horizons = config.observation_horizon - 1, config.prediction_horizon
    loader = itertools.cycle(plain_loader(PlainWindows(data, ends, *horizons), BATCH_SIZE))
    plain = statistics.median(repeat_timed(lambda: next(loader), 30))
    rates = {"windows": 1000 * BATCH_SIZE / ours, "plain": 1000 * BATCH_SIZE / plain}
    return {"windows_per_second": rates, "ratio": plain / ours}


class _Timed:
    """A planner whose time is added up."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def sample(self, *arguments: Any) -> np.ndarray:
        """See `Planner.sample`."""
        started = time.perf_counter()
        plans = self._planner.sample(*arguments)
        self.seconds += time.perf_counter() - started
        return plans


def measure_rollouts(
    make_env: Callable[..., Any], policy: DiffusionPolicy, sampling: SampleConfig, episodes: int, workers: int
) -> dict[str, Any]:
    """Steps a second of rollouts with so many workers, beside one after the other in this process, where simulation and
    planning add up; the ideal divides their sum by the cores. Torch has one thread here, as in the ideal."""
    seeds = range(FIRST_SEED, FIRST_SEED + episodes)
    parallel = min(episodes, 25)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {}
        for name, number in (("alone", 1), ("workers", workers)):
            planner: Any = _Timed(make_planner(policy, sampling, "eager", rows=planning_batch(parallel)))
            started = time.perf_counter()
            make_controller = partial(Controller, planner)
            ran = rollout(
                make_env,
                make_controller,
                seeds,
                lambda _: None,
                parallel,
                workers=number,
                planning_threads=GROUPS,
                look=look,
            )
            found[name] = time.perf_counter() - started, planner.seconds, sum(len(one.actions) for one in ran)
    finally:
        torch.set_num_threads(threads)
    (alone, planning, steps), (wall, _, _) = found["alone"], found["workers"]
    cores = min(2, workers) if workers > 1 else 1
    return {
        "episodes": episodes,
        "workers": workers,
        "steps": steps,
        "seconds": {"alone": alone, "planning": planning, "simulation": alone - planning, "workers": wall},
        "steps_per_second": {"alone": steps / alone, "workers": steps / wall},
        "ratio": alone / wall,
        "share_of_limit": alone / cores / wall,
    }


def profile(call: Callable[[], Any], repeats: int = 3, count: int = 12) -> list[dict[str, Any]]:
    """The operators that a call spends most time in, with their share and their number."""
    call()
    cpu = torch.profiler.ProfilerActivity.CPU
    with silence(), torch.profiler.profile(activities=[cpu]) as profiler:  # it prints that it starts and ends
        for _ in range(repeats):
            call()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events) or math.inf
    return [
        {"operator": event.key, "share": event.self_cpu_time_total / total, "calls": event.count // repeats}
        for event in events[:count]
    ]

"""diffusion-policy benchmark: what this machine does, beside the plain way and beside its limits."""

import copy
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from diffusion_policy import __version__
from diffusion_policy.basics.files import format_json, write_whole
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.commands import speeds
from diffusion_policy.commands.environment import make_env_spec
from diffusion_policy.commands.options.benchmark import Benchmark
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.plain_reference import PlainTraining
from diffusion_policy.commands.policy_in_env import join_environment
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import BackendName, SuccessAndModes, to_json
from diffusion_policy.control.latency import check_latency
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.evaluation.engines import require_workers
from diffusion_policy.policy import DiffusionPolicy, choose_device
from diffusion_policy.report.evaluation_figures import to_png
from diffusion_policy.report.figures import draw_benchmark
from diffusion_policy.serving.backends import RUNTIMES, make_planner, why_not

OF_AUTO = ("eager", "graph", *RUNTIMES)
"""Backends that auto chooses from."""
DEFAULT_ENV = "diffusion_policy/BlockPush-v0"
JSON, CHART = "benchmark.json", "benchmark.png"


def run(options: Benchmark) -> dict[str, Any]:
    """Measure; returns what benchmark.json holds. Raises ValueError for what cannot be measured here."""
    require_workers(options.workers)
    if options.output:
        require_fresh(options.output)
    policy, make_env = choose_policy(options)
    options = replace(options, sampling=policy.complete(options.sampling))
    backends = choose_backends(options, policy)
    results = describe(options, policy)
    with console.status("measuring this machine's limits"):
        limits = speeds.measure_limits(policy.device)
    results["limits"] = limits._asdict()
    for part in options.only:
        results[part] = MEASURES[part](options, policy, make_env, limits, backends)
        SHOWN[part](results[part])
    tell_fit(options, policy)
    if options.profile:
        results["profile"] = measure_profile(options, policy)
        show_profile(results["profile"])
    if options.output:
        keep(options.output, results)
    return results


def choose_policy(options: Benchmark) -> tuple[DiffusionPolicy, Callable[..., Any]]:
    """The checkpoint's policy, or one that is not trained, and the environment that it fits; raises ConfigError."""
    device = choose_device(options.device)
    if options.checkpoint:
        loaded = checkpoint.load(options.checkpoint, device)
        if "rollout" not in options.only:
            return loaded.policy, lambda: None
        joined = join_environment(options.checkpoint, loaded, env=options.env, sampling=options.sampling)
        return loaded.policy, joined.make_env
    spec = make_env_spec(options.env or DEFAULT_ENV, {}, SuccessAndModes(), ())
    env = spec()
    try:
        shapes = {key: space.shape for key, space in env.observation_space.items()}  # pyright: ignore
        (action,) = env.action_space.shape or (0,)
    finally:
        env.close()
    rng = speeds.derive_rng("benchmark policy")
    data = {key: rng.uniform(-1, 1, (256, *shape)) for key, shape in (*shapes.items(), ("action", (action,)))}
    torch.manual_seed(0)
    labels = ("one", "other")
    return DiffusionPolicy.for_data(options.policy, data, labels, instructions=labels).to(device).eval(), spec


def choose_backends(options: Benchmark, policy: DiffusionPolicy) -> list[BackendName]:
    """Those that are asked for, or all that are here."""
    if options.backends:
        return [name for name in dict.fromkeys(options.backends) if name != "auto"]
    found: list[BackendName] = ["eager", *(["graph"] if policy.device.type == "cuda" else [])]  # pyright: ignore
    for name in RUNTIMES if policy.device.type == "cpu" else ():
        reason = why_not(name, policy, options.sampling)
        if reason:
            console.print(f"without {name}: {reason}", soft_wrap=True)
        else:
            found.append(name)
    return found


def describe(options: Benchmark, policy: DiffusionPolicy) -> dict[str, Any]:
    """What was measured, and where."""
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else policy.device.type,
            "threads": torch.get_num_threads(),
        },
        "versions": {"package": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "policy": {
            "checkpoint": str(options.checkpoint) if options.checkpoint else None,
            "network": to_json(policy.config.network),
            "weights": sum(weight.numel() for weight in policy.parameters()),
        },
        "sampling": {"sampler": options.sampling.sampler, "steps": options.sampling.sampling_steps},
    }


def measure_planning(
    options: Benchmark,
    policy: DiffusionPolicy,
    make_env: Any,
    limits: speeds.Limits,
    backends: Sequence[BackendName],
) -> list[dict[str, Any]]:
    """The rows of `speeds.measure_planning`; of those that auto chooses from, the fastest is marked."""
    rows: list[dict[str, Any]] = []
    tolerance = None if options.checkpoint else math.inf  # a network that is not trained amplifies rounding
    with console.status("planning") as status:
        for row in speeds.measure_planning(
            policy, options.sampling, options.cases, backends, options.plans, limits, tolerance
        ):
            status.update(f"planning: {row['rows']} x {row['samples']}, {row['backend']}")
            rows.append(row)
    for case in options.cases:
        measured = [row for row in rows if (row["rows"], row["samples"]) == case and row["backend"] in OF_AUTO]
        fastest = min(measured, key=lambda row: row["p50"], default=None)
        for row in measured:
            row["auto"] = row is fastest
    return rows


def measure_training(
    options: Benchmark, policy: DiffusionPolicy, make_env: Any, limits: speeds.Limits, backends: Any
) -> dict[str, Any]:
    """See `speeds.measure_training`."""
    with console.status("training"):
        return speeds.measure_training(lambda: copy.deepcopy(policy).train(), limits)


def measure_data(
    options: Benchmark, policy: DiffusionPolicy, make_env: Any, limits: Any, backends: Any
) -> dict[str, Any]:
    """See `speeds.measure_data`."""
    with console.status("gathering windows"):
        return speeds.measure_data(policy)


def measure_rollouts(
    options: Benchmark, policy: DiffusionPolicy, make_env: Callable[..., Any], limits: Any, backends: Any
) -> dict[str, Any]:
    """See `speeds.measure_rollouts`."""
    with console.status("rolling out"):
        return speeds.measure_rollouts(make_env, policy, options.sampling, options.episodes, options.workers)


def measure_profile(options: Benchmark, policy: DiffusionPolicy) -> dict[str, Any]:
    """What costs most in a plan for one robot, and in a training step."""
    planner, observations = PolicyPlanner(policy, options.sampling), speeds.make_observations(policy, 1)
    noise = policy.draw_noise([speeds.derive_rng("benchmark")], 1, options.sampling)
    data, ends = speeds.make_data(policy, 4)
    batch = next(speeds.make_windows(policy, data, ends).batches(speeds.BATCH_SIZE, seed=0))
    training = PlainTraining(copy.deepcopy(policy).train(), batch)
    return {
        "plan": speeds.profile(lambda: planner.sample(observations, noise)),
        "training step": speeds.profile(training.step),
    }


def show_planning(rows: Sequence[Mapping[str, Any]]) -> None:
    """Times of plans."""
    table = Table(
        "obs", "samples", "backend", "p50", "p95", "p99", "x plain", "limit", "differs",
        title="planning [ms] (* is what auto takes)", title_justify="left",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row["rows"]),
            str(row["samples"]),
            row["backend"] + (" *" if row.get("auto") else ""),
            *(f"{row[name]:.1f}" for name in ("p50", "p95", "p99")),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['share_of_limit']:.0%}",
            f"{row['largest_difference']:.1g}",
        )
    out.print(table)


def show_training(found: Mapping[str, Any]) -> None:
    """Windows a second."""
    rates = found["windows_per_second"]
    out.print(
        f"training: {rates['fp32']:.0f} windows/s in fp32, {found['ratio']:.2f} x the plain loop, "
        f"{found['share_of_limit']:.0%} of the matrix rate; bf16 {found['bf16_ratio']:.2f} x fp32"
    )


def show_data(found: Mapping[str, Any]) -> None:
    """Windows a second."""
    out.print(f"data: {found['windows_per_second']['windows']:.0f} windows/s, {found['ratio']:.1f} x a DataLoader")


def show_rollouts(found: Mapping[str, Any]) -> None:
    """Steps a second."""
    out.print(
        f"rollout: {found['steps_per_second']['workers']:.0f} steps/s with {found['workers']} workers, "
        f"{found['ratio']:.2f} x one process, {found['share_of_limit']:.0%} of the ideal on two cores"
    )


def show_profile(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The operators that cost most."""
    for what, rows in found.items():
        table = Table("operator", "share", "calls", title=f"costs of a {what}", title_justify="left")
        for row in rows:
            table.add_row(row["operator"], f"{row['share']:.1%}", str(row["calls"]))
        out.print(table)


def tell_fit(options: Benchmark, policy: DiffusionPolicy) -> None:
    """Whether a plan for one robot fits its control rate, by the backend that auto takes."""
    if options.control_rate is None:
        return
    planner = make_planner(policy, options.sampling, "auto")
    steps = options.sampling.sampling_steps
    out.print(str(check_latency(planner, options.control_rate, sampling_steps=steps, plans=options.plans)))


def keep(output: Path, results: Mapping[str, Any]) -> None:
    """Write JSON and chart."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / JSON, format_json(results))
    if "planning" in results:
        write_whole(output / CHART, to_png(draw_benchmark(results)))
    console.print(f"results in {output}", soft_wrap=True)


MEASURES: dict[str, Callable[..., Any]] = {
    "planning": measure_planning,
    "training": measure_training,
    "data": measure_data,
    "rollout": measure_rollouts,
}
SHOWN: dict[str, Callable[[Any], None]] = {
    "planning": show_planning,
    "training": show_training,
    "data": show_data,
    "rollout": show_rollouts,
}

"""diffusion-policy evaluate: success per mode, as results.json and a page."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diffusion_policy import __version__
from diffusion_policy.commands.common import (
    Interrupted,
    Loaded,
    available_cores,
    console,
    load_with_environment,
    progress_bar,
    require_fresh,
)
from diffusion_policy.config import ConfigError, SampleConfig, require_at_least, require_seed

if TYPE_CHECKING:
    from diffusion_policy.metrics import Episode
    from diffusion_policy.policy import DiffusionPolicy

FIRST_TEST_SEED = 100_000
PLANNING_BATCH = 25
"""Environments that run, and plan, together."""
LATENCY_PLANS = 30
"""Planning calls, for one environment each, that the latency is taken from."""


@dataclass(frozen=True)
class Evaluate:
    """Roll a policy out on unseen seeds; write results.json and report.html into a new folder."""

    checkpoint: Path
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    output: Path
    """Folder of this evaluation."""
    episodes: int = 100
    """Episodes, one a seed."""
    seed: int = FIRST_TEST_SEED
    """Seed of the first episode; seeds of the demonstrations are refused."""
    env: str | None = None
    """Gymnasium id, if not the environment that the policy was trained for."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON, if not those it was trained with."""
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    parallel: int = PLANNING_BATCH
    """Environments that run at once, and observations in one planning batch. It is part of the result: another number
    can change the last digits of a plan."""
    workers: int = dataclasses.field(default_factory=available_cores)
    """Processes that simulate; the result is the same for any number."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("episodes", "workers", "parallel"))
        require_seed(self)

    def run(self) -> dict[str, Any]:
        """Evaluate; returns what results.json holds. Raises ValueError for a checkpoint that does not fit the
        environment, seeds of the demonstrations, too many sampling steps, or an output folder that holds something."""
        from diffusion_policy.commands.pictures import gather_pictures
        from diffusion_policy.report import write_report

        require_fresh(self.output)
        loaded = load_with_environment(self.checkpoint, self.env, self.env_kwargs, self.sampling, self.device)
        seeds = range(self.seed, self.seed + self.episodes)
        refuse_seen_seeds(loaded, seeds)
        self.output.mkdir(parents=True, exist_ok=True)  # now, so that a folder that cannot be is no late surprise
        episodes = run_episodes(loaded, seeds, self.sampling, self.parallel, self.workers)
        results = self._results(loaded, episodes)
        (self.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        with console.status("filming and writing the report"):
            pictures = gather_pictures(loaded, episodes, self.checkpoint, self.sampling, self.workers)
            write_report(self.output / "report.html", results, pictures)
        success = results["success_rate"]
        console.print(
            f"success {success['value']:.2f} (95 % {success['low']:.2f} to {success['high']:.2f}), "
            f"{results['mode_coverage']['value']:.0%} of the modes solved\n"
            f"results in {self.output}/results.json, page in {self.output}/report.html"
        )
        return results

    def _results(self, loaded: Loaded, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Everything that the report shows as a number."""
        from diffusion_policy import metrics

        modes = loaded.env.get_wrapper_attr("modes")
        solved = metrics.successes_by_mode(episodes)
        latencies = measure_latency(loaded.checkpoint.policy, episodes[0], self.sampling)
        return {
            "environment": loaded.env_id,
            "env_kwargs": loaded.env_kwargs,
            "checkpoint": str(self.checkpoint),
            "training_steps": loaded.checkpoint.step,
            "episodes": len(episodes),
            "seeds": [episode.seed for episode in episodes],
            "success_rate": dataclasses.asdict(metrics.success_rate(episodes)),
            "modes": {
                label: dataclasses.asdict(count) for label, count in metrics.count_modes(episodes, modes).items()
            },
            "mode_entropy": dataclasses.asdict(metrics.Metric(metrics.mode_entropy(solved, modes))),
            "mode_coverage": dataclasses.asdict(metrics.Metric(metrics.mode_coverage(solved, modes))),
            "demonstrations": {
                "episodes": loaded.checkpoint.dataset.episodes,
                "modes": loaded.checkpoint.dataset.modes,
                "mode_entropy": metrics.mode_entropy(loaded.checkpoint.dataset.modes, modes),
            },
            "planning_latency_ms": metrics.percentiles(latencies, (50, 95)),
            "sampling": dataclasses.asdict(self.sampling),
            "planning_batch": self.parallel,
            **describe_machine(loaded.checkpoint.policy),
            "outcomes": [
                {"seed": episode.seed, "success": episode.success, "mode": episode.mode, "steps": len(episode.actions)}
                for episode in episodes
            ],
        }


def describe_machine(policy: DiffusionPolicy) -> dict[str, Any]:
    """Where the numbers were made."""
    import torch

    return {
        "backend": {
            "device": str(policy.device),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "versions": {"package": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def refuse_seen_seeds(loaded: Loaded, seeds: range) -> None:
    """Raise ConfigError when test seeds lie among the demonstrations' seeds of the same environment."""
    demonstrated = loaded.checkpoint.dataset.seeds
    if demonstrated is None or loaded.env_id != loaded.checkpoint.environment.id:
        return
    first, last = demonstrated
    if seeds[0] <= last and first <= seeds[-1]:
        raise ConfigError(
            f"test seeds {seeds[0]} to {seeds[-1]} overlap the demonstrations' seeds {first} to {last}; "
            f"choose a --seed of at least {last + 1}"
        )


def run_episodes(loaded: Loaded, seeds: range, sampling: SampleConfig, parallel: int, workers: int) -> list[Episode]:
    """The episodes of these seeds, behind a progress bar; raises Interrupted on Ctrl-C."""
    finished = successes = 0
    try:
        from diffusion_policy.controller import Controller
        from diffusion_policy.rollout import rollout

        with progress_bar("episodes") as bar:
            task = bar.add_task("rolling out", total=len(seeds), note="")

            def show(episode: Episode) -> None:
                nonlocal finished, successes
                finished += 1
                successes += episode.success
                bar.update(task, completed=finished, note=f"{successes} successful")

            return rollout(
                loaded.make_env,
                partial(Controller, loaded.checkpoint.policy, sampling=sampling, plan_batch=parallel),
                seeds,
                loaded.env.get_wrapper_attr("mode"),
                parallel,
                workers,
                show,
            )
    except KeyboardInterrupt:
        raise Interrupted(f"stopped after {finished} episodes; nothing was written") from None


def measure_latency(policy: DiffusionPolicy, episode: Episode, sampling: SampleConfig) -> list[float]:
    """Wall times [ms] of planning for one environment, after a warm-up, with nothing else running."""
    import torch

    from diffusion_policy.commands.pictures import first_observation

    observations = first_observation(policy, episode)
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(LATENCY_PLANS + 3):
        started = time.perf_counter()
        policy.sample(observations, [generator], config=sampling).cpu()
        times.append(1000 * (time.perf_counter() - started))
    return times[3:]

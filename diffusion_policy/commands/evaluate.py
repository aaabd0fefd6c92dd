"""diffusion-policy evaluate: success per mode, as results.json and a page."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from rich.table import Table

from diffusion_policy import __version__
from diffusion_policy.commands.common import (
    Failed,
    Interrupted,
    Loaded,
    available_cores,
    console,
    load_with_environment,
    progress_bar,
    require_fresh,
)
from diffusion_policy.config import ConfigError, SampleConfig, Signals, require_at_least, require_seed
from diffusion_policy.engines import HANG_AFTER

if TYPE_CHECKING:
    import numpy as np
    import torch

    from diffusion_policy.metrics import Episode, Lost
    from diffusion_policy.policy import DiffusionPolicy

FIRST_TEST_SEED = 100_000
PLANNING_BATCH = 25
"""Environments that run, and plan, together."""
LATENCY_PLANS = 100
"""Planning calls, for one environment each, that the latency is taken from."""
DIVERSITY_STATES, DIVERSITY_PLANS = 20, 32
"""Initial states, and sequences sampled for each, that the diversity is taken from."""
DIVERSITY_STREAM = 1_000_000
"""Keeps the noise of these sequences apart from that of every repeat."""


@dataclass(frozen=True)
class Evaluate:
    """Roll a policy out on unseen seeds; write results.json and report.html into a new folder.

    Everything in results.json but the times is the same for any number of workers. An episode whose simulator raises an
    error, crashes or hangs is begun again; if that happens twice it is listed under `errors` and counts nowhere else.
    """

    checkpoint: Path
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    output: Path
    """Folder of this evaluation."""
    episodes: int = 100
    """Seeds, one after another; each gives an episode, or several with --repeats."""
    seed: int = FIRST_TEST_SEED
    """Seed of the first episode; seeds of the demonstrations are refused."""
    repeats: int = 1
    """Episodes of each seed: the same initial state under other planning noise. More than 1 gives the conditional
    entropy."""
    delay_steps: tuple[int, ...] = (0,)
    """Control steps that planning takes, while the plan before runs on. Several, as in 0 2 4, give curves of success
    and entropy against delay; the scorecard is that of the first."""
    env: str | None = None
    """Gymnasium id, if not the environment that the policy was trained for."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON, if not those it was trained with."""
    signals: Annotated[Signals, tyro.conf.arg(name="")] = field(default_factory=Signals)
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    parallel: int = PLANNING_BATCH
    """Environments that run at once, and observations in one planning batch. It is part of the result: another number
    can change the last digits of a plan."""
    workers: int = dataclasses.field(default_factory=available_cores)
    """Processes that simulate; the result is the same for any number."""
    hang_after: float = HANG_AFTER
    """A simulator that does not answer within this time [s] hangs: its episode is begun again. Needs two workers."""
    videos: int = 6
    """Episodes to film for the page: one of each mode, then failures."""
    backend: Literal["eager", "compile"] = "eager"
    """How the sampling loop runs: step by step, or compiled by torch.compile, which can change the last digits."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("episodes", "workers", "parallel", "repeats"))
        require_at_least(self, 0, ("videos",))
        require_seed(self)
        if not self.hang_after > 0:
            raise ConfigError(f"hang-after must be above 0; got {self.hang_after}")
        if not self.delay_steps or len(set(self.delay_steps)) < len(self.delay_steps):
            raise ConfigError(f"delay-steps must be different numbers, at least one; got {self.delay_steps}")

    def run(self) -> dict[str, Any]:
        """Evaluate; returns what results.json holds. Raises ValueError for a checkpoint that does not fit the
        environment, seeds of the demonstrations, too many sampling steps, a delay that the plans cannot bridge, an
        environment that cannot be run, or an output folder that holds something."""
        from diffusion_policy.commands.pictures import gather_pictures
        from diffusion_policy.controller import require_delay
        from diffusion_policy.report import write_report

        require_fresh(self.output)
        loaded = load_with_environment(
            self.checkpoint, self.env, self.env_kwargs, self.sampling, self.device, self.signals
        )
        policy = loaded.checkpoint.policy
        for delay in self.delay_steps:
            require_delay(policy.config, delay)
        if self.backend == "compile":
            policy.compile_sampling()
        seeds = range(self.seed, self.seed + self.episodes)
        refuse_seen_seeds(loaded, seeds)
        self.output.mkdir(parents=True, exist_ok=True)  # now, so that a folder that cannot be is no late surprise
        rolled_out = {delay: self._roll_out(loaded, seeds, delay) for delay in self.delay_steps}
        first = rolled_out[self.delay_steps[0]]
        with console.status("counting"):
            results = self._results(loaded, rolled_out)
        (self.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        with console.status("filming and writing the report"):
            pictures = gather_pictures(
                loaded, first.episodes, self.checkpoint, self.sampling, self.videos, self.workers
            )
            write_report(self.output / "report.html", results, pictures)
        print_scorecard(results)
        console.print(f"results in {self.output}/results.json, page in {self.output}/report.html")
        return results

    def _roll_out(self, loaded: Loaded, seeds: range, delay: int) -> RolledOut:
        """All episodes under one delay; raises Failed when every one was lost."""
        if len(self.delay_steps) > 1:
            console.print(f"planning takes {delay} control steps")
        rolled_out = run_episodes(
            loaded, seeds, self.sampling, self.parallel, self.workers, self.repeats, delay, self.hang_after
        )
        if not rolled_out.episodes:
            raise Failed(f"every episode failed: {rolled_out.lost[0].reason}")
        return rolled_out

    def _results(self, loaded: Loaded, rolled_out: Mapping[int, RolledOut]) -> dict[str, Any]:
        """Everything that the report shows as a number."""
        from diffusion_policy import metrics

        policy, demonstrated = loaded.checkpoint.policy, loaded.checkpoint.dataset.modes
        episodes, lost = rolled_out[self.delay_steps[0]]
        modes, base = choose_modes(loaded)
        period = 1 / loaded.frames_per_second
        task: Any = loaded.env.unwrapped
        path, choice = getattr(task, "path", None), getattr(task, "choice", None)
        card = metrics.scorecard(episodes, modes, demonstrated, period, path, choice)
        latencies = measure_latency(policy, episodes[0], self.sampling, LATENCY_PLANS)
        return {
            "environment": loaded.env_id,
            "env_kwargs": loaded.env_kwargs,
            "signals": dataclasses.asdict(loaded.signals),
            "checkpoint": str(self.checkpoint),
            "training_steps": loaded.checkpoint.step,
            "episodes": len(episodes),
            "repeats": self.repeats,
            "seeds": list(range(self.seed, self.seed + self.episodes)),
            **dataclasses.asdict(card),
            "diversity": dataclasses.asdict(metrics.diversity(sample_starts(policy, episodes, self.sampling))),
            "planning_latency_ms": {
                name: dataclasses.asdict(metric) for name, metric in metrics.latency(latencies).items()
            },
            "mode_base": base,
            "demonstrations": {
                "episodes": loaded.checkpoint.dataset.episodes,
                "modes": demonstrated,
                "mode_entropy": metrics.mode_entropy(demonstrated, modes),
            },
            "errors": [dataclasses.asdict(one) for one in lost],
            "delay": [
                {
                    "steps": delay,
                    "success_rate": dataclasses.asdict(metrics.success_rate(one.episodes)),
                    "mode_entropy": dataclasses.asdict(
                        metrics.behaviour_entropy(metrics.effective_successes(one.episodes), modes)
                    ),
                    "measures": {
                        name: dataclasses.asdict(metric) for name, metric in metrics.mean_measures(one.episodes).items()
                    },
                }
                for delay, one in rolled_out.items()
            ],
            "control_period": period,
            "sampling": dataclasses.asdict(self.sampling),
            "planning_batch": self.parallel,
            **describe_machine(policy, self.backend),
            "outcomes": [
                {
                    "seed": episode.seed,
                    "repeat": episode.repeat,
                    "success": episode.success,
                    "mode": episode.mode,
                    "steps": len(episode.actions),
                    "measures": dict(episode.measures),
                }
                for episode in episodes
            ],
        }


class RolledOut(NamedTuple):
    """What came of an evaluation's episodes."""

    episodes: list[Episode]
    lost: list[Lost]


def choose_modes(loaded: Loaded) -> tuple[tuple[str, ...], str | None]:
    """The modes that entropy and coverage are measured against, and whose list it is: the environment's, or where that
    knows none, those among the demonstrations."""
    from diffusion_policy.metrics import NONE

    if loaded.env.get_wrapper_attr("modes"):
        return tuple(loaded.env.get_wrapper_attr("modes")), "environment"
    shown = tuple(mode for mode in loaded.checkpoint.dataset.modes if mode != NONE)
    return shown, "demonstrations" if shown else None


def print_scorecard(results: Mapping[str, Any]) -> None:
    """The figures of results.json with their intervals, a line each."""
    from diffusion_policy.wording import scorecard_lines

    table = Table("", "", "95 % interval", box=None)
    for line in scorecard_lines(results):
        table.add_row(line.name, line.value, line.interval)
    console.print(table)
    if results["mode_base"] and results["mode_entropy"]["value"] is None:
        console.print("no episode succeeded in a mode, so the entropy of the modes is undefined")
    if results["mode_base"] == "demonstrations":
        console.print("the environment lists no modes: those of the demonstrations are counted")
    if results["errors"]:
        first = results["errors"][0]
        console.print(
            f"{len(results['errors'])} episodes could not be run and count nowhere, such as seed {first['seed']}: "
            f"{first['reason']}",
            markup=False,
        )


def describe_machine(policy: DiffusionPolicy, backend: str = "eager") -> dict[str, Any]:
    """Where the numbers were made."""
    import torch

    return {
        "backend": {
            "mode": backend,
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


def run_episodes(
    loaded: Loaded,
    seeds: range,
    sampling: SampleConfig,
    parallel: int,
    workers: int,
    repeats: int = 1,
    delay_steps: int = 0,
    hang_after: float = HANG_AFTER,
) -> RolledOut:
    """The episodes of these seeds, behind a progress bar; raises Interrupted on Ctrl-C."""
    finished = successes = 0
    lost: list[Lost] = []
    try:
        from diffusion_policy.controller import Controller
        from diffusion_policy.rollout import rollout

        with progress_bar("episodes") as bar:
            task = bar.add_task("rolling out", total=len(seeds) * repeats, note="")

            def show(episode: Episode) -> None:
                nonlocal finished, successes
                finished += 1
                successes += episode.success
                bar.update(task, completed=finished, note=f"{successes} successful")

            policy = loaded.checkpoint.policy
            episodes = rollout(
                loaded.make_env,
                partial(Controller, policy, sampling=sampling, plan_batch=parallel, delay_steps=delay_steps),
                seeds,
                loaded.env.get_wrapper_attr("mode"),
                parallel,
                workers,
                show,
                repeats,
                lost.append,
                hang_after,
            )
            return RolledOut(episodes, lost)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped after {finished} episodes; nothing was written") from None


def sample_starts(policy: DiffusionPolicy, episodes: Sequence[Episode], sampling: SampleConfig) -> np.ndarray:
    """Normalized sequences sampled for the first observation of a few seeds, (states, N, T, A)."""
    import numpy as np
    import torch

    from diffusion_policy.policy import derive_generator

    firsts = list({episode.seed: episode for episode in reversed(episodes)}.values())[-DIVERSITY_STATES:]
    plans = []
    for episode in firsts:
        observations = observe(policy, episode, 0)
        plan = policy.sample(
            observations, [derive_generator(episode.seed, DIVERSITY_STREAM)], DIVERSITY_PLANS, sampling
        )
        plans.append(policy.normalizer.normalize("action", plan)[0].cpu())
    return np.asarray(torch.stack(plans))


def observe(policy: DiffusionPolicy, episode: Episode, step: int) -> dict[str, torch.Tensor]:
    """What the policy sees at a step of an episode, {key: (1, To, ...)}; the first step stands for those before it."""
    import numpy as np
    import torch

    rows = np.maximum(np.arange(step - policy.config.observation_horizon + 1, step + 1), 0)
    return {
        key: torch.as_tensor(episode.observations[key][rows], dtype=torch.float32)[None].to(policy.device)
        for key in policy.shapes.observations
    }


def measure_latency(policy: DiffusionPolicy, episode: Episode, sampling: SampleConfig, plans: int) -> list[float]:
    """Wall times [ms] of so many plans for one environment, after a warm-up, with nothing else running."""
    import torch

    observations = observe(policy, episode, 0)
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(plans + 3):
        started = time.perf_counter()
        policy.sample(observations, [generator], config=sampling).cpu()
        times.append(1000 * (time.perf_counter() - started))
    return times[3:]

"""diffusion-policy evaluate: success per mode, as results.json and a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.table import Table

from diffusion_policy.commands.common import (
    Failed,
    Loaded,
    available_cores,
    console,
    load_with_environment,
    require_fresh,
)
from diffusion_policy.commands.episodes import (
    FIRST_TEST_SEED,
    PLANNING_BATCH,
    RolledOut,
    choose_modes,
    describe_machine,
    measure_latency,
    refuse_seen_seeds,
    run_episodes,
    sample_starts,
)
from diffusion_policy.config import ConfigError, SampleConfig, Signals, require_at_least, require_seed
from diffusion_policy.engines import HANG_AFTER, Engine, require_engine

if TYPE_CHECKING:
    from diffusion_policy.metrics import Episode

LATENCY_PLANS = 100
"""Planning calls, for one environment each, that the latency is taken from."""


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
    engine: Engine = "local"
    """Where they run: on this machine, or on the Ray cluster of the environment variable RAY_ADDRESS (without it, one
    is started here). The result is the same."""
    hang_after: float = HANG_AFTER
    """A simulator that does not answer within this time [s] hangs: its episode is begun again. Needs two workers, or
    Ray."""
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
        require_engine(self.engine)
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
            loaded, seeds, self.sampling, self.parallel, self.workers, self.repeats, delay, self.hang_after, self.engine
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
            "delay": [under_delay(delay, one.episodes, modes) for delay, one in rolled_out.items()],
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


def under_delay(delay: int, episodes: Sequence[Episode], modes: Sequence[str]) -> dict[str, Any]:
    """One point of the curves against delay; `delay` in control steps."""
    from diffusion_policy import metrics

    solved = metrics.effective_successes(episodes)
    return {
        "steps": delay,
        "success_rate": dataclasses.asdict(metrics.success_rate(episodes)),
        "mode_entropy": dataclasses.asdict(metrics.behaviour_entropy(solved, modes)),
        "measures": {name: dataclasses.asdict(metric) for name, metric in metrics.mean_measures(episodes).items()},
    }


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
            f"{first['reason']}"
        )

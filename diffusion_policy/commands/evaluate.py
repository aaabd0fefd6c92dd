"""diffusion-policy evaluate: success per mode, as results.json and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.table import Table

from diffusion_policy.basics.files import format_json, plain, write_whole
from diffusion_policy.commands.afterwards import PAGE, RESULTS, Remarks, hold_output, require_same, waits_for_page
from diffusion_policy.commands.environment import PolicyInEnv, load_with_environment
from diffusion_policy.commands.episodes import (
    FIRST_TEST_SEED,
    PLANNING_BATCH,
    RolledOut,
    choose_modes,
    describe_machine,
    measure_episodes,
    measure_latency,
    refuse_seen_seeds,
    require_episodes,
    require_memory,
    run_episodes,
    sample_starts,
)
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.outputs import anchor
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError, SampleConfig, SuccessAndModes, require_at_least, require_seed
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine, available_cores, require_engine

if TYPE_CHECKING:
    from diffusion_policy.evaluation.episode import Episode
    from diffusion_policy.report.page import Pictures

LATENCY_PLANS = 100
"""Planning calls, for one environment each, that the latency is taken from."""
MOST_VIDEOS = 200
"""All of them lie in one page."""


@dataclass(frozen=True)
class Evaluate:
    """Roll a policy out on unseen seeds; write results.json and report.html into a new folder.

    Everything in results.json but the times is the same for any number of workers. An episode whose simulator raises an
    error, crashes or hangs is begun again; if that happens twice it is listed under `errors` and counts nowhere else.
    The results are kept before anything is filmed or drawn; where that fails or is stopped, the same command does not
    run the episodes again, but writes the page.
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
    signals: Annotated[SuccessAndModes, tyro.conf.arg(name="")] = field(default_factory=SuccessAndModes)
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    parallel: int = PLANNING_BATCH
    """Environments that run at once, and observations in one planning batch. It is part of the result: another number
    can change the last digits of a plan."""
    workers: int = dataclasses.field(default_factory=available_cores)
    """Distributed that simulate; the result is the same for any number."""
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
        anchor(self)
        require_at_least(self, 1, ("episodes", "workers", "parallel", "repeats"))
        require_at_least(self, 0, ("videos",))
        if self.videos > MOST_VIDEOS:
            raise ConfigError(f"videos must be at most {MOST_VIDEOS}, since one page holds them; got {self.videos}")
        require_episodes(self.episodes * self.repeats * len(self.delay_steps), self.parallel)
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
        from diffusion_policy.control.controller import require_delay

        waits_for_page(self.output)
        loaded = load_with_environment(
            self.checkpoint, self.env, self.env_kwargs, self.sampling, self.device, self.signals
        )
        policy = loaded.checkpoint.policy
        for delay in self.delay_steps:
            require_delay(policy.config, delay)
        require_memory(policy, self.sampling, self.parallel)
        seeds = range(self.seed, self.seed + self.episodes)
        refuse_seen_seeds(loaded, seeds)
        asked = self._asked(loaded)
        with hold_output(self.output) as waits:
            if waits:
                return self._go_on(loaded, asked)
            if self.backend == "compile":
                policy.compile_sampling()
            return self._evaluate(loaded, seeds, asked)

    def _asked(self, loaded: PolicyInEnv) -> dict[str, Any]:
        """What decides the results but for the delays: the first fields of results.json."""
        return {
            "environment": loaded.env_id,
            "env_kwargs": loaded.env_kwargs,
            "wrappers": [dict(one) for one in loaded.wrappers],
            "signals": dataclasses.asdict(loaded.signals),
            "checkpoint": str(self.checkpoint),
            "training_steps": loaded.checkpoint.step,
            "weights_sha256": loaded.checkpoint.weights_sha256,
            "repeats": self.repeats,
            "seeds": list(range(self.seed, self.seed + self.episodes)),
            "sampling": dataclasses.asdict(self.sampling)
            | {"clip": loaded.checkpoint.policy.choose_clip(self.sampling)},
            "planning_batch": self.parallel,
        }

    def _evaluate(self, loaded: PolicyInEnv, seeds: range, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Roll out under each delay, keep the results, then do what may fail."""
        remarks, rolled_out, results = Remarks(), {}, {}
        for delay in self.delay_steps:
            try:
                rolled_out[delay] = self._roll_out(loaded, seeds, delay)
            except (Failed, Interrupted, ValueError, FloatingPointError) as error:
                if not results:
                    raise
                if isinstance(error, Interrupted):
                    before = f"those of the delays before are in {self.output}/{RESULTS}"
                    raise Interrupted(f"stopped before the results of delay {delay}; {before}") from None
                remarks.say(f"no results for planning that takes {delay} control steps: {error}")
                continue
            with console.status("counting"):
                results = plain({**asked, **self._results(loaded, rolled_out, remarks)})
            self._keep(results)
        try:
            first = rolled_out[self.delay_steps[0]].episodes
            results["seeds_repeat"] = self._seeds_repeat(loaded, remarks)
            with console.status("measuring diversity and latency"):
                results |= plain(self._measures_of_plans(loaded, first, remarks))
            remarks.attempt("what was measured after the rollouts is not kept", lambda: self._keep(results), None)
            print_scorecard(results)
            with console.status("filming and drawing"):
                pictures = self._pictures(loaded, results, first, remarks)
            self._write_page(results, pictures, remarks)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; the results are in {self.output}/{RESULTS}, and the same command writes their page"
            ) from None
        return results

    def _go_on(self, loaded: PolicyInEnv, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Write the page of an evaluation that was stopped after its results were kept."""
        from diffusion_policy.commands.pictures import without_episodes
        from diffusion_policy.evaluation.results import read_results

        results = read_results(self.output)
        require_same(self.output, results, asked)
        delays = tuple(row.get("steps") for row in results["delay"])
        if delays != self.delay_steps:
            console.print(f"the results are of --delay-steps {' '.join(map(str, delays))} only")
        remarks = Remarks()
        remarks.say(
            f"{self.output}/{RESULTS} was there already: no episode was run again, and its page is without paths, "
            "plans and films"
        )
        print_scorecard(results)
        self._write_page(results, without_episodes(self.checkpoint, remarks), remarks)
        return results

    def _keep(self, results: Mapping[str, Any]) -> None:
        write_whole(self.output / RESULTS, format_json(results))

    def _write_page(self, results: Mapping[str, Any], pictures: Pictures, remarks: Remarks) -> None:
        """The page; without pictures where it cannot be made with them."""
        from diffusion_policy.report.page import NO_PICTURES, write_report

        def write(pictures: Pictures) -> bool:
            write_report(self.output / PAGE, results, pictures._replace(remarks=tuple(remarks.sentences)))
            return True

        written = remarks.attempt("the page could not be written with its pictures", lambda: write(pictures), False)
        written = written or remarks.attempt("the page could not be written", lambda: write(NO_PICTURES), False)
        page = f"page in {self.output}/{PAGE}" if written else "the same command tries the page again"
        console.print(f"results in {self.output}/{RESULTS}, {page}", soft_wrap=True)

    def _roll_out(self, loaded: PolicyInEnv, seeds: range, delay: int) -> RolledOut:
        """All episodes under one delay; raises Failed when every one was lost."""
        if len(self.delay_steps) > 1:
            console.print(f"planning takes {delay} control steps")
        rolled_out = run_episodes(
            loaded, seeds, self.sampling, self.parallel, self.workers, self.repeats, delay, self.hang_after, self.engine
        )
        if not rolled_out.episodes:
            raise Failed(f"every episode failed: {rolled_out.lost[0].reason}")
        return rolled_out

    def _results(self, loaded: PolicyInEnv, rolled_out: Mapping[int, RolledOut], remarks: Remarks) -> dict[str, Any]:
        """Everything that the report shows as a number, but for what is measured of plans."""
        from diffusion_policy.envs.adapters import capped_steps
        from diffusion_policy.evaluation import metrics

        policy, demonstrated = loaded.checkpoint.policy, loaded.checkpoint.dataset.modes
        episodes, lost, mode_failures = rolled_out[self.delay_steps[0]]
        modes, base = choose_modes(loaded)
        period = 1 / loaded.frames_per_second
        undefined = dataclasses.asdict(metrics.Metric(None))
        return {
            "episodes": len(episodes),
            **dataclasses.asdict(measure_episodes(loaded, episodes, modes, period, remarks)),
            "diversity": undefined,
            "planning_latency_ms": dict.fromkeys(("p50", "p95", "p99"), undefined),
            "mode_base": base,
            "demonstrations": {
                "episodes": loaded.checkpoint.dataset.episodes,
                "modes": demonstrated,
                "mode_entropy": metrics.mode_entropy(demonstrated, modes),
            },
            "errors": [dataclasses.asdict(one) for one in lost],
            "mode_failures": [dataclasses.asdict(one) for one in mode_failures],
            "capped_steps": capped_steps(loaded.env),
            "delay": [under_delay(delay, one.episodes, modes) for delay, one in rolled_out.items()],
            "control_period": period,
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

    def _measures_of_plans(self, loaded: PolicyInEnv, episodes: Sequence[Episode], remarks: Remarks) -> dict[str, Any]:
        """Diversity and latency; where one cannot be measured it stays as it was."""
        from diffusion_policy.evaluation import metrics

        policy = loaded.checkpoint.policy

        def diversity() -> dict[str, Any]:
            return {"diversity": dataclasses.asdict(metrics.diversity(sample_starts(policy, episodes, self.sampling)))}

        def latency() -> dict[str, Any]:
            times = measure_latency(policy, episodes[0], self.sampling, LATENCY_PLANS)
            return {
                "planning_latency_ms": {
                    name: dataclasses.asdict(metric) for name, metric in metrics.latency(times).items()
                }
            }

        return {
            **remarks.attempt("the diversity could not be measured", diversity, {}),
            **remarks.attempt("the time of planning could not be measured", latency, {}),
        }

    def _seeds_repeat(self, loaded: PolicyInEnv, remarks: Remarks) -> bool | None:
        """Whether a seed repeats an episode; None where that cannot be found out."""
        from diffusion_policy.envs.protocols import repeats_by_seed

        what = "whether a seed repeats an episode could not be found out"
        return remarks.attempt(what, lambda: repeats_by_seed(loaded.make_env, self.seed), None)

    def _pictures(
        self, loaded: PolicyInEnv, results: Mapping[str, Any], episodes: Sequence[Episode], remarks: Remarks
    ) -> Pictures:
        from diffusion_policy.commands.pictures import gather_pictures

        films = self.videos
        if films and results.get("seeds_repeat") is False:
            films = 0
            remarks.say("no films: they replay episodes from their seeds, which do not repeat them here")
        return gather_pictures(loaded, episodes, self.checkpoint, self.sampling, films, self.workers, remarks)


def under_delay(delay: int, episodes: Sequence[Episode], modes: Sequence[str]) -> dict[str, Any]:
    """One point of the curves against delay; `delay` in control steps."""
    from diffusion_policy.evaluation import metrics

    solved = metrics.effective_successes(episodes)
    return {
        "steps": delay,
        "success_rate": dataclasses.asdict(metrics.success_rate(episodes)),
        "mode_entropy": dataclasses.asdict(metrics.behaviour_entropy(solved, modes)),
        "measures": {name: dataclasses.asdict(metric) for name, metric in metrics.mean_measures(episodes).items()},
    }


def print_scorecard(results: Mapping[str, Any]) -> None:
    """The figures of results.json with their intervals, a line each."""
    from diffusion_policy.report.text import caveats, scorecard_lines

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
            soft_wrap=True,
        )
    for sentence in caveats(results):
        console.print(sentence, soft_wrap=True)

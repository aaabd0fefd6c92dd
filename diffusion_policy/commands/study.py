"""diffusion-policy study: one checkpoint under every sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from diffusion_policy.basics.files import format_json, write_whole
from diffusion_policy.basics.lines import one_line
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.environment import PolicyInEnv, load_with_environment
from diffusion_policy.commands.episodes import (
    FIRST_TEST_SEED,
    PLANNING_BATCH,
    choose_modes,
    describe_machine,
    measure_latency,
    refuse_seen_seeds,
    require_episodes,
    require_memory,
    run_episodes,
)
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.outputs import anchor, require_fresh
from diffusion_policy.commands.terminal import console, print_by_steps
from diffusion_policy.config import (
    ConfigError,
    SampleConfig,
    SamplerName,
    SuccessAndModes,
    require_at_least,
    require_seed,
)
from diffusion_policy.evaluation.engines import available_cores

STEPS = (1, 2, 4, 8, 16, 32)
LATENCY_PLANS = 30


@dataclass(frozen=True)
class Study:
    """Roll one checkpoint out under each sampler at several numbers of steps: success, mode entropy and milliseconds,
    as a table, results.json and samplers.png. What is done is kept in results.json at every moment. Episodes that could
    not be run are counted for each of them; where none could be run, it says why, and the study goes on."""

    what: tyro.conf.Positional[Literal["samplers"]]
    """What is varied."""
    checkpoint: Path
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    output: Path
    """Folder of this study."""
    samplers: tuple[SamplerName, ...] = get_args(SamplerName)
    """Samplers to try; by default all."""
    steps: tuple[int, ...] = ()
    """Numbers of sampling steps to try; by default 1, 2, 4, 8, 16, 32 and all noise levels that a sampler can use."""
    mode: str | None = None
    """Steer a policy that was trained with --condition-on-mode to this mode."""
    guidance: float = 0.0
    """Weight of classifier-free guidance, as in evaluate."""
    episodes: int = 100
    """Episodes for each sampler and number of steps, the same seeds each time."""
    seed: int = FIRST_TEST_SEED
    """Seed of the first episode; seeds of the demonstrations are refused."""
    env: str | None = None
    """Gymnasium id, if not the environment that the policy was trained for."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON, if not those it was trained with."""
    signals: Annotated[SuccessAndModes, tyro.conf.arg(name="")] = field(default_factory=SuccessAndModes)
    workers: int = dataclasses.field(default_factory=available_cores)
    """Distributed that simulate; the result is the same for any number."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        anchor(self)
        require_at_least(self, 1, ("episodes", "workers"))
        require_seed(self)
        require_episodes(self.episodes)
        if not self.samplers:
            raise ConfigError(f"name at least one of the samplers {', '.join(get_args(SamplerName))}")
        for name in self.samplers:
            for steps in self.steps or (1,):
                self._sampling(name, steps)

    def run(self) -> dict[str, Any]:
        """Study; returns what results.json holds. Raises ValueError where `evaluate` does."""
        from diffusion_policy.report.evaluation_figures import to_png
        from diffusion_policy.report.figures import draw_study

        require_fresh(self.output)
        loaded = load_with_environment(self.checkpoint, self.env, self.env_kwargs, None, self.device, self.signals)
        refuse_seen_seeds(loaded, range(self.seed, self.seed + self.episodes))
        self.output.mkdir(parents=True, exist_ok=True)
        cells: dict[str, dict[str, Any]] = {}
        results = {
            "environment": loaded.env_id,
            "env_kwargs": loaded.env_kwargs,
            "checkpoint": str(self.checkpoint),
            "training_steps": loaded.checkpoint.step,
            "noise_levels": loaded.checkpoint.policy.config.noise_levels,
            "episodes": self.episodes,
            "first_seed": self.seed,
            "mode": self.mode,
            "guidance": self.guidance,
            "clip": loaded.checkpoint.policy.choose_clip(SampleConfig()),
            "planning_batch": PLANNING_BATCH,
            **describe_machine(loaded.checkpoint.policy),
            "samplers": cells,
        }
        for name in self.samplers:
            cells[name] = {}
            for count in self._steps(loaded, name):
                console.print(f"{name}, {count} steps")
                try:
                    cells[name][str(count)] = cell = self._cell(loaded, self._sampling(name, count))
                except (Interrupted, KeyboardInterrupt):
                    raise Interrupted(f"stopped at {name}, {count} steps; the others are in {self.output}") from None
                if "refused" in cell:
                    console.print(f"  not possible: {cell['refused']}")
                self._write(results)
        print_by_steps("success rate", cells, "success_rate", "{:.2f}")
        print_by_steps("mode entropy", cells, "mode_entropy", "{:.2f}")
        print_by_steps("milliseconds of one plan", cells, "milliseconds", "{:.0f}")
        if any(cell.get("lost") for of_sampler in cells.values() for cell in of_sampler.values()):
            print_by_steps("episodes lost", cells, "lost", "{:.0f}")
        remarks = Remarks()
        picture = self.output / "samplers.png"
        remarks.attempt("no picture", lambda: write_whole(picture, to_png(draw_study(results), 150)), None)
        beside = f", picture in {picture}" if picture.exists() else ""
        console.print(f"results in {self.output}/results.json{beside}", soft_wrap=True)
        return results

    def _sampling(self, name: SamplerName, steps: int) -> SampleConfig:
        return SampleConfig(name, steps, mode=self.mode, guidance=self.guidance)

    def _steps(self, loaded: PolicyInEnv, name: SamplerName) -> Sequence[int]:
        from diffusion_policy.diffusion.samplers import SAMPLERS

        most = loaded.checkpoint.policy.diffusion.most_steps(SAMPLERS[name])
        return self.steps or (*(n for n in STEPS if n < most), most)

    def _write(self, results: Mapping[str, Any]) -> None:
        write_whole(self.output / "results.json", format_json(results))

    def _cell(self, loaded: PolicyInEnv, sampling: SampleConfig) -> dict[str, Any]:
        """What one sampler does at one number of steps; why not, where it cannot."""
        from diffusion_policy.evaluation import metrics

        policy = loaded.checkpoint.policy
        seeds = range(self.seed, self.seed + self.episodes)
        try:
            policy.resolve_sampling(sampling)
            require_memory(policy, sampling, PLANNING_BATCH)
            episodes, lost, mode_failures = run_episodes(loaded, seeds, sampling, PLANNING_BATCH, self.workers)
        except (ValueError, FloatingPointError) as error:
            return {"refused": one_line(str(error))}
        if not episodes:
            return {"refused": f"every episode failed: {lost[0].reason}", "lost": len(lost)}
        modes, _ = choose_modes(loaded)
        solved = metrics.successes_by_mode(episodes)
        latencies = measure_latency(policy, episodes[0], sampling, LATENCY_PLANS)
        return {
            "success_rate": dataclasses.asdict(metrics.success_rate(episodes)),
            "mode_entropy": dataclasses.asdict(metrics.behaviour_entropy(solved, modes)),
            "mode_coverage": dataclasses.asdict(metrics.behaviour_coverage(solved, modes)),
            "modes": {mode: solved.get(mode, 0) for mode in modes},
            "milliseconds": metrics.percentiles(latencies, (50,))["p50"],
            "lost": len(lost),
            "errors": [dataclasses.asdict(one) for one in lost],
            "mode_failures": [one._asdict() for one in mode_failures],
        }

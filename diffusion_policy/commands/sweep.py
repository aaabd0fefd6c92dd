"""diffusion-policy sweep: many trainings that differ in some options, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.table import Table

from diffusion_policy.commands.common import Failed, Interrupted, console, open_store, progress_bar, require_fresh
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.commands.points import draw_points, read_grid
from diffusion_policy.commands.runs import OPTIONS, absolute
from diffusion_policy.commands.train import Train
from diffusion_policy.config import ConfigError, PolicyConfig, SampleConfig, TrainConfig, from_dict, require_at_least
from diffusion_policy.engines import Engine, each_alone, require_engine

MEANINGS = ("prediction", "schedule", "schedule_options", "levels", "snr_gamma", "learn_variance", "normalization",
            "prediction_horizon", "validation_share", "seed")  # fmt: skip
"""Options that change what the validation loss is, or on which episodes, so that its values cannot be compared."""


class Trial(NamedTuple):
    """One training of a sweep, and the evaluation of its policy."""

    name: str
    options: dict[str, Any]
    """What is varied, {field: value as JSON}."""
    train: Train
    episodes: int
    sampling: SampleConfig

    @property
    def trained(self) -> bool:
        """Whether there is a checkpoint of the last step."""
        return (self.train.output / f"step-{self.train.training.steps:06d}" / "config.json").is_file()

    @property
    def evaluation(self) -> Path:
        return self.train.output / "evaluation"


@dataclass(frozen=True)
class Sweep:
    """Train a policy for each point of a grid, or for random draws, each in a process of its own, and evaluate it.

    Writes a folder for each trial, with a log file beside it, sweep.json, and sweep.html, which works offline. A trial
    that fails is listed with its reason. --resume leaves out the trials that are finished.
    """

    dataset: str
    """Store of demonstrations: a path or URL."""
    output: Path
    """Folder of this sweep."""
    grid: tuple[str, ...] = ()
    """Options and their values, any of those of policy and training: learning-rate=1e-4,3e-4 widths=32:64,64:128. Every
    combination is a trial."""
    random: tuple[str, ...] = ()
    """Instead of a grid, options and what to draw them from, by --seed: learning-rate=log:1e-5:1e-3
    condition-dropout=uniform:0:0.2 steps=int:1000:2000 widths=choice:32:64,64:128."""
    runs: int = 8
    """Trials of a random search; the first ones stay the same when there are more."""
    episodes: int = 20
    """Unseen seeds that each policy is evaluated on; 0 for none."""
    metric: Literal["validation_loss", "success_rate"] = "validation_loss"
    """What the best trial is best in."""
    workers: int = 1
    """Trials at a time; they share the processor cores."""
    engine: Engine = "local"
    """Where they run: on this machine, or on the Ray cluster of the environment variable RAY_ADDRESS, whose machines
    must all see data set and output."""
    gpus: float = 0.0
    """GPUs of the cluster that each trial takes; with 0.5, two share one."""
    resume: bool = False
    """Go on with the sweep in the output folder; its trials must be the same, but there may be more."""
    config: Path | None = None
    """Take policy and training options from this JSON, such as a checkpoint's config.json; flags override it."""
    observation: tuple[str, ...] = ()
    """Keys of the store that the policies observe; by default those that the store names, else all but the action."""
    action: str | None = None
    """Key of the store that holds the actions; by default the one that the store names, else action."""
    angles: tuple[str, ...] = ()
    """Columns that are angles [rad], as state:4 or pose:3,4,5. By default those that the store names."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""
    policy: Annotated[PolicyConfig, tyro.conf.arg(name="")] = field(default_factory=PolicyConfig)
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("runs", "workers"))
        require_at_least(self, 0, ("episodes", "gpus"))
        require_engine(self.engine)
        if self.gpus and self.engine == "local":
            raise ConfigError(f"gpus are those of a Ray cluster: they need --engine ray; got {self.gpus:g}")
        if self.metric == "success_rate" and self.episodes == 0:
            raise ConfigError("the metric success_rate needs episodes of at least 1; got 0")

    def run(self) -> dict[str, Any]:
        """Run all trials; returns what sweep.json holds. Raises ValueError for options that cannot work, an output
        folder that holds something else, and a data set that cannot be read; Failed when every trial failed."""
        trials = self.trials()
        rows = self._earlier_rows(trials)
        if self.episodes and not open_store(self.dataset).attributes.get("environment", {}).get("id"):
            raise ConfigError(f"{self.dataset} names no environment to evaluate in; give --episodes 0")
        self.output.mkdir(parents=True, exist_ok=True)
        waiting = [trial for trial, row in zip(trials, rows, strict=True) if row["status"] != "finished"]
        each = each_alone(run_trial, waiting, self.workers, self.engine, self.gpus)
        try:
            with contextlib.closing(each) as ended, progress_bar("trials") as bar:
                task = bar.add_task("sweeping", total=len(trials), completed=len(trials) - len(waiting), note="")
                results = self._write(rows)
                for trial, reason in ended:
                    row = rows[trials.index(trial)] = describe(trial, reason)
                    results = self._write(rows)
                    bar.console.print(f"{trial.name}: {reason or say_numbers(row)}")
                    bar.advance(task)
        except KeyboardInterrupt:
            done = sum(row["status"] == "finished" for row in rows)
            raise Interrupted(
                f"stopped: {done} of {len(trials)} trials are finished in {self.output}; the same command goes on with "
                "--resume"
            ) from None
        self._conclude(results)
        return results

    def trials(self) -> list[Trial]:
        """What is to be trained; raises ConfigError for options that are unknown or cannot work."""
        if bool(self.grid) == bool(self.random):
            raise ConfigError(
                "sweep needs either --grid learning-rate=1e-4,3e-4 or --random learning-rate=log:1e-5:1e-3"
            )
        points = read_grid(self.grid) if self.grid else draw_points(self.random, self.runs, self.training.seed)
        return [self._trial(i, point) for i, point in enumerate(points)]

    def _trial(self, number: int, point: dict[str, Any]) -> Trial:
        name = f"trial-{number:03d}"
        try:
            policy, training = (vary(config, point) for config in (self.policy, self.training))
            if training.validation_share == 0 and self.metric == "validation_loss":
                raise ConfigError("the metric validation_loss needs held-out episodes; got validation-share 0")
        except ConfigError as error:
            raise ConfigError(f"{name} ({say_options(point)}): {error}") from error
        return Trial(
            name,
            point,
            Train(
                absolute(self.dataset),
                self.output.resolve() / name,
                observation=self.observation,
                action=self.action,
                angles=self.angles,
                device=self.device,
                policy=policy,
                training=training,
            ),
            self.episodes,
            self.sampling,
        )

    def _earlier_rows(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """What is known of each trial before it runs; raises ConfigError where the folder is of another sweep."""
        rows = [describe(trial) for trial in trials]
        if not self.resume:
            require_fresh(self.output)
            return rows
        try:
            earlier = json.loads((self.output / "sweep.json").read_text())["trials"]
            same = [
                all(
                    old[key] == json.loads(json.dumps(new[key])) for key in ("policy", "training", "data", "evaluation")
                )
                for old, new in zip(earlier, rows, strict=False)
            ]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self.output} holds no sweep to go on with: {error}") from error
        if not all(same) or len(earlier) > len(rows):
            found = (
                f"there were {len(earlier)} trials" if all(same) else f"{rows[same.index(False)]['name']} was another"
            )
            raise ConfigError(f"{self.output} cannot go on as another sweep: {found}; give the same options")
        for i, (old, trial) in enumerate(zip(earlier, trials, strict=False)):
            if old["status"] == "finished" and trial.trained:
                rows[i] = describe(trial, None)
        return rows

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """sweep.json, under another name first, so that a kill leaves the last whole one; returns its content."""
        finished = [row for row in rows if row["status"] == "finished" and row[self.metric] is not None]
        best = min(finished, key=lambda row: merit(row, self.metric), default=None)
        results = {
            "dataset": self.dataset,
            "metric": self.metric,
            "search": {"grid": self.grid} if self.grid else {"random": self.random, "seed": self.training.seed},
            "best": best["name"] if best else None,
            "trials": rows,
        }
        temporary = self.output / ".sweep.json"
        temporary.write_text(json.dumps(results, indent=2) + "\n")
        temporary.replace(self.output / "sweep.json")
        return results

    def _conclude(self, results: Mapping[str, Any]) -> None:
        """The table, the page, and the best trial with its command; raises Failed when no trial has finished."""
        rows = results["trials"]
        write_page(self.output / "sweep.html", results)
        print_table(rows)
        if self.metric == "validation_loss" and set(MEANINGS) & rows[0]["options"].keys():
            console.print("these trials' validation losses do not mean the same; --metric success_rate compares them")
        console.print(f"results in {self.output}/sweep.json, page in {self.output}/sweep.html")
        best = next((row for row in rows if row["name"] == results["best"]), None)
        if best is None:
            reasons = [row["reason"] for row in rows if row["reason"]] or [f"no trial has a {self.metric}"]
            raise Failed(f"no trial can be the best: {reasons[0]}")
        console.print(f"best: {best['name']}, {say_numbers(best)}, {say_options(best['options'])}; to train it again:")
        console.print(best["command"], soft_wrap=True)


def run_trial(trial: Trial) -> str | None:
    """Train and evaluate, in a process that does nothing else, what of it is missing; returns what went wrong, None for
    nothing. What is printed goes into a file beside the trial's folder."""
    with trial.train.output.with_suffix(".log").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        if not trial.trained:
            if (trial.train.output / OPTIONS).is_file():  # it was interrupted
                dataclasses.replace(trial.train, resume=trial.train.output).run()
            else:
                shutil.rmtree(trial.train.output, ignore_errors=True)
                trial.train.run()
        if trial.episodes and not (trial.evaluation / "results.json").is_file():
            shutil.rmtree(trial.evaluation, ignore_errors=True)
            Evaluate(
                trial.train.output,
                trial.evaluation,
                trial.episodes,
                sampling=trial.sampling,
                workers=1,
                videos=0,
                device=trial.train.device,
            ).run()
    except Exception as error:
        traceback.print_exc()
        expected = isinstance(error, ValueError | OSError | FloatingPointError | Failed | Interrupted)
        return " ".join(f"{'' if expected else f'{type(error).__name__}: '}{error}".split())
    return None


def describe(trial: Trial, reason: str | None = "") -> dict[str, Any]:
    """A trial's row of sweep.json; `reason`: why it failed, None if it did not, nothing if it has not run."""
    train = trial.train
    row: dict[str, Any] = {
        "name": trial.name,
        "status": "finished" if reason is None else "failed" if reason else "waiting",
        "reason": reason or None,
        "options": trial.options,
        "validation_loss": None,
        "success_rate": None,
        "curve": [],
        "command": shlex.join(["diffusion-policy", "train", *flags(train)]),
        "data": {name: getattr(train, name) for name in ("dataset", "observation", "action", "angles")},
        "evaluation": {"episodes": trial.episodes, "sampling": dataclasses.asdict(trial.sampling)},
        "policy": dataclasses.asdict(train.policy),
        "training": dataclasses.asdict(train.training),
    }
    if reason == "":
        return row
    with contextlib.suppress(OSError):
        lines = map(json.loads, (train.output / "metrics.jsonl").read_text().splitlines())
        losses = [(line["step"], line.get("validation_loss")) for line in lines]
        row["curve"] = [(step, loss) for step, loss in losses if loss is not None and math.isfinite(loss)]
    if reason is None:
        row["validation_loss"] = row["curve"][-1][1] if row["curve"] else None
        if trial.episodes:
            results = json.loads((trial.evaluation / "results.json").read_text())
            row["success_rate"] = results["success_rate"]
    return row


def merit(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """What is smallest for the best trial; of equally successful ones that with the lower loss."""
    loss = math.inf if row["validation_loss"] is None else row["validation_loss"]
    return (-row["success_rate"]["value"] if metric == "success_rate" else 0.0), loss


def flags(train: Train) -> list[str]:
    """The options of a training that are not the defaults, as its command takes them, into a folder beside it."""
    again = f"{train.output}-again"
    given: list[str] = ["--dataset", train.dataset, "--output", again]
    default = Train(train.dataset, train.output)
    for config, usual in ((train, default), (train.policy, default.policy), (train.training, default.training)):
        for option in dataclasses.fields(config):
            value = getattr(config, option.name)
            if value == getattr(usual, option.name) or option.name in ("policy", "training"):
                continue
            name = option.name.replace("_", "-")
            if isinstance(value, bool):
                given.append(f"--{name}" if value else f"--no-{name}")
            else:
                given += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return given


def vary(config: Any, point: Mapping[str, Any]) -> Any:
    """A config with those of these options that are its own; raises ConfigError."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return from_dict(type(config), values | {name: point[name] for name in point.keys() & values.keys()})


def say(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def say_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {say(value)}" for name, value in options.items())


def say_numbers(row: Mapping[str, Any]) -> str:
    from diffusion_policy import wording

    success = row["success_rate"]
    loss = f"validation loss {wording.number(row['validation_loss'])}"
    return loss + (f", success {wording.share(success['value'])}" if success else "")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row a trial."""
    from diffusion_policy import wording

    names = list(rows[0]["options"])
    table = Table("trial", *(name.replace("_", "-") for name in names), "validation loss", "success", "", box=None)
    for row in rows:
        success = row["success_rate"]
        table.add_row(
            row["name"],
            *(say(row["options"][name]) for name in names),
            wording.number(row["validation_loss"]),
            f"{wording.share(success['value'])} ({wording.share_interval(success)})" if success else wording.NOTHING,
            "failed" if row["reason"] else "",
        )
    console.print(table)


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """The sweep as one page that works offline; `results` is what sweep.json holds."""
    from diffusion_policy import report
    from diffusion_policy.drawing import draw_curves

    rows = results["trials"]
    pages = {row["name"]: f"{row['name']}/evaluation/report.html" for row in rows}
    curves = any(row["curve"] for row in rows)
    page = report.templates().get_template("report_sweep.html.jinja")
    text = page.render(
        results=results,
        best=next((row for row in rows if row["name"] == results["best"]), None),
        names=list(rows[0]["options"]),
        pages={name: page for name, page in pages.items() if (path.parent / page).is_file()},
        picture=report.embed(draw_curves(rows, results["best"])) if curves else None,
        say=say,
        incomparable=results["metric"] == "validation_loss" and bool(set(MEANINGS) & rows[0]["options"].keys()),
    )
    path.write_text(text, encoding="utf-8")

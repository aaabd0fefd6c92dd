"""diffusion-policy sweep: many trainings that differ in some options, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from rich.table import Table

from diffusion_policy.basics.files import FileError, format_json, read_json, remove, write_whole
from diffusion_policy.commands.environment import join_environment
from diffusion_policy.commands.episodes import (
    FIRST_TEST_SEED,
    PLANNING_BATCH,
    refuse_seen_seeds,
    require_memory,
)
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.outputs import holding, require_fresh
from diffusion_policy.commands.points import MAX_TRIALS, draw_points, read_grid
from diffusion_policy.commands.runs import OPTIONS, absolute, say
from diffusion_policy.commands.stores import join_actions, open_store
from diffusion_policy.commands.terminal import console, progress_bar
from diffusion_policy.commands.train import Train
from diffusion_policy.config import (
    MAX_EPISODES,
    ConfigError,
    PolicyConfig,
    SampleConfig,
    SuccessAndModes,
    TrainConfig,
    decode,
    from_dict,
    require_at_least,
    require_at_most,
)
from diffusion_policy.evaluation.engines import Engine, require_engine, run_isolated
from diffusion_policy.training.trackers import read_lines

if TYPE_CHECKING:
    from diffusion_policy.datasets.store import EpisodeStore

OTHER_LOSS = {
    **dict.fromkeys(("observation_horizon", "prediction_horizon"), "other steps are predicted"),
    **dict.fromkeys(("schedule", "schedule_options", "noise_levels"), "other noise is taken away"),
    **dict.fromkeys(("prediction", "snr_gamma", "learn_variance"), "the loss itself is another"),
    "normalization": "it is measured in other units",
    "condition_on_mode": "the network is told more",
    **dict.fromkeys(("validation_share", "seed", "memory_gb"), "it is measured on other windows"),
    "max_episodes": "other episodes decide the units that it is measured in",
}
"""Options that change what the validation loss is, or what it is measured on, and how. Under all others of policy and
training its values can be compared."""
CURVE = 100
"""Most points of a curve in sweep.json."""


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
    def evaluated(self) -> bool:
        """Whether there are the results that were asked for."""
        return not self.episodes or (self.evaluation / "results.json").is_file()

    @property
    def evaluation(self) -> Path:
        return self.train.output / "evaluation"


class Data(NamedTuple):
    """What a trial was trained on."""

    dataset: str
    observation: tuple[str, ...]
    action: str | None
    angles: tuple[str, ...]


class Evaluated(NamedTuple):
    """How a trial was to be evaluated."""

    episodes: int
    sampling: SampleConfig


@dataclass(frozen=True)
class Earlier:
    """What an earlier sweep.json says of a trial, as far as it must be the same."""

    status: str
    data: Data
    evaluation: Evaluated
    policy: PolicyConfig
    training: TrainConfig

    @classmethod
    def of(cls, trial: Trial, status: str) -> Earlier:
        """That of a trial of this sweep."""
        train = trial.train
        data = Data(train.dataset, train.observation, join_actions(train.action) or None, train.angles)
        return cls(status, data, Evaluated(trial.episodes, trial.sampling), train.policy, train.training)


def read_rows(path: Path) -> list[Earlier]:
    """The trials of a sweep.json; raises ValueError."""
    from diffusion_policy.evaluation.results import MAX_BRACKETS, MAX_BYTES

    results = read_json(path, MAX_BYTES, MAX_BRACKETS)
    if not isinstance(results, dict):
        raise ConfigError(f"{path} must be a JSON object")
    rows = decode(results.get("trials"), tuple[dict[str, Any], ...], "trials")
    names = [option.name for option in dataclasses.fields(Earlier)]
    return [
        decode({name: row[name] for name in names if name in row}, Earlier, f"trials[{i}]")
        for i, row in enumerate(rows)
    ]


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
    must all see dataset and output."""
    gpus: float = 0.0
    """GPUs of the cluster that each trial takes; with 0.5, two share one."""
    resume: bool = False
    """Go on with the sweep in the output folder; its trials must be the same, but there may be more."""
    config: Path | None = None
    """Take policy and training options from this JSON, such as a checkpoint's config.json; flags override it."""
    observation: tuple[str, ...] = ()
    """Keys of the store that the policies observe; by default those that the store names, else all but the action."""
    action: tuple[str, ...] = ()
    """Key of the store that holds the actions, or several, whose columns stand side by side; by default the one that
    the store names, else action."""
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
        require_at_most(self, MAX_TRIALS, ("runs", "workers", "gpus"))
        require_at_most(self, MAX_EPISODES, ("episodes",))
        require_engine(self.engine)
        if self.gpus and self.engine == "local":
            raise ConfigError(f"gpus are those of a Ray cluster: they need --engine ray; got {self.gpus:g}")
        if self.metric == "success_rate" and self.episodes == 0:
            raise ConfigError("the metric success_rate needs episodes of at least 1; got 0")

    def run(self) -> dict[str, Any]:
        """Run all trials; returns what sweep.json holds. Raises ValueError for options that cannot work, an output
        folder that holds something else, and a dataset that cannot be read; Failed when every trial failed."""
        trials = self.trials()
        rows = self._earlier_rows(trials)
        self._require_possible([t for t, row in zip(trials, rows, strict=True) if row["status"] != "finished"])
        if self.metric == "validation_loss":
            self._say_incomparable(rows)
        with holding(self.output):
            try:
                results = self._run(trials, rows)
            except KeyboardInterrupt:
                done = sum(row["status"] == "finished" for row in rows)
                raise Interrupted(
                    f"stopped: {done} of {len(trials)} trials are finished in {self.output}; the same command goes on "
                    "with --resume"
                ) from None
        self._conclude(results)
        return results

    def _run(self, trials: Sequence[Trial], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Run what is not finished, and write down in `rows` what becomes of it."""
        waiting = [trial for trial, row in zip(trials, rows, strict=True) if row["status"] != "finished"]
        each = run_isolated(run_trial, waiting, self.workers, self.engine, self.gpus)
        with contextlib.closing(each) as ended, progress_bar("trials") as bar:
            task = bar.add_task("sweeping", total=len(trials), completed=len(trials) - len(waiting), note="")
            results = self._write(rows)
            for trial, reason in ended:
                row = rows[trials.index(trial)] = describe(trial, reason)
                results = self._write(rows)
                bar.console.print(f"{trial.name}: {reason or say_numbers(row)}")
                bar.advance(task)
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
                Path(os.path.realpath(self.output)) / name,
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

    def _require_possible(self, trials: Sequence[Trial]) -> None:
        """Raise ConfigError, naming the trial, for whatever could only fail once the work has begun: in its training,
        its rollouts or its evaluation."""
        store = open_store(self.dataset)
        for trial in trials:
            quiet, console.quiet = console.quiet, True  # each trial says it in its own log
            try:
                require_possible(trial, store)
            except ValueError as error:
                raise ConfigError(f"{trial.name} ({say_options(trial.options)}): {error}") from error
            finally:
                console.quiet = quiet

    def _say_incomparable(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for name, why in incomparable(rows).items():
            console.print(
                f"validation losses cannot be compared where {name.replace('_', '-')} differs: {why}; none of these "
                "trials is called the best; --metric success_rate compares them",
                soft_wrap=True,
            )

    def _earlier_rows(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """What is known of each trial before it runs; raises ConfigError where the folder is of another sweep."""
        rows = [describe(trial) for trial in trials]
        if not self.resume:
            require_fresh(self.output)
            return rows
        try:
            earlier = read_rows(self.output / "sweep.json")
        except ValueError as error:
            raise ConfigError(f"{self.output} holds no sweep to go on with: {error}") from error
        same = [old == Earlier.of(trial, old.status) for old, trial in zip(earlier, trials, strict=False)]
        if not all(same) or len(earlier) > len(rows):
            found = (
                f"there were {len(earlier)} trials" if all(same) else f"{rows[same.index(False)]['name']} was another"
            )
            raise ConfigError(f"{self.output} cannot go on as another sweep: {found}; give the same options")
        for i, (old, trial) in enumerate(zip(earlier, trials, strict=False)):
            if old.status == "finished" and trial.trained and trial.evaluated:
                rows[i] = describe(trial, None)
        return rows

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """sweep.json; returns its content."""
        finished = [row for row in rows if row["status"] == "finished" and row[self.metric] is not None]
        compared = self.metric == "success_rate" or not incomparable(rows)
        best = min(finished, key=lambda row: merit(row, self.metric), default=None) if compared else None
        results = {
            "dataset": self.dataset,
            "metric": self.metric,
            "search": {"grid": self.grid} if self.grid else {"random": self.random, "seed": self.training.seed},
            "best": best["name"] if best else None,
            "trials": rows,
        }
        write_whole(self.output / "sweep.json", format_json(results))
        return results

    def _conclude(self, results: Mapping[str, Any]) -> None:
        """The table, the page, and the best trial with its command; raises Failed when no trial has finished."""
        rows = results["trials"]
        print_table(rows)
        page = f"page in {self.output}/sweep.html"
        try:
            write_page(self.output / "sweep.html", results)
        except (ValueError, OSError) as error:  # such as a full disk; the results are kept
            page = f"no page: {error}"
        console.print(f"results in {self.output}/sweep.json, {page}", soft_wrap=True)
        if not any(row[self.metric] is not None for row in rows if row["status"] == "finished"):
            reasons = [row["reason"] for row in rows if row["reason"]] or [f"no trial has a {self.metric}"]
            raise Failed(f"no trial can be the best: {reasons[0]}")
        best = next((row for row in rows if row["name"] == results["best"]), None)
        if best is None:
            self._say_incomparable(rows)
            return
        console.print(f"best: {best['name']}, {say_numbers(best)}, {say_options(best['options'])}; to train it again:")
        console.print(best["command"], soft_wrap=True)


def require_possible(trial: Trial, store: EpisodeStore) -> None:
    """Raise ValueError for a trial that cannot be trained on this store, or whose policy cannot be rolled out or
    evaluated as asked: before any of its work is done."""
    train = trial.train
    point = train.sketch(store, train.plan(store))
    if (trial.episodes or train.training.rollout_every) and point.environment.id is None:
        raise ConfigError(f"{train.dataset} names no environment: give --episodes 0 and --rollout-every 0")
    if train.training.rollout_every:
        train.make_rollouts(store, point)
    if trial.episodes:
        joined = join_environment(train.dataset, point, None, None, trial.sampling, SuccessAndModes())
        joined.env.close()
        require_memory(point.policy, trial.sampling, PLANNING_BATCH)
        refuse_seen_seeds(joined, range(FIRST_TEST_SEED, FIRST_TEST_SEED + trial.episodes))


def incomparable(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The options in which these trials differ and by which their validation losses cannot be compared, and why."""
    return {
        name: why
        for name, why in OTHER_LOSS.items()
        if len({json.dumps(row["options"][name]) for row in rows if name in row["options"]}) > 1
    }


def run_trial(trial: Trial) -> str | None:
    """Train and evaluate, in a process that does nothing else, what of it is missing; returns what went wrong, None for
    nothing. What is printed goes into a file beside the trial's folder."""
    with open_log(trial.train.output.with_suffix(".log")) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        if not trial.trained:
            if (trial.train.output / OPTIONS).is_file():  # it was interrupted
                dataclasses.replace(trial.train, resume=trial.train.output).run()
            else:
                remove(trial.train.output)
                trial.train.run()
        if not trial.evaluated:
            remove(trial.evaluation)
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


def open_log(path: Path) -> IO[str]:
    """A file to append to; what is no file there (a pipe would be waited for, a link leads elsewhere) is deleted."""
    if path.is_symlink() or not path.is_file():
        remove(path)
    return path.open("a")


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
        "data": Earlier.of(trial, "").data._asdict(),
        "evaluation": {"episodes": trial.episodes, "sampling": dataclasses.asdict(trial.sampling)},
        "policy": dataclasses.asdict(train.policy),
        "training": dataclasses.asdict(train.training),
    }
    if reason == "":
        return row
    from diffusion_policy.evaluation.results import read_results

    losses: list[tuple[int, float]] = []
    with contextlib.suppress(FileError):
        for _, line in read_lines(train.output / "metrics.jsonl"):
            loss = line.get("validation_loss")
            if isinstance(loss, float) and math.isfinite(loss):
                losses.append((line["step"], loss))
    row["curve"] = losses[:: -math.ceil(len(losses) / CURVE) or None][::-1]
    if reason is None:
        row["validation_loss"] = losses[-1][1] if losses else None
        success = read_results(trial.evaluation)["success_rate"] if trial.episodes else {"value": None}
        row["success_rate"] = None if success["value"] is None else success
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
    values = dataclasses.asdict(config)
    return from_dict(type(config), values | {name: point[name] for name in point.keys() & values.keys()})


def say_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {say(value):.100}" for name, value in options.items())


def say_numbers(row: Mapping[str, Any]) -> str:
    from diffusion_policy.report import text as wording

    success = row["success_rate"]
    loss = f"validation loss {wording.number(row['validation_loss'])}"
    return loss + (f", success {wording.share(success['value'])}" if success else "")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row a trial."""
    from diffusion_policy.report import text as wording

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
    from diffusion_policy.report import page as report
    from diffusion_policy.report.evaluation_figures import draw_curves

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
        incomparable=results["metric"] == "validation_loss" and bool(incomparable(rows)),
    )
    write_whole(path, text)

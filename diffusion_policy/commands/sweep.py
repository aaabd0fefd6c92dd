"""diffusion-policy sweep: many trainings that differ in some options, side by side.

Runs the trials that are missing, and keeps sweep.json at every moment. What a trial is, is in `trials`; which is the
best, and how they are shown, in `trials_table`.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_policy.basics.files import format_json, write_whole
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.options.sweep import OF_A_TRAINING, Sweep
from diffusion_policy.commands.options.train import Train, absolute
from diffusion_policy.commands.outputs import holding, require_fresh
from diffusion_policy.commands.points import draw_points, read_grid
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import console, progress_bar
from diffusion_policy.commands.trials import (
    Earlier,
    Trial,
    describe_trial,
    read_rows,
    require_possible,
    run_trial,
    vary,
)
from diffusion_policy.commands.trials_table import (
    find_best,
    print_table,
    say_incomparable,
    say_numbers,
    say_options,
    write_page,
)
from diffusion_policy.config import ConfigError
from diffusion_policy.evaluation.engines import run_isolated


def run(options: Sweep) -> dict[str, Any]:
    """Run all trials; returns what sweep.json holds. Raises ValueError for options that cannot work, an output folder
    that holds something else, and a dataset that cannot be read; Failed when every trial failed."""
    trials = make_trials(options)
    rows = _earlier_rows(options, trials)
    _require_possible(options.dataset, [t for t, row in zip(trials, rows, strict=True) if row["status"] != "finished"])
    if options.metric == "validation_loss":
        say_incomparable(rows)
    with holding(options.output):
        try:
            results = _run_trials(options, trials, rows)
        except KeyboardInterrupt:
            done = sum(row["status"] == "finished" for row in rows)
            raise Interrupted(
                f"stopped: {done} of {len(trials)} trials are finished in {options.output}; the same command goes on "
                "with --resume"
            ) from None
    conclude(options, results)
    return results


def make_trials(options: Sweep) -> list[Trial]:
    """What is to be trained; raises ConfigError for options that are unknown or cannot work."""
    if bool(options.grid) == bool(options.random):
        raise ConfigError("sweep needs either --grid learning-rate=1e-4,3e-4 or --random learning-rate=log:1e-5:1e-3")
    if options.grid:
        points = read_grid(options.grid)
    else:
        points = draw_points(options.random, options.runs, options.training.seed)
    return [_make_trial(options, f"trial-{i:03d}", point) for i, point in enumerate(points)]


def _make_trial(options: Sweep, name: str, point: dict[str, Any]) -> Trial:
    try:
        policy, training = (vary(config, point) for config in (options.policy, options.training))
        if training.validation_share == 0 and options.metric == "validation_loss":
            raise ConfigError("the metric validation_loss needs held-out episodes; got validation-share 0")
    except ConfigError as error:
        raise ConfigError(f"{name} ({say_options(point)}): {error}") from error
    alike = {name: getattr(options, name) for name in OF_A_TRAINING} | {"policy": policy, "training": training}
    train = Train(absolute(options.dataset), Path(os.path.realpath(options.output)) / name, **alike)
    return Trial(name, point, train, options.episodes, options.sampling)


def _require_possible(dataset: str, trials: Sequence[Trial]) -> None:
    """Raise ConfigError, naming the trial, for whatever could only fail once the work has begun: in its training, its
    rollouts or its evaluation."""
    store = open_store(dataset)
    for trial in trials:
        quiet, console.quiet = console.quiet, True  # each trial says it in its own log
        try:
            require_possible(trial, store)
        except ValueError as error:
            raise ConfigError(f"{trial.name} ({say_options(trial.options)}): {error}") from error
        finally:
            console.quiet = quiet


def _earlier_rows(options: Sweep, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What is known of each trial before it runs; raises ConfigError where the folder is of another sweep."""
    rows = [describe_trial(trial) for trial in trials]
    if not options.resume:
        require_fresh(options.output)
        return rows
    try:
        earlier = read_rows(options.output / "sweep.json")
    except ValueError as error:
        raise ConfigError(f"{options.output} holds no sweep to go on with: {error}") from error
    same = [old == Earlier.of(trial, old.status) for old, trial in zip(earlier, trials, strict=False)]
    if not all(same) or len(earlier) > len(rows):
        found = f"there were {len(earlier)} trials" if all(same) else f"{rows[same.index(False)]['name']} was another"
        raise ConfigError(f"{options.output} cannot go on as another sweep: {found}; give the same options")
    for i, (old, trial) in enumerate(zip(earlier, trials, strict=False)):
        if old.status == "finished" and trial.trained and trial.evaluated:
            rows[i] = describe_trial(trial, None)
    return rows


def _run_trials(options: Sweep, trials: Sequence[Trial], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Run what is not finished, and write down in `rows` what becomes of it."""
    waiting = [trial for trial, row in zip(trials, rows, strict=True) if row["status"] != "finished"]
    each = run_isolated(run_trial, waiting, options.workers, options.engine, options.gpus)
    with contextlib.closing(each) as ended, progress_bar("trials") as bar:
        task = bar.add_task("sweeping", total=len(trials), completed=len(trials) - len(waiting), note="")
        results = write_results(options, rows)
        for trial, reason in ended:
            row = rows[trials.index(trial)] = describe_trial(trial, reason)
            results = write_results(options, rows)
            bar.console.print(f"{trial.name}: {reason or say_numbers(row)}")
            bar.advance(task)
    return results


def write_results(options: Sweep, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """sweep.json; returns its content."""
    results = {
        "dataset": options.dataset,
        "metric": options.metric,
        "search": {"grid": options.grid} if options.grid else {"random": options.random, "seed": options.training.seed},
        "best": find_best(rows, options.metric),
        "trials": rows,
    }
    write_whole(options.output / "sweep.json", format_json(results))
    return results


def conclude(options: Sweep, results: Mapping[str, Any]) -> None:
    """The table, the page, and the best trial with its command; raises Failed when no trial has finished."""
    rows, output = results["trials"], options.output
    print_table(rows)
    page = f"page in {output}/sweep.html"
    try:
        write_page(output / "sweep.html", results)
    except (ValueError, OSError) as error:  # such as a full disk; the results are kept
        page = f"no page: {error}"
    console.print(f"results in {output}/sweep.json, {page}", soft_wrap=True)
    if not any(row[options.metric] is not None for row in rows if row["status"] == "finished"):
        reasons = [row["reason"] for row in rows if row["reason"]] or [f"no trial has a {options.metric}"]
        raise Failed(f"no trial can be the best: {reasons[0]}")
    best = next((row for row in rows if row["name"] == results["best"]), None)
    if best is None:
        say_incomparable(rows)
        return
    console.print(f"best: {best['name']}, {say_numbers(best)}, {say_options(best['options'])}; to train it again:")
    console.print(best["command"], soft_wrap=True)

"""diffusion-policy forecast: what policies say will come in recorded episodes, and what came.

Joins stores, checkpoints and the formulas of `evaluation.forecasts`. What is drawn from, and which episodes, is in
`forecasting`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_policy.basics.files import format_json, plain, write_whole
from diffusion_policy.basics.metric_table import metrics_of
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.forecasting import (
    CONSTANT_VELOCITY,
    Forecasters,
    Futures,
    Judges,
    Recorded,
    find_forecasters,
    find_judges,
    find_recorded,
    label_all,
    sample_futures,
)
from diffusion_policy.commands.options.forecast import Forecast
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.terminal import console, print_cells
from diffusion_policy.config import CostConfig, to_json
from diffusion_policy.evaluation import forecasts
from diffusion_policy.evaluation.forecasts import Judged
from diffusion_policy.evaluation.intervals import Metric
from diffusion_policy.report.forecast_page import Fan, Sampled, write_forecast_page


def run(options: Forecast) -> dict[str, Any]:
    """Forecast; returns what results.json holds. Raises ValueError for checkpoints that forecast no positions or not
    the same ones, for a dataset that does not fit, and for episodes that are all too short; FloatingPointError for a
    forecast that is not finite; Interrupted when it was stopped, after the results of what is done are written."""
    require_fresh(options.output)
    forecasters = find_forecasters(options)
    recorded = find_recorded(options, forecasters)
    judges = find_judges(options, recorded.store, forecasters.action)
    options.output.mkdir(parents=True, exist_ok=True)
    futures, ended = sample_futures(options, forecasters, recorded)
    if ended is not None and not futures.episodes:
        raise ended
    odds = futures.probabilities
    if odds is not None and odds.shape[1] != len(judges.modes):
        console.print(
            f"the dataset has the odds of {odds.shape[1]} modes, {len(judges.modes)} are judged: odds are left out"
        )
        futures = futures._replace(probabilities=None)
    results, labels = judge(options, forecasters, recorded, judges, futures)
    write_whole(options.output / "results.json", format_json(results))
    print_table(results)
    page = options.output / "forecast.html"
    fans = choose_fans(options, results, futures, labels)
    Remarks().attempt("no page", lambda: write_forecast_page(page, results, judges.scene_of(futures), fans), None)
    beside = f", page in {page}" if page.exists() else ""
    console.print(f"results in {options.output}/results.json{beside}", soft_wrap=True)
    if ended is not None:
        done = f"{len(futures.episodes)} of {len(recorded.episodes)} episodes; {options.output} has these"
        raise type(ended)(f"{ended} after {done}")
    return results


def judge(
    options: Forecast, forecasters: Forecasters, recorded: Recorded, judges: Judges, futures: Futures
) -> tuple[dict[str, Any], dict[str, list[list[str | None]]]]:
    """What results.json holds; and the modes of all samples, by forecaster, {} without modes."""
    how = Judged(options.miss_distance, options.collision_distance)
    came = label_all(judges, futures.history, futures.truth[:, None]) if judges.modes else []
    labels = {row: label_all(judges, futures.history, of) for row, of in futures.samples.items()} if came else {}
    known = np.array([judges.modes.index(one) if one in judges.modes else -1 for (one,) in came], int)
    true = None if futures.probabilities is None else futures.probabilities[known >= 0]
    rows: dict[str, Any] = {}
    for row, samples in futures.samples.items():
        found = forecasts.judge(samples, futures.truth, how)
        rows[row] = {"samples": samples.shape[1]}
        if (known >= 0).any():
            counts = forecasts.count_modes(labels[row], judges.modes)[known >= 0]
            found |= forecasts.judge_modes(counts, known[known >= 0], true)
            rows[row] |= describe_modes(counts, known[known >= 0], true, judges.modes)
        rows[row] |= {name: _flat(parts) for name, parts in found.items()}
    results = {
        "checkpoint": str(options.checkpoint),
        "dataset": str(options.dataset),
        "action": forecasters.action,
        "episodes": len(futures.episodes),
        "episodes_found": len(recorded.episodes),
        "too_short": recorded.too_short,
        "held_out": recorded.held_out,
        "agents": futures.truth.shape[2],
        "now": recorded.now,
        "steps": recorded.steps,
        "control_period": recorded.control_period,
        "samples": options.samples,
        "seed": options.seed,
        "miss_distance": options.miss_distance,
        "collision_distance": options.collision_distance,
        "costs": None if options.costs == CostConfig() else to_json(options.costs),
        "modes": list(judges.modes),
        "data": describe_data(futures, known, true, judges.modes, options),
        "rows": rows,
    }
    return plain(results), labels


def describe_modes(
    counts: np.ndarray, came: np.ndarray, true: np.ndarray | None, modes: Sequence[str]
) -> dict[str, Any]:
    """How often each mode was forecast, and how reliable that is."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    bins = forecasts.reliability(shares, came, true)
    return {
        "modes": dict(zip(modes, shares.mean(axis=0).tolist(), strict=True)),
        "reliability": [
            one._asdict() | {"happened": dataclasses.asdict(one.happened), "true": dataclasses.asdict(one.true)}
            for one in bins
        ],
    }


def describe_data(
    futures: Futures, known: np.ndarray, true: np.ndarray | None, modes: Sequence[str], options: Forecast
) -> dict[str, Any]:
    """What the data themselves come to, where a forecast does: collisions, modes, and what the true probabilities would
    score."""
    told: dict[str, Any] = {
        "collision_rate": dataclasses.asdict(
            forecasts.share_of(forecasts.collisions(futures.truth, options.collision_distance))
        ),
        "modes": {mode: int((known == i).sum()) for i, mode in enumerate(modes)},
        "without_mode": int((known < 0).sum()) if modes else 0,
    }
    if true is not None and len(true):
        least = forecasts.mean_of(forecasts.least_mode_errors(true, options.samples))
        scores = -np.log(np.maximum(true[np.arange(len(true)), known[known >= 0]], 1e-12))
        told |= {
            "mode_error": dataclasses.asdict(least),
            "log_score": dataclasses.asdict(forecasts.mean_of(scores)),
            "probabilities": dict(zip(modes, true.mean(axis=0).tolist(), strict=True)),
        }
    return told


def _flat(parts: Mapping[str, Metric]) -> Any:
    """By the number of samples, or the one number."""
    told = {name: dataclasses.asdict(metric) for name, metric in parts.items()}
    return told.get("", told)


def choose_fans(
    options: Forecast, results: Mapping[str, Any], futures: Futures, labels: Mapping[str, list[list[str | None]]]
) -> list[Fan]:
    """Episodes for the page, evenly from all, with their samples and the modes of these."""
    few = np.unique(np.linspace(0, len(futures.episodes) - 1, min(options.shown, len(futures.episodes))).astype(int))
    return [
        Fan(
            int(futures.episodes[i]),
            futures.history[i],
            futures.truth[i],
            [
                Sampled(row, samples[i], labels[row][i] if labels else [None] * samples.shape[1])
                for row, samples in futures.samples.items()
                if row != CONSTANT_VELOCITY
            ],
            None
            if futures.probabilities is None
            else dict(zip(results["modes"], futures.probabilities[i].tolist(), strict=True)),
        )
        for i in (few if options.shown else ())
    ]


def print_table(results: Mapping[str, Any]) -> None:
    """A row a figure, a column a forecaster, and what the data themselves come to."""
    of_all = {**results["rows"], "the data": results["data"]}
    cells: dict[str, dict[str, Any]] = {}
    for info in metrics_of("forecast"):
        for row, of in of_all.items():
            found = of.get(info.name)
            parts = found if info.parts and found else {"": found}
            for k, metric in parts.items() if found else ():
                label = f"{info.label}, k = {k}" if k else info.label
                cells.setdefault(label, {})[row] = {"it": metric}
    columns = {row: {"it": None} for row in of_all}
    print_cells(
        "what is forecast", "figure", "forecast", {name: columns | row for name, row in cells.items()}, "it", "{:.3g}"
    )

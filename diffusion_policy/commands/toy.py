"""diffusion-policy toy: diffusion on problems small enough to see."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from diffusion_policy import __version__
from diffusion_policy.basics.files import format_json, write_whole
from diffusion_policy.commands.options.toy import Toy
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.terminal import console, print_cells, progress_bar
from diffusion_policy.report.evaluation_figures import to_png
from diffusion_policy.report.figures import draw_toy
from diffusion_policy.training import toy, toy_students
from diffusion_policy.training.doctor import check_last_level


def run(options: Toy) -> dict[str, Any]:
    """Train and measure; returns what results.json holds. Raises ConfigError when the output holds something."""
    require_fresh(options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    problem = toy.PROBLEMS[options.problem]
    with progress_bar("steps") as bar:
        task = bar.add_task("training", total=problem.training_steps, note="")
        fitted = toy.fit(
            problem, options.prediction, seed=options.seed, on_step=lambda step: bar.update(task, completed=step)
        )
    results = {
        "problem": options.problem,
        "prediction": options.prediction,
        "seed": options.seed,
        "package_version": __version__,
        "noise_levels": len(problem.schedule),
        "training": {
            "steps": len(fitted.losses),
            "seconds": fitted.seconds,
            "loss_of_first_50_steps": sum(fitted.losses[:50]) / 50,
            "loss_of_last_500_steps": sum(fitted.losses[-500:]) / 500,
        },
        "variational_bound": toy.measure_bound(fitted, problem.draw(500, torch.Generator().manual_seed(6))),
        "energy_distance_of_data_to_data": toy.noise_floor(problem),
        **_measure(options, problem, fitted),
        **({} if options.student is None else {"student": _measure_students(options, problem, fitted)}),
    }
    write_whole(options.output / "results.json", format_json(results))
    print_results(results)
    write_whole(options.output / "toy.png", to_png(draw_toy(results, toy.show(fitted, problem)), 150))
    console.print(f"results in {options.output}/results.json, picture in {options.output}/toy.png", soft_wrap=True)
    return results


def _measure(options: Toy, problem: toy.Problem, fitted: toy.Fitted) -> dict[str, Any]:
    """How well each sampler draws, and what is particular to the problem."""
    data = problem.draw(toy.COUNT, torch.Generator().manual_seed(4))
    with console.status("sampling"):
        samplers = toy.compare_samplers(fitted, data.x)
        measures = toy.MEASURES[options.problem](fitted) if options.problem in toy.MEASURES else {}
    if "too_little_noise" in measures:
        spread = float(data.x.square().mean().sqrt())
        measures["too_little_noise"]["doctor"] = dataclasses.asdict(check_last_level(toy.TOO_CLEAN, spread))
    return {"samplers": samplers, **measures}


def _measure_students(options: Toy, problem: toy.Problem, teacher: toy.Fitted) -> dict[str, Any]:
    """Energy distance of students in few steps, and of their teacher in as many."""
    assert options.student is not None
    data = problem.draw(toy.COUNT, torch.Generator().manual_seed(4)).x
    rows: dict[str, dict[str, float]] = {"teacher": {}, options.student: {}}
    with console.status(f"training students ({options.student})"):
        for steps, student in toy_students.fit_students(problem, teacher, options.student, options.seed):
            for name, fitted in (("teacher", teacher), (options.student, student)):
                rows[name][str(steps)] = toy.energy_distance(toy.sample(fitted, "ddim", steps, len(data)), data)
    return {"name": options.student, "energy_distance": rows}


def print_results(results: Mapping[str, Any]) -> None:
    """The tables of samplers, then what is particular to the problem."""
    print_cells(
        "energy distance of samples to data", "sampler", "steps", results["samplers"], "energy_distance", "{:.3f}"
    )
    print_cells("milliseconds for all points", "sampler", "steps", results["samplers"], "milliseconds", "{:.0f}")
    if "student" in results:
        console.print("energy distance in few steps of ddim")
        for name, cells in results["student"]["energy_distance"].items():
            console.print(f"{name:12s}" + ", ".join(f"{steps}: {value:.4f}" for steps, value in cells.items()))
    training = results["training"]
    console.print(
        f"loss {training['loss_of_first_50_steps']:.3f} -> {training['loss_of_last_500_steps']:.3f} in "
        f"{training['seconds']:.0f} s; data against other data: {results['energy_distance_of_data_to_data']:.4f}; "
        f"bound on -log p: {results['variational_bound']['nats']:.2f} nats"
    )
    if "radius_mean" in results:
        sectors = ", ".join(f"{share:.1%}" for share in results["sector_shares"])
        console.print(f"radius {results['radius_mean']:.3f}, {results['share_within_0.3']:.1%} within 0.3 of 2.0")
        console.print(f"eight sectors: {sectors}")
    if "share_in_asked_class" in results:
        shares = ", ".join(f"{share:.3f} at w = {w}" for w, share in results["share_in_asked_class"].items())
        console.print(f"samples in the asked class: {shares}")
    if "too_little_noise" in results:
        few = results["too_little_noise"]
        console.print(f"weights {_weights(results)} of 0.30 / 0.70")
        console.print(f"beta only up to 0.02: weights {_weights(few)}; doctor says: {few['doctor']['figure']}")
        for row in results["sweep"]:
            mark = "  COLLAPSED" if row["collapsed"] else ""
            console.print(f"K = {row['levels']:2d}, {row['prediction']:8s}: weights {_weights(row)}{mark}")


def _weights(row: Mapping[str, Any]) -> str:
    return " / ".join(f"{weight:.2f}" for weight in row["weights"])

"""Figures of datasets, the toy problems, the sampler study and the doctor. Knows plain numbers and arrays only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from diffusion_policy.evaluation.metrics import NONE
from diffusion_policy.report.evaluation_figures import (
    FEW_COLORS,
    GRID,
    INK,
    MUTED,
    PlanePath,
    clean,
    draw_mode_paths,
    draw_scene,
    label_modes,
    mode_colors,
)
from diffusion_policy.report.svg import SceneLike

if TYPE_CHECKING:
    import numpy as np

    from diffusion_policy.training.toy import Points, Shown

STYLES = ("-", "--", ":")


def draw_study(results: Mapping[str, Any]) -> Figure:
    """Success and mode entropy over the steps, and success over the time of a plan: one line a sampler."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for i, (name, cells) in enumerate(results["samplers"].items()):
        done = {int(steps): cell for steps, cell in cells.items() if "success_rate" in cell}
        success = [cell["success_rate"]["value"] for cell in done.values()]
        entropy = [cell["mode_entropy"]["value"] for cell in done.values()]
        times = [cell["milliseconds"] for cell in done.values()]
        for axis, x, y in ((axes[0], list(done), success), (axes[1], list(done), entropy), (axes[2], times, success)):
            axis.plot(x, y, label=name, **line_style(i))
    steps = sorted({int(steps) for cells in results["samplers"].values() for steps in cells})
    titles = ("success over steps", "mode entropy over steps", "success over time of a plan [ms]")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", color=INK, fontsize=11)
        axis.set(xscale="log", ylim=(-0.03, 1.03))
        clean(axis)
    for axis in axes[:2]:
        show_steps(axis, steps)
    axes[2].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[2].xaxis.set_minor_locator(NullLocator())
    axes[2].xaxis.set_major_formatter("{x:g}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def draw_benchmark(results: Mapping[str, Any]) -> Figure:
    """How often faster than the plain way a plan is, a bar for each backend and size, with its time and its share of
    the machine's limit."""
    rows = [row for row in results["planning"] if row["backend"] != "reference"]
    cases = list(dict.fromkeys((row["rows"], row["samples"]) for row in rows))
    names = list(dict.fromkeys(row["backend"] for row in rows))
    plain = any(row["ratio"] is not None for row in rows)
    figure = Figure(figsize=(10, 1.6 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    height, longest = 0.8 / len(names), 0.0
    for row in rows:
        i = names.index(row["backend"])
        y = cases.index((row["rows"], row["samples"])) + (i - (len(names) - 1) / 2) * height
        length = row["ratio"] if plain else row["share_of_limit"]
        longest = max(longest, length)
        axis.barh(y, length, height * 0.9, color=FEW_COLORS[i % len(FEW_COLORS)])
        label = f" {row['p50']:.1f} ms, {row['share_of_limit']:.0%} of the limit"
        axis.text(length, y, label, va="center", color=INK, fontsize=9)
    labels = [f"{rows} observation{'s' * (rows > 1)}, {samples} sample{'s' * (samples > 1)}" for rows, samples in cases]
    axis.set_yticks(range(len(cases)), labels)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * longest)
    network = results["policy"]["network"]
    size = "x".join(map(str, network.get("widths") or (network["width"], network["layers"])))
    title = "times faster than plain torch and diffusers" if plain else "share of the machine's limit"
    sampling = results["sampling"]
    axis.set_title(
        f"a plan: {title} ({network.get('kind', 'unet')} {size}, {sampling['steps']} steps of {sampling['sampler']}, "
        f"{results['machine']['threads']} threads)", loc="left", color=INK, fontsize=11,
    )  # fmt: skip
    if plain:
        axis.axvline(1, color=INK, linewidth=1)
    clean(axis)
    handles = [Patch(color=FEW_COLORS[i % len(FEW_COLORS)], label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def line_style(i: int) -> dict[str, Any]:
    """A look of its own for the i-th line: six colours, then the same dashed, then dotted."""
    shape = STYLES[i // len(FEW_COLORS) % len(STYLES)]
    color = FEW_COLORS[i % len(FEW_COLORS)]
    return {"color": color, "linestyle": shape, "marker": "o", "markersize": 4, "linewidth": 1.5, "alpha": 0.85}


def show_steps(axis: Axes, steps: Sequence[int]) -> None:
    """Exactly these numbers along a logarithmic axis."""
    axis.xaxis.set_major_locator(FixedLocator(steps))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")


def draw_toy(results: Mapping[str, Any], shown: Shown) -> Figure:
    """Above: data, the data noised to a low, a middle and a high level, samples. Below: distance to the data over the
    steps, and what is particular to the problem."""
    figure = Figure(figsize=(16, 7.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    above, below = halves
    panels = [("data", shown.data)]
    panels += [
        (f"noised, {name} level {level}", shown.data._replace(x=x))
        for name, (level, x) in zip(("low", "middle", "high"), shown.noised, strict=True)
    ]
    panels.append((f"samples, ddpm, {results['noise_levels']} steps", shown.samples))
    limit = 1.15 * max(float(points.x.abs().max()) for _, points in panels)
    for axis, (title, points) in zip(above.subplots(1, len(panels)), panels, strict=True):
        _draw_points(axis, points, limit)
        axis.set_title(title, loc="left", color=INK, fontsize=11)
        clean(axis)
    axes = below.subplots(1, 2, width_ratios=(1.6, 1))
    _draw_distances(axes[0], results)
    PARTICULAR.get(results["problem"], _draw_times)(axes[1], results)
    for axis in axes:
        clean(axis)
    return figure


def _draw_points(axis: Axes, points: Points, limit: float) -> None:
    if points.x.shape[1] == 1:
        axis.hist(points.x[:, 0].numpy(), bins=80, range=(-limit, limit), color=FEW_COLORS[0])
        axis.set_yticks([])
        return
    axis.scatter(*points.x.T.numpy(), s=3, c=[FEW_COLORS[int(i)] for i in points.label], alpha=0.5, linewidths=0)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


def _draw_distances(axis: Axes, results: Mapping[str, Any]) -> None:
    """Distances below that of data to data tell nothing; they lie on one line at a third of it."""
    floor = results["energy_distance_of_data_to_data"]
    for i, (name, cells) in enumerate(results["samplers"].items()):
        distances = {int(steps): cell["energy_distance"] for steps, cell in cells.items()}
        known = {steps: max(value, floor / 3) for steps, value in distances.items() if value is not None}
        axis.plot(list(known), list(known.values()), label=name, **line_style(i))
    axis.axhspan(floor / 3, floor, color=GRID, alpha=0.7, linewidth=0, label="as near as\nother data")
    axis.set(xscale="log", yscale="log", xlabel="sampling steps")
    axis.set_title("energy distance of samples to data", loc="left", color=INK, fontsize=11)
    show_steps(axis, [int(steps) for steps in next(iter(results["samplers"].values()))])
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_sectors(axis: Axes, results: Mapping[str, Any]) -> None:
    axis.bar(range(8), results["sector_shares"], color=FEW_COLORS[0])
    axis.axhline(1 / 8, color=INK, linestyle=":")
    axis.set_title("share of samples in each of eight sectors", loc="left", color=INK, fontsize=11)


def _draw_weights(axis: Axes, results: Mapping[str, Any]) -> None:
    axis.axhspan(0.25, 0.35, color=GRID, alpha=0.7, linewidth=0, label="true weight ± 0.05")
    for i, prediction in enumerate(("noise", "velocity")):
        rows = [row for row in results["sweep"] if row["prediction"] == prediction]
        axis.plot(
            [row["levels"] for row in rows],
            [row["weights"][0] for row in rows],
            label=f"{prediction} prediction, beta up to 0.25",
            **line_style(i),
        )
    lost = [(row["levels"], row["weights"][0]) for row in results["sweep"] if row["collapsed"]]
    if lost:
        axis.plot(*zip(*lost, strict=True), "x", color=INK, markersize=10, label="collapsed")
    few = results["too_little_noise"]["weights"][0]
    axis.plot(40, few, "s", color=FEW_COLORS[3], markersize=7, label="beta up to 0.02: too little noise")
    axis.set(xlabel="noise levels K", ylim=(0.15, 0.65))
    axis.set_title("weight of the smaller mode", loc="left", color=INK, fontsize=11)
    axis.legend(frameon=False, loc="upper center")


def _draw_guidance(axis: Axes, results: Mapping[str, Any]) -> None:
    shares = results["share_in_asked_class"]
    axis.plot([float(w) for w in shares], list(shares.values()), **line_style(0))
    axis.set(xlabel="guidance weight w", ylim=(0.7, 1.01))
    axis.set_title("share of samples in the asked class", loc="left", color=INK, fontsize=11)


def _draw_times(axis: Axes, results: Mapping[str, Any]) -> None:
    last = [list(cells.values())[-1]["milliseconds"] for cells in results["samplers"].values()]
    axis.barh(list(results["samplers"]), last, color=FEW_COLORS[0])
    axis.invert_yaxis()
    axis.set_title("milliseconds for all points, all steps", loc="left", color=INK, fontsize=11)


PARTICULAR = {"ring": _draw_sectors, "mixture": _draw_weights, "two-class": _draw_guidance}


def draw_noised(sequence: np.ndarray, noised: Sequence[tuple[int, np.ndarray]]) -> Figure:
    """A normalized action sequence (T, A) and the same at a low, a middle and a high level."""
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    panels = [("clean", sequence), *((f"level {level}", rows) for level, rows in noised)]
    for axis, (title, rows) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for i, column in enumerate(rows.T):
            axis.plot(column, label=f"action {i}", **line_style(i))
        axis.axhspan(-1, 1, color=GRID, alpha=0.5, linewidth=0)
        axis.set_title(title, loc="left", color=INK, fontsize=11)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        clean(axis)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


COMPARABLE = 5
"""Two columns whose ranges differ by more are of different kinds, such as position and velocity."""


def draw_trajectories(paths: Sequence[PlanePath], scene: SceneLike | None, labels: tuple[str, str]) -> Figure:
    """Episodes from above, coloured by mode where there are modes; `labels`: of the two axes."""
    modes = sorted({path.mode for path in paths if path.mode is not None})
    colors = mode_colors(modes) if modes else {NONE: FEW_COLORS[0]}
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    title = f"{len(paths)} episodes"
    if scene is None:
        axis.set_title(title, color=INK, fontsize=12)
        clean(axis)
    else:
        draw_scene(axis, scene, title)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    draw_mode_paths(axis, paths, colors)
    wide, high = axis.dataLim.width, axis.dataLim.height
    if scene is None and max(wide, high) <= COMPARABLE * min(wide, high):
        axis.set_aspect("equal", adjustable="datalim")
    label_modes(figure, colors, columns=3)
    return figure


def draw_columns(rows: np.ndarray, name: str) -> Figure:
    """How the values of each column are spread: rows (steps, ...), at most 16 columns."""
    flat = rows.reshape(len(rows), -1)[:, :16]
    across = min(4, flat.shape[1])
    down = -(-flat.shape[1] // across)
    figure = Figure(figsize=(3.2 * across + 0.6, 2.4 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for i, axis in enumerate(axes):
        axis.set_visible(i < flat.shape[1])
        if i < flat.shape[1]:
            axis.hist(flat[:, i], bins=50, color=FEW_COLORS[0])
            axis.set_title(f"{name}[{i}]", loc="left", color=INK, fontsize=11)
            axis.set_yticks([])
            axis.xaxis.set_major_locator(MaxNLocator(4))
            clean(axis)
    return figure


class Film(NamedTuple):
    """Some frames of an episode."""

    episode: int
    mode: str | None
    success: bool | None
    steps: list[int]
    """Which step each is."""
    frames: np.ndarray
    """(frames, height, width, channels)"""


def draw_frames(films: Sequence[Film], name: str) -> Figure:
    """A contact sheet: a row an episode, its frames from the first to the last, each under its step."""
    across, (height, width) = max(len(film.frames) for film in films), films[0].frames.shape[1:3]
    cell = 1.5
    size = cell * across * min(1.0, width / height) + 1.4, (cell * min(1.0, height / width) + 0.22) * len(films) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)  # pyright: ignore
    figure.suptitle(f"{name}: {height} x {width}", x=0.01, ha="left", color=INK, fontsize=12)
    white = whitest(films)
    for axes, film in zip(figure.subplots(len(films), across, squeeze=False), films, strict=True):
        for axis in axes:
            axis.set_axis_off()
        for axis, step, frame in zip(axes, film.steps, film.frames, strict=False):
            shown = (frame[..., :3] if frame.shape[2] > 2 else frame[..., :1].repeat(3, axis=2)) / white
            axis.imshow(shown.clip(0, 1), interpolation="antialiased")
            axis.set(xticks=[], yticks=[])
            axis.set_axis_on()
            axis.spines[:].set_color(GRID)  # where a picture that is white at its edge ends
            axis.set_title(f"step {step}", color=MUTED, fontsize=8, pad=2)
        said = [f"episode {film.episode}", film.mode, {True: "success", False: "failure", None: None}[film.success]]
        label = "\n".join(part for part in said if part)
        axes[0].text(-0.08, 0.5, label, transform=axes[0].transAxes, ha="right", va="center", color=INK, fontsize=9)
    return figure


def whitest(films: Sequence[Film]) -> float:
    """The value that is shown as white: 255, 1 for floats that are not above it, or the largest of other numbers."""
    highest = max(float(film.frames.max()) for film in films)
    if films[0].frames.dtype.kind == "f":
        return 1.0 if highest <= 1 else 255.0 if highest <= 255 else highest
    return max(255.0, highest)


def draw_lengths(episode_ends: np.ndarray, control_frequency: float | None) -> Figure:
    """How long episodes are, in steps, and in seconds where the rate [Hz] is known."""
    ends = [0, *episode_ends.tolist()]
    lengths = [stop - start for start, stop in pairwise(ends)]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.hist(lengths, bins=min(40, max(1, max(lengths) - min(lengths) + 1)), color=FEW_COLORS[0])
    axis.set(xlabel="steps of an episode", ylabel="episodes")
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    clean(axis)
    if control_frequency:
        rate = float(control_frequency)
        there_and_back = (lambda steps: steps / rate, lambda time: time * rate)
        seconds = axis.secondary_xaxis("top", functions=there_and_back)  # pyright: ignore[reportArgumentType]
        seconds.set_xlabel("seconds")
        seconds.tick_params(colors=INK, labelsize=10)
    return figure

"""diffusion-policy report: the page of an evaluation again, from what its folder holds."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_policy.commands.afterwards import PAGE, Remarks
from diffusion_policy.commands.kept_episodes import read_kept
from diffusion_policy.commands.losses import read_losses
from diffusion_policy.commands.options.report import Report
from diffusion_policy.commands.outputs import holding
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError
from diffusion_policy.evaluation.results import fingerprint, read_results
from diffusion_policy.report.page import NO_PICTURES, Pictures, read_mark, write_report
from diffusion_policy.report.shown import draw_kept
from diffusion_policy.report.text import known_modes


def run(options: Report) -> Path:
    """Write the page; returns where it lies. Raises ValueError for a folder without results, and where the page would
    replace a file that shows more or is something else."""
    page = options.output or options.folder / PAGE
    results = read_results(options.folder)
    refuse_to_replace(page, results)
    page.parent.mkdir(parents=True, exist_ok=True)
    with holding(options.folder) if page.parent == options.folder else contextlib.nullcontext():
        remarks = Remarks()
        pictures = draw_what_is_kept(options.folder, results, remarks)
        write_report(page, results, pictures._replace(remarks=tuple(remarks.sentences)))
    console.print(f"page in {page}", soft_wrap=True)
    return page


def refuse_to_replace(page: Path, results: Mapping[str, Any]) -> None:
    """Raise ConfigError where a page lies there already that this one would not be as good as."""
    if not page.exists():
        return
    mark, otherwise = read_mark(page), "choose another --output or delete it first"
    if mark is None or mark.evaluation != fingerprint(results):
        raise ConfigError(f"{page} is not known as a page of this evaluation; {otherwise}")
    if mark.shows:
        raise ConfigError(f"{page} shows {', '.join(mark.shows)}, which this one would not; {otherwise}")


def draw_what_is_kept(folder: Path, results: Mapping[str, Any], remarks: Remarks) -> Pictures:
    """Paths and plans as they were made, and the losses of the training where its files are there; what is missing is a
    remark."""
    others = "films, demonstrations and other plans, which only evaluate draws"
    without = f"this page was made again without paths, plans, {others}"
    kept = remarks.attempt(without, lambda: read_kept(folder, results), None)
    training = read_losses(Path(results["checkpoint"]), remarks)
    if kept is None:
        return NO_PICTURES._replace(training=training)
    remarks.say(f"this page was made again without {others}")
    if len(kept.episodes) < len(results["outcomes"]):
        remarks.say(f"paths and plans are of the first {len(kept.episodes)} episodes, which were kept")
    if kept.scene is None:
        return NO_PICTURES._replace(training=training)
    pictures = draw_kept(kept.scene, kept.episodes, kept.traces, known_modes(results))
    return pictures._replace(training=training)

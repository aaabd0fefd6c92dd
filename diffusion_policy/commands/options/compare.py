"""What `diffusion-policy compare` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from diffusion_policy.commands.options.command import Command


@dataclass(frozen=True)
class Compare(Command):
    """Compare two evaluations of the same task, seed by seed: McNemar's test for success, a paired bootstrap for the
    score, and a sentence that says whether the difference is real.

    Where both have kept their episodes, the page also draws the paths of those in which only one succeeds."""

    program: ClassVar[str] = "diffusion_policy.commands.compare"

    a: tyro.conf.Positional[Path]
    """Folder of an evaluation, or its results.json."""
    b: tyro.conf.Positional[Path]
    """Folder of the other evaluation, or its results.json."""
    output: Path | None = None
    """Folder to write comparison.json and comparison.html into."""
    json: bool = False
    """Print comparison.json instead of sentences."""

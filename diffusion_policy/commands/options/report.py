"""What `diffusion-policy report` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from diffusion_policy.commands.options.acting import anchor
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import ConfigError


@dataclass(frozen=True)
class Report(Command):
    """Make the page of an evaluation again from its results.json and episodes.zarr, without checkpoint and simulator.

    Paths and plans are shown as they were made. Films, demonstrations and other plans that might have been sampled are
    missing: for these delete report.html and run evaluate again, which rolls nothing out. A page that lies there
    already is replaced only where it is of the same evaluation and shows none of these; otherwise choose --output.

    From Python: `Report(Path("runs/demo/evaluation")).run()` returns the path of the page.
    """

    program: ClassVar[str] = "diffusion_policy.commands.report"

    folder: tyro.conf.Positional[Path]
    """Folder of an evaluation."""
    output: Path | None = None
    """File to write, ending in .html, if not report.html in the folder."""

    def __post_init__(self) -> None:
        anchor(self)
        if self.output is not None and self.output.suffix != ".html":
            raise ConfigError(f"output must be a file that ends in .html; got {self.output}")

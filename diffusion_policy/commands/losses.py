"""The losses of a training as its metrics file says them, which anybody may have written.

Knows files. Knows no checkpoint and no figure.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

from diffusion_policy.basics.files import parse_json, read_bytes
from diffusion_policy.commands.afterwards import Remarks

METRICS = "metrics.jsonl"
MOST_METRICS_BYTES = 2**27
"""A larger metrics file is not read."""
MOST_LOSSES = 20_000
"""Points of the curve of losses; of a longer training every n-th line is read."""


def read_losses(checkpoint: Path, remarks: Remarks) -> list[dict[str, Any]]:
    """The losses in the metrics file of a run, or beside a checkpoint in one; lines that say something else are passed
    over. What goes wrong is a remark."""

    def read() -> list[dict[str, Any]]:
        is_run = (checkpoint / METRICS).exists() or not (checkpoint / "config.json").exists()
        path = (checkpoint if is_run else checkpoint.parent) / METRICS
        return parse_losses(read_bytes(path, MOST_METRICS_BYTES)) if path.exists() else []

    return remarks.attempt("the losses of the training are not drawn", read, [])


def parse_losses(content: bytes) -> list[dict[str, Any]]:
    """The lines of a metrics file, at most MOST_LOSSES of them, that give a step and a finite loss."""
    rows = []
    lines = content.splitlines()
    for line in lines[:: math.ceil(len(lines) / MOST_LOSSES) or 1]:
        with contextlib.suppress(ValueError, AttributeError):
            row = parse_json(line)
            numbers = [row.get(name) for name in ("step", "loss", "validation_loss")]
            if all(type(number) in (int, float) and abs(number) < 1e30 for number in numbers if number is not None):
                step, loss, validated = numbers
                if step is not None and loss is not None:
                    rows.append({"step": step, "loss": loss, "validation_loss": validated})
    return rows

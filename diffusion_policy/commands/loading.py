"""`dp.load`: a policy from a folder, be it a checkpoint or an exported one. Imports torch only where it is needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_policy.config import PlanningPrecision
from diffusion_policy.serving import exported
from diffusion_policy.serving.plan_folder import PLAN, ExportedError, is_exported
from diffusion_policy.serving.runtimes import RuntimeName

if TYPE_CHECKING:
    from diffusion_policy.commands.front_door import LoadedPolicy


def load(
    path: str | Path,
    device: str = "auto",
    threads: int | None = None,
    runtime: RuntimeName = "onnxruntime",
    precision: PlanningPrecision = "fp32",
) -> LoadedPolicy | exported.ExportedPolicy:
    """The policy of a run (its newest checkpoint), of one checkpoint, or of a folder that `diffusion-policy export`
    wrote, which needs no torch. `device`: of a checkpoint; `threads`, `runtime` and `precision`: of an exported
    policy, see `serving.exported.load`. Raises CheckpointError or ExportedError, and ValueError for a device that is
    not there."""
    if is_exported(path):
        return exported.load(path, threads, runtime, precision)
    try:
        front_door = importlib.import_module("diffusion_policy.commands.front_door")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ExportedError(f"no {PLAN} in {path}, and a checkpoint cannot be loaded without torch") from error
    return front_door.load_checkpoint(path, device)

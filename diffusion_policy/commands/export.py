"""diffusion-policy export: a policy as ONNX."""

import torch

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands.options.export import Export
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError
from diffusion_policy.control.latency import check_latency
from diffusion_policy.serving import exported
from diffusion_policy.serving.backends import EXTRA, list_missing
from diffusion_policy.serving.plan_folder import PLAN, PlanConfig


def run(options: Export) -> PlanConfig:
    """Export a checkpoint; returns what plan.json says. Raises ValueError for what cannot be exported."""
    return write(options, checkpoint.load(options.checkpoint, torch.device("cpu")))


def write(options: Export, loaded: Checkpoint) -> PlanConfig:
    """Export a loaded checkpoint; raises as `run`."""
    require_exporter()
    from diffusion_policy.serving.export import Exporting, export

    exporting = Exporting(options.batch, options.samples, options.form, options.precision, options.dtype)
    with console.status("exporting"):
        config = export(
            loaded.policy,
            options.output,
            options.sampling,
            exporting,
            control_rate=options.control_rate,
            weights_sha256=loaded.weights_sha256,
            tolerance=options.tolerance,
        )
    size = sum(file.size for file in config.files.values()) / 2**20
    out.print(
        f"{', '.join(config.files)} and {PLAN} in {options.output}: {size:.1f} MB, actions within "
        f"{config.action_error:.2g} of the checkpoint's (share of the action's scale)",
        soft_wrap=True,
    )
    if config.control_rate and config.samples == 1:
        planner = exported.load(options.output).planner
        latency = check_latency(planner, config.control_rate, sampling_steps=config.sampling.sampling_steps)
        out.print(str(latency), soft_wrap=True)
    return config


def require_exporter() -> None:
    """Raise ConfigError where what exports is not installed."""
    missing = list_missing()
    if missing:
        raise ConfigError(f"this needs {', '.join(missing)}: pip install {EXTRA}")

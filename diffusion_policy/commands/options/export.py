"""What `diffusion-policy export` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from diffusion_policy.commands.options.acting import anchor
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import ConfigError, Group, SampleConfig, require_at_least


@dataclass(frozen=True)
class Export(Command):
    """Write a policy as ONNX, to act on a robot without torch: observations and noise in, raw actions out, with
    normalizer and sampling loop inside.

    What is written is run first: its actions are compared with those of the checkpoint from the same noise, and it is
    refused above --tolerance. `dp.load(OUTPUT).controller()` steers a robot with it, by onnxruntime and numpy alone.

    From Python: `dp.load("runs/demo/policy").export("exported", sampling_steps=8)`.
    """

    program: ClassVar[str] = "diffusion_policy.commands.export"

    checkpoint: Path
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    output: Path
    """Folder to create."""
    batch: Annotated[int, Group("graph")] = 1
    """Observations in one call, as for so many robots at once; shapes in the graph are fixed."""
    samples: int = 1
    """Action sequences drawn for each observation; a controller follows one."""
    form: Literal["loop", "network"] = "loop"
    """What is written: one graph from observations to actions, with the sampling loop inside (loop); or three graphs,
    observe, denoise and act, and a table by which the caller runs the loop, for runtimes that have none (network)."""
    precision: Literal["fp32", "int8"] = "fp32"
    """Numbers of the network's products: fp32, or int8, whose error is measured and written into plan.json."""
    dtype: Literal["float64", "float32"] = "float64"
    """Numbers of observations and actions; TensorRT needs float32."""
    tolerance: float | None = None
    """Largest difference of an action to that of the checkpoint, as a share of the normalizer's scale; by default 1e-4
    for fp32 and 0.1 for int8."""
    control_rate: float | None = None
    """Control steps of the robot in a second [1/s], kept in plan.json; with it is said whether a plan fits."""
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        anchor(self)
        require_at_least(self, 1, ("batch", "samples"))
        for name in ("tolerance", "control_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name.replace('_', '-')} must be above 0; got {value}")

"""What `diffusion-policy forecast` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from diffusion_policy.commands.options.acting import anchor
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import (
    ConfigError,
    CostConfig,
    Group,
    SampleConfig,
    require_at_least,
    require_labels,
    require_seed,
)

MOST_SAMPLES = 10_000
"""Of one episode."""
MOST_SHOWN = 50
"""All of them lie in one page."""


@dataclass(frozen=True)
class Forecast(Command):
    """Forecast what comes in recorded episodes, and judge it: distances, misses, collisions, and whether each mode is
    as likely as it should be.

    The policy is one whose action is the positions of all agents, `train --target position`, where position holds x and
    y of one agent after the other. Samples are drawn at one step of each episode. Of the dataset that a policy was
    trained on, only the held-out episodes are forecast. Beside it stand a forecast of constant velocity and other
    checkpoints, and with --cost the same policy led by costs. results.json and a page, forecast.html, go into a new
    folder.

    From Python: `dp.forecast("runs/scenes", "scenes.zarr", "runs/forecast", samples=100)` returns what results.json
    holds.
    """

    program: ClassVar[str] = "diffusion_policy.commands.forecast"

    checkpoint: Path
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    dataset: str
    """Recorded episodes: a path or URL."""
    output: Path
    """Folder to create."""
    beside: tuple[Path, ...] = ()
    """Checkpoints of other policies that forecast the same, such as one of the objective regression."""
    now: Annotated[int | None, Group("forecast")] = None
    """Last step, from 0, that is observed in each episode; by default the first one at which a policy has seen all the
    steps that it observes."""
    samples: int = 20
    """Futures that are drawn for each episode. With many, as 200, shares of modes are told from chance."""
    episodes: int | None = None
    """Episodes to forecast, the first ones; by default all."""
    seed: int = 0
    """Seed of the noise of sampling."""
    miss_distance: Annotated[float, Group("judging")] = 2.0
    """A forecast that ends farther than this from where the agents end, on average over them, misses; in the unit of
    the dataset."""
    collision_distance: float = 1.0
    """Agents whose positions come nearer to each other than this collide."""
    mode_function: str | None = None
    """Function, as module:function, that gives the mode of a trajectory from {action key: (steps, columns)}, its
    observed steps and those that follow; by default that of the environment that the dataset names, where it is
    ours."""
    mode_labels: tuple[str, ...] = ()
    """All labels that the mode function can give."""
    shown: Annotated[int, Group("")] = 6
    """Episodes whose samples the page shows."""
    device: str = "auto"
    """Device to compute on: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)
    costs: Annotated[CostConfig, Group("costs")] = field(default_factory=CostConfig)
    """A second row of the checkpoint's, led by these costs, beside the one without."""

    def __post_init__(self) -> None:
        anchor(self)
        require_at_least(self, 1, ("samples",))
        require_at_least(self, 0, ("shown",))
        require_seed(self)
        for name, most in (("samples", MOST_SAMPLES), ("shown", MOST_SHOWN)):
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be at most {most}; got {getattr(self, name)}")
        for name, least in (("now", 1), ("episodes", 1)):
            if getattr(self, name) is not None:
                require_at_least(self, least, (name,))
        for name in ("miss_distance", "collision_distance"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name.replace('_', '-')} must be above 0; got {getattr(self, name)}")
        require_labels(self.mode_labels)
        if bool(self.mode_function) != bool(self.mode_labels):
            raise ConfigError("give all modes of --mode-function with --mode-labels, and these with it")

"""What `diffusion-policy toy` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import PredictionName, StudentName, require_seed


@dataclass(frozen=True)
class Toy(Command):
    """Train a small network on a toy problem, within a minute; write results.json and toy.png.

    ring: a circle; mixture: two modes of weights 0.3 and 0.7 on a line, also with too little noise and fewer levels;
    moons: two half circles; two-class: overlapping classes, with guidance.
    """

    program: ClassVar[str] = "diffusion_policy.commands.toy"

    problem: tyro.conf.Positional[Literal["ring", "mixture", "moons", "two-class"]]
    """Toy problem to learn."""
    output: Path
    """Folder for results.json and toy.png."""
    prediction: PredictionName = "noise"
    """What the network predicts."""
    student: StudentName | None = None
    """Have students learn from it in this way too, to be sampled in 1, 2 and 4 steps."""
    seed: int = 0
    """Seed of the weights, the points and the noise."""

    def __post_init__(self) -> None:
        require_seed(self)

"""What `diffusion-policy study` can be told."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import tyro

from diffusion_policy.commands.options.acting import FIRST_TEST_SEED, ActingCommand, anchor, require_episodes
from diffusion_policy.config import (
    ChunkingConfig,
    ConfigError,
    Group,
    SampleConfig,
    SamplerName,
    require_at_least,
    require_seed,
)

ROLLED = "+roll"
"""Behind the name of a strategy: its observation is rolled forward."""

StudyName = Literal["samplers", "chunking", "networks", "students", "instructions", "plans"]


@dataclass(frozen=True)
class Study(ActingCommand):
    """Roll policies out on the same seeds, and compare success, mode entropy and the milliseconds of a plan.

    samplers: one checkpoint under each sampler at several numbers of steps; samplers.png. chunking: under each way to
    join plans, against the control steps that planning takes, with commitment and jerk too; chunking.html. networks:
    the checkpoint and others --beside it, such as other networks, objectives and training seeds, with parameters and
    training time; networks.html. students: the same, with the checkpoint as the teacher, in few steps too, and how
    often a student comes to its mode; students.html. instructions: what a policy that was trained with
    --condition-on-instruction does when it is told each instruction, and whether that was asked; instructions.html.
    plans: what the plans of a planner are worth before they are executed, in an environment that can judge them, and
    executed to their end and planned again; with --cost plain ones, led ones, and the best of several; plans.png. All
    print a table and keep what is done in results.json at every moment. Episodes that could not be run are counted;
    where none could be run, it says why, and the study goes on.
    """

    program: ClassVar[str] = "diffusion_policy.commands.study"

    output: Path
    """Folder of this study."""
    what: tyro.conf.Positional[StudyName] = field(kw_only=True)
    """What the study varies."""
    beside: tuple[Path, ...] = ()
    """With networks and students: checkpoints of other policies for the same environment. Those that differ in their
    training seed alone are one row."""
    delay_steps: Annotated[tuple[int, ...], Group("control")] = (0, 2, 4, 6)
    """With chunking: control steps that planning takes, while the plan before runs on."""
    strategies: tuple[str, ...] = ()
    """With chunking: ways to join plans, as --chunking names them; with +roll, as in rtc+roll, plans are made from what
    will be observed when they are ready. By default all that the policy and the environment can do."""
    action_noise: float = 0.0
    """With chunking: standard deviation of the noise on each executed action, as a share of its length."""
    samplers: Annotated[tuple[SamplerName, ...], Group("sampling")] = get_args(SamplerName)
    """Samplers to try; by default all."""
    steps: tuple[int, ...] = ()
    """Numbers of sampling steps to try; by default 1, 2, 4, 8, 16, 32 and all noise levels that a sampler can use; with
    students, of the teacher beside its usual ones, 1, 2 and 4."""
    mode: str | None = None
    """Steer a policy that was trained with --condition-on-mode to this mode."""
    instruction: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """With instructions: what the policy is told, by default each instruction that it was trained on; can be said
    several times. As MODE=text it says which mode a text asks for that no demonstration has. With the other studies, at
    most one."""
    guidance: float = 0.0
    """Weight of classifier-free guidance, as in evaluate."""
    guidances: tuple[float, ...] = ()
    """With instructions: weights of guidance, side by side; by default 0, and 1 and 3 for a policy that was trained
    with --condition-dropout."""
    plan_samples: int = 64
    """With plans: plans that are sampled for each seed and judged."""
    episodes: Annotated[int, Group("episode")] = 100
    """Episodes for each sampler and number of steps, the same seeds each time."""
    seed: int = FIRST_TEST_SEED
    """Seed of the first episode; seeds of the demonstrations are refused."""

    def __post_init__(self) -> None:
        anchor(self)
        require_at_least(self, 1, ("episodes", "workers", "plan_samples"))
        require_seed(self)
        require_episodes(self.episodes)
        require_at_least(self, 0, ("action_noise",))
        if not self.delay_steps or min(self.delay_steps) < 0 or len(set(self.delay_steps)) < len(self.delay_steps):
            raise ConfigError(f"delay-steps must be different numbers from 0 on; got {self.delay_steps}")
        for name in self.strategies:
            self.strategy(name)
        if self.chunking.chunking != "receding" and self.what == "chunking":
            raise ConfigError("study chunking tries several; name them with --strategies instead of --chunking")
        if self.steps and self.what == "networks":
            raise ConfigError("study networks takes each policy in its own steps; --steps is for the other studies")
        if self.beside and self.what in ("samplers", "chunking"):
            raise ConfigError(f"study {self.what} is of one checkpoint; --beside is for networks and students")
        self._check_instructions()
        if not self.samplers:
            raise ConfigError(f"name at least one of the samplers {', '.join(get_args(SamplerName))}")
        for name in self.samplers:
            for steps in self.steps or (1,):
                self.sampling(name, steps)

    def _check_instructions(self) -> None:
        """Raise ConfigError for instructions and weights that this study does not take."""
        if self.what == "instructions" and (self.guidance or self.mode):
            raise ConfigError("study instructions takes its weights from --guidances, and steers to no --mode")
        if self.what != "instructions" and (self.guidances or len(self.instruction) > 1):
            raise ConfigError(f"study {self.what} tells a policy one --instruction, under one --guidance")
        if len(set(self.guidances)) < len(self.guidances):
            raise ConfigError(f"guidances must be different numbers; got {self.guidances}")
        for weight in self.guidances:
            SampleConfig(guidance=weight)

    @property
    def texts(self) -> dict[str, str | None]:
        """What the policy is told, and the mode that each text asks for, where that is said."""
        texts = {}
        for said in self.instruction:
            mode, equals, text = said.partition("=")
            texts[text if equals else said] = mode if equals else None
        return texts

    @property
    def seeds(self) -> range:
        """Those of the episodes, for each sampler and number of steps."""
        return range(self.seed, self.seed + self.episodes)

    @property
    def sample_config(self) -> SampleConfig:
        """How plans are sampled while chunking is studied: the first of samplers and steps."""
        return self.sampling(self.samplers[0], self.steps[0] if self.steps else None)

    def strategy(self, name: str) -> ChunkingConfig:
        """What a strategy of this name is; raises ConfigError where there is none."""
        base, _, rolled = name.partition(ROLLED[0])
        if name not in (base, base + ROLLED):
            raise ConfigError(f"a strategy is named as --chunking does, or with {ROLLED} behind it; got {name!r}")
        config = replace(self.chunking, chunking=base, roll_forward=bool(rolled))  # pyright: ignore[reportArgumentType]
        return (
            replace(config, score=None)
            if base == "bid"
            else replace(config, plans=None, weak_checkpoint=None, score=None)
        )

    def sampling(self, name: SamplerName, steps: int | None) -> SampleConfig:
        """How one sampler draws at one number of steps; raises ConfigError where it cannot."""
        told = next(iter(self.texts), None) if self.what != "instructions" else None
        return SampleConfig(name, steps, mode=self.mode, guidance=self.guidance, instruction=told)

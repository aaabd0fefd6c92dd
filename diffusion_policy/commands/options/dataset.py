"""What `diffusion-policy dataset` can be told: a class for each of its verbs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from diffusion_policy.commands.options.acting import parse_env_kwargs, require_video
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import ConfigError, Group, SuccessAndModes, parse_source, require_at_least, require_seed
from diffusion_policy.evaluation.engines import available_cores

FormatName = Literal["zarr", "robomimic", "lerobot", "minari", "npz", "aloha", "maniskill", "d4rl", "lerobot-video"]
Store = tyro.conf.Positional[str]


@dataclass(frozen=True)
class Inspect(Command):
    """What is in a dataset: keys, shapes, ranges, lengths, modes, compression. Of images: the mean of each channel, and
    the shares of frames that show nothing and that repeat the one before."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.inspect"

    store: Store
    """Path or URL of the dataset."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class Validate(Command):
    """Every problem of a dataset, with episode and row. Exit status 1 when there is one. Among images: frames of one
    colour, cameras that froze while the state moved, channels that come first, values that no image has."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.validate"

    store: Store
    """Path or URL of the dataset."""
    json: bool = False
    """Print JSON, a list of findings."""


@dataclass(frozen=True)
class Convert(Command):
    """Copy a dataset into another format: zarr (and .zarr.zip), robomimic HDF5, LeRobot v3, Minari, npz. HDF5 of ALOHA
    and ACT (a folder of episodes), of ManiSkill, and flat as of D4RL is only read. Images of bytes go to LeRobot as
    PNG, which is exact, or as H.264 videos, which are smaller: with --output-format lerobot-video."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.convert"

    store: Store
    """Dataset to copy, of any of these formats; a zarr store may be a URL."""
    output: tyro.conf.Positional[Path]
    """Where the copy goes: NAME.zarr, .zarr.zip, .hdf5, .lerobot, .minari or .npz."""
    source_format: FormatName | None = None
    """Format of the dataset, if it cannot be told from its content."""
    output_format: FormatName | None = None
    """Format of the copy, if its name does not say."""
    observation: tuple[str, ...] = ()
    """Arrays that are observed; nothing else is copied but the action. By default everything is copied that can be, and
    what the dataset names is observed."""
    action: tuple[str, ...] = ()
    """Array that is the action; by default the one that the dataset names. The columns of several are joined into an
    action of their own."""
    angles: tuple[str, ...] = ()
    """Columns that the copy declares as angles [rad], as state:4."""


@dataclass(frozen=True)
class Instruct(Command):
    """Give the episodes of a dataset instructions, texts that say what is to be done, in a copy. A policy that is
    trained with --condition-on-instruction is then told by such a text what to do."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.instruct"

    store: Store
    """Dataset to copy, of any format that convert reads."""
    output: Path
    """Store to create."""
    instruction: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The instruction of the episodes of one mode, as MODE=text, or, as text alone, of all other episodes; can be said
    several times. Episodes without one keep the instruction that they have."""
    instruction_encoder: str | None = None
    """Function, as module:function, that makes a row of numbers of a text, such as a sentence encoder. The store keeps
    what it gives for each instruction, so that a policy that learns from it needs no encoder for these. The module may
    lie in the working directory."""

    def __post_init__(self) -> None:
        if not self.instruction and self.instruction_encoder is None:
            raise ConfigError(
                "dataset instruct needs an --instruction, or an --instruction-encoder for those there are"
            )


@dataclass(frozen=True)
class AddGoals(Command):
    """Give each episode of a dataset the goal that it came to, in a copy: a new observation, the same at all its steps.
    A policy that is trained with --goal, and with --hindsight, then comes to goals of your choice."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.goals"

    store: Store
    """Dataset to copy, of any format that convert reads."""
    output: Path
    """Store to create."""
    goal: tuple[str, ...]
    """Each goal, and the observation or the columns of one that it is of at the end of an episode, as goal=state or
    goal=state:2,3,4."""

    def __post_init__(self) -> None:
        for text in self.goal:
            parse_source(text)


@dataclass(frozen=True)
class Merge(Command):
    """Join stores into a new one, one after the other: those of several collectors, of recorded rollouts too."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.merge"

    stores: tyro.conf.Positional[tuple[str, ...]]
    """Stores to join. They have the same keys, environment and rate; a type of numbers is the widest of all."""
    output: Path
    """Store to create."""


@dataclass(frozen=True)
class Split(Command):
    """Cut a store into two new ones, by episode, at random."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.split"

    store: Store
    """Path or URL of the dataset."""
    output: tuple[Path, Path]
    """The two stores to create."""
    share: float = 0.9
    """Share of the episodes that goes into the first."""
    seed: int = 0
    """Seed of the choice."""

    def __post_init__(self) -> None:
        require_seed(self)
        if not 0 < self.share < 1:
            raise ConfigError(f"share must be above 0 and below 1; got {self.share}")


@dataclass(frozen=True)
class Repair(Command):
    """Mend what validate names, where it can be mended in place: rows behind the last complete episode, episodes
    without rows, a stale consolidated copy of the metadata, files of killed writers. No episode is touched. Exit status
    1 where a problem stays."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.repair"

    store: tyro.conf.Positional[Path]
    """Store to mend, in place; nothing else may be writing to it."""


@dataclass(frozen=True)
class Plot(Command):
    """Pictures of a dataset: trajectories.png by mode, actions.png, lengths.png, and of images frames_KEY.png, a
    contact sheet of some episodes."""

    program: ClassVar[str] = "diffusion_policy.commands.dataset.plot"

    store: Store
    """Path or URL of the dataset."""
    output: Path
    """Folder for the pictures."""
    plane: str | None = None
    """Two columns of a key to draw trajectories in, as state:0,1; by default what the environment says, else the first
    two of the first observation."""
    action: tuple[str, ...] = ()
    """Key of the actions, or several, whose columns stand side by side; by default the one that the store names, else
    action."""


@dataclass(frozen=True)
class Replay(Command):
    """Take the recorded actions again, from the recorded seeds, and compare what is observed with what was recorded;
    film it if asked. Exit status 1 when the two differ.

    Where the demonstrations were collected under noise on the executed action, the same noise is drawn again. Where a
    person pushed a body (in a store of `live`, whose column pushed says so), an episode is replayed up to there.
    """

    program: ClassVar[str] = "diffusion_policy.commands.dataset.replay"

    store: Store
    """Path or URL of the dataset."""
    episodes: Annotated[int | None, Group("episode")] = None
    """Replay only so many episodes, the first ones; a video shows 4 unless this says otherwise."""
    video: Annotated[Path | None, Group("")] = None
    """Film the episodes side by side into this .mp4 or .gif."""
    tolerance: float = 1e-4
    """Largest difference of an observation from its record, in its own units."""
    env: Annotated[str | None, Group("environment")] = None
    """Gymnasium id, if not the environment that the store names."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON, if not those that the store names."""
    image_size: int | None = None
    """Compare the image of this width and height [px] too, of an environment that the store does not name with one."""
    signals: Annotated[SuccessAndModes, Group("environment")] = field(default_factory=SuccessAndModes)

    def __post_init__(self) -> None:
        if self.episodes is not None:
            require_at_least(self, 1, ("episodes",))
        require_at_least(self, 0, ("tolerance",))
        require_video(self.video, self.episodes or 4)


@dataclass(frozen=True)
class Render(Command):
    """Add camera images to demonstrations that hold states: a new store with the same episodes and images beside them.

    Push-T is drawn from each recorded state. In other environments each episode is begun again from its seed and its
    actions are taken again, as `dataset replay` does. Where what is observed then differs from what was recorded, the
    episode is left out, which is said.
    """

    program: ClassVar[str] = "diffusion_policy.commands.dataset.render"

    store: Store
    """Path or URL of the dataset."""
    output: Path
    """Store to create."""
    key: tuple[str, ...] = ("image",)
    """Images to add: image, and for the arms wrist_image. For environments other than ours any one name; that is the
    picture that the environment's render draws."""
    size: int = 96
    """Width and height of the images [px]."""
    tolerance: float = 1e-4
    """Largest difference of a replayed observation from its record, in its own units."""
    env: Annotated[str | None, Group("environment")] = None
    """Gymnasium id, if not the environment that the store names."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON, if not those that the store names."""
    signals: Annotated[SuccessAndModes, Group("environment")] = field(default_factory=SuccessAndModes)
    workers: Annotated[int, Group("simulation")] = field(default_factory=available_cores)
    """Processes that draw; the result is the same for any number."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("size", "workers"))
        require_at_least(self, 0, ("tolerance",))
        if not self.key or len(set(self.key)) < len(self.key):
            raise ConfigError(f"key must name each image to add once; got {' '.join(self.key) or 'nothing'}")
        if self.env_kwargs is not None:
            parse_env_kwargs(self.env_kwargs)


OF_DATASETS: dict[str, type[Command]] = {
    "inspect": Inspect,
    "validate": Validate,
    "convert": Convert,
    "instruct": Instruct,
    "goals": AddGoals,
    "merge": Merge,
    "split": Split,
    "repair": Repair,
    "plot": Plot,
    "replay": Replay,
    "render": Render,
}
"""The verbs behind `dataset`."""

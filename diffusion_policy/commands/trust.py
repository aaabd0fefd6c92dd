"""What a file of somebody else names is not followed: modules are not imported, and URLs are not opened, until the user
names them too.

Knows texts only, so that options can be read without torch, a store or a simulator.
"""

from collections.abc import Iterable, Sequence

from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError

OUR_EXAMPLES = "diffusion_policy.envs.examples"
"""The one module that a dataset or a checkpoint may name, and have imported."""


def refuse_modules(source: object, names: Iterable[str | None], flags: Sequence[str]) -> None:
    """Raise ConfigError where a name that only a file gives, `module:something`, would have a module imported that is
    not ours; `flags` are those by which the user can give it."""
    foreign = {name.partition(":")[0] for name in names if name and ":" in name} - {OUR_EXAMPLES}
    if foreign:
        raise ConfigError(
            f"{source} names its environment by the module {min(foreign)}, which would be imported; if you trust it, "
            f"give it yourself: {' '.join(flags)}"
        )


def recorded_location(source: object, location: str) -> str:
    """Where a checkpoint or a run (`source`) says that its dataset lies, which is told. Raises ConfigError for a URL:
    what only a stranger's file names is fetched from nowhere."""
    if "://" in location or "::" in location:
        raise ConfigError(
            f"{source} names its dataset by the URL {location[:200]!r}, which would be opened; if you trust it, give "
            "it yourself with --dataset"
        )
    console.print(f"the dataset is {location}, as {source} says", soft_wrap=True)
    return location

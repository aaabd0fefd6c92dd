"""diffusion-policy dataset merge: several stores as one."""

from diffusion_policy.commands.options.dataset import Merge
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.combine import merge


def run(options: Merge) -> int:
    """Join; returns the number of episodes."""
    if len(options.stores) < 2:
        raise ConfigError(f"merge joins at least two stores; got {len(options.stores)}")
    for location in options.stores:
        open_store(location)  # says what is not read
    with console.status("joining"):
        merged = merge(options.stores, options.output)
    for remark in merged.remarks:
        console.print(remark)
    console.print(f"{merged.episodes} episodes in {options.output}")
    return merged.episodes

"""diffusion-policy dataset split: one store as two."""

from diffusion_policy.commands.options.dataset import Split
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import console
from diffusion_policy.datasets.combine import split


def run(options: Split) -> tuple[int, int]:
    """Cut; returns the numbers of episodes."""
    open_store(options.store)  # says what is not read
    with console.status("cutting"):
        counts = split(options.store, options.output, options.share, options.seed)
    for path, count in zip(options.output, counts, strict=True):
        console.print(f"{count} episodes in {path}")
    return counts

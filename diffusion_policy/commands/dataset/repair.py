"""diffusion-policy dataset repair: what validate names, mended in place."""

from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.options.dataset import Repair
from diffusion_policy.commands.terminal import console
from diffusion_policy.datasets.repair import Repaired, repair
from diffusion_policy.datasets.store import EpisodeStore


def run(options: Repair) -> Repaired:
    """Mend; returns what was done and what is left; raises Failed when that is serious."""
    repaired = repair(options.store)
    for sentence in repaired.mended or ("nothing to mend",):
        console.print(sentence)
    console.print(f"{len(EpisodeStore.open(options.store).episode_ends)} episodes in {options.store}")
    for finding in repaired.left:
        console.print(f"not mended: {finding.path}: {finding.what}")
    if repaired.left:
        count = f"{len(repaired.left)} problem{'s' if len(repaired.left) > 1 else ''}"
        raise Failed(f"{options.store}: {count} cannot be mended in place; copy what is sound with: dataset convert")
    return repaired

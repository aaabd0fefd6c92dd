"""What a training of a policy that sees begins with: published weights of its image encoders, and, where they stay
frozen, what they make of all images, once.

Knows checkpoints' files and policies. Writes nothing.
"""

from pathlib import Path

import torch

from diffusion_policy.checkpoints.safe_files import describe, read_tensors
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError, TrainConfig
from diffusion_policy.datasets.streaming import StreamedWindows
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.networks.vision import load_trunk
from diffusion_policy.policy import DiffusionPolicy

TOGETHER = 256
"""Images in one call of a frozen encoder."""


def begin(policy: DiffusionPolicy, config: TrainConfig) -> None:
    """Give the image encoders of a new policy the weights that its options name, and freeze them where they say so.
    Raises ConfigError where no image is observed, CheckpointError for a file that cannot be read, ValueError for
    weights that do not fit."""
    if config.vision_weights is None and not config.freeze_vision:
        return
    if not policy.images:
        asked = "vision-weights" if config.vision_weights else "freeze-vision"
        raise ConfigError(f"--{asked} is for policies that observe images; this one observes {', '.join(policy.keys)}")
    if config.vision_weights is None and config.distillation.teacher is None:
        raise ConfigError("--freeze-vision keeps the weights of --vision-weights, or a teacher's; got neither")
    trunks = {id(trunk): trunk for trunk in (policy.encoder_of(key).backbone.trunk for key in policy.images)}
    if config.vision_weights is not None:
        path = Path(config.vision_weights)
        weights = read_tensors(path, describe(path))
        lacking = {name for trunk in trunks.values() for name in load_trunk(trunk, weights, str(path))}
        if lacking:
            console.print(
                f"{path} has no weights of our norms: {len(lacking)} tensors begin as in a new network", soft_wrap=True
            )
    if config.freeze_vision:
        for trunk in trunks.values():
            trunk.requires_grad_(False)


def cache(windows: Windows | StreamedWindows, policy: DiffusionPolicy, config: TrainConfig) -> Windows:
    """Windows in which the images are what the frozen encoders make of them. Raises ConfigError where that does not fit
    the memory."""
    if not isinstance(windows, Windows):
        raise ConfigError(
            "freeze-vision keeps what the encoders make of all images in memory, which these windows do not fit; "
            f"raise memory-gb above {config.memory_gb:g}"
        )
    for key in policy.images:
        one = policy.maps_of(key, windows.gather([0]).observations[key])[0, 0]
        needed = windows.held_rows * one.numel() * one.element_size()
        if needed > config.memory_gb * 1e9:
            raise ConfigError(
                f"freeze-vision keeps {needed / 1e9:.1f} GB of what the encoder makes of {key}; memory-gb is "
                f"{config.memory_gb:g}"
            )
        windows = windows.with_rows(key, lambda images, key=key: _encode(policy, key, images))
    return windows


@torch.no_grad()
def _encode(policy: DiffusionPolicy, key: str, images: torch.Tensor) -> torch.Tensor:
    """Images (rows, H, W, C), wherever they are → maps (rows, *maps), there."""
    parts = (policy.maps_of(key, part[:, None].to(policy.device))[:, 0] for part in images.split(TOGETHER))
    return torch.cat([part.to(images.device) for part in parts])

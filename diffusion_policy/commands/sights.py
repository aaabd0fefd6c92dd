"""What a policy sees of an image: the middle that its encoder is given, and where its spatial softmax looks there.

Knows policies, and episodes that hold their images. Makes no environment and samples nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch

from diffusion_policy.basics.images import as_observed
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.networks.vision import center_crop
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.report.evaluation_figures import Sight


def list_sights(policy: DiffusionPolicy, episode: Episode, steps: Sequence[int]) -> list[Sight]:
    """The images that a policy was given at some steps of an episode, which holds them, camera by camera."""
    sights = []
    for key in policy.images:
        images = as_observed(episode.observations[key][list(steps)], key, policy.shapes.observations[key])
        places = find_keypoints(policy, key, images)
        cropped = center_crop(torch.as_tensor(images), policy.config.images.image_crop).numpy()
        for i, step in enumerate(steps):
            sights.append(Sight(episode.seed, key, step, cropped[i], None if places is None else places[i]))
    return sights


@torch.no_grad()
def find_keypoints(policy: DiffusionPolicy, key: str, images: np.ndarray) -> np.ndarray | None:
    """Where the spatial softmax of a camera's encoder looks in whole images (N, H, W, C) uint8: columns and rows of the
    crop, (N, K, 2) [px]; None where the encoder has none."""
    cropped = policy.prepare(key, torch.as_tensor(images)[:, None].to(policy.device))  # (N, 1, h, w, C)
    points = policy.encoder_of(key).keypoints(cropped)
    if points is None:
        return None
    return (points[:, 0].cpu().numpy() + 1) / 2 * (np.array(cropped.shape[3:1:-1]) - 1)

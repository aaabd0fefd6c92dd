"""The images of a live session from which the policy made its last plan, small enough to be sent with a frame.

Knows policies and what they observe. Knows no simulator and no page.
"""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion_policy.basics.images import as_observed
from diffusion_policy.commands.sights import find_keypoints
from diffusion_policy.networks.vision import center_window
from diffusion_policy.policy import DiffusionPolicy

MOST_CAMERAS = 6
"""That are shown, the first ones."""
MOST_SIDE = 192
"""Of an image as it is sent; a larger one is made smaller [px]."""
JPEG_QUALITY = 90


class LiveSight(NamedTuple):
    """An image that the policy planned from."""

    key: str
    """The camera."""
    step: int
    """Of the episode."""
    crop: list[float]
    """What the encoder was given of it: left, top, width and height, in shares of the image's."""
    keypoints: list[list[float]]
    """Where the spatial softmax looks, to the right and down, in the same shares, (K, 2); empty where there is none."""
    jpeg: bytes
    """The whole image."""

    def tell(self) -> dict[str, Any]:
        """What the page is told of it beside the image, whose length in bytes it holds."""
        return self._asdict() | {"jpeg": len(self.jpeg)}


def see(policy: DiffusionPolicy, observation: Mapping[str, np.ndarray], step: int) -> tuple[LiveSight, ...]:
    """What a policy sees of an observation, camera by camera; nothing where it observes no images."""
    return tuple(_see_one(policy, key, observation[key], step) for key in policy.images[:MOST_CAMERAS])


def _see_one(policy: DiffusionPolicy, key: str, observed: np.ndarray, step: int) -> LiveSight:
    image = as_observed(observed, key, policy.shapes.observations[key])
    points = find_keypoints(policy, key, image[None])
    top, left, height, width = center_window(image.shape[:2], policy.config.images.image_crop)
    size = np.array(image.shape[1::-1])  # width and height
    crop = np.array([[left, top], [width, height]]) / size
    places = np.empty((0, 2)) if points is None else (points[0] + [left, top] + 0.5) / size  # a pixel's middle
    return LiveSight(key, step, crop.ravel().round(4).tolist(), places.round(4).tolist(), _as_jpeg(image))


def _as_jpeg(image: np.ndarray) -> bytes:
    """An image (H, W, C) uint8 as the content of a small JPEG; of four channels the first three."""
    small, out = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image[..., :3]), io.BytesIO()
    small.thumbnail((MOST_SIDE, MOST_SIDE))
    small.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()

"""Cameras of the simulated tasks: what image is observed beside the state, how large it is, and what draws it.

Images are squares (size, size, 3) uint8, and the same for the same seed in any process. Knows arms and arguments of
environments. Knows no task.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.images import LEAST_SIDE
from diffusion_policy.envs.robots import Arm
from diffusion_policy.envs.simulation import RENDERERS, Mount, Renderer, Simulation, Viewpoint

IMAGE, WRIST_IMAGE = "image", "wrist_image"
"""Keys of what the cameras see: the whole workspace; the tool, from the wrist."""
MOST_SIDE = 512
"""[px]"""

Cameras = Mapping[str, Callable[[], np.ndarray]]
"""By key what gives an image (size, size, 3) uint8 of the present state."""


class ImageOptions(NamedTuple):
    """What the arguments of an environment with an arm say of its images."""

    size: int = 0
    """`image_size`: width and height of `image` [px]; 0: no image."""
    wrist: bool = False
    """`wrist_image`: whether `wrist_image` is observed too."""
    renderer: Renderer = "tiny"
    """`image_renderer`: what draws them."""

    @classmethod
    def checked(cls, size: int | None, wrist: bool = False, renderer: str = "tiny") -> "ImageOptions":
        """Raises ValueError for arguments that cannot be."""
        size = require_image_size(size)
        if renderer not in RENDERERS:
            raise ValueError(f"unknown image_renderer {renderer!r}; choose from {', '.join(RENDERERS)}")
        for name, given in (("wrist_image", wrist), ("image_renderer", renderer != "tiny")):
            if given and not size:
                raise ValueError(f"{name} needs an image_size of {LEAST_SIDE} to {MOST_SIDE}; got 0")
        return cls(size, bool(wrist), "egl" if renderer == "egl" else "tiny")


def require_image_size(size: int | None) -> int:
    """The width and height of images [px], 0 where there shall be none; raises ValueError for a size that cannot
    be."""
    if size is None or (_is_whole(size) and size == 0):
        return 0
    if not (_is_whole(size) and LEAST_SIDE <= size <= MOST_SIDE):
        raise ValueError(f"image_size must be a whole number of {LEAST_SIDE} to {MOST_SIDE}, or 0; got {size!r:.60}")
    return int(size)


def _is_whole(size: Any) -> bool:
    return isinstance(size, int | np.integer) and not isinstance(size, bool)


def arm_cameras(simulation: Simulation, arm: Arm, view: Viewpoint, mount: Mount, images: ImageOptions) -> Cameras:
    """The cameras of a task with an arm: one that stands, and one on the wrist."""
    if not images.size:
        return {}
    cameras = {IMAGE: lambda: simulation.photograph(view, images.size)}
    if images.wrist:
        cameras[WRIST_IMAGE] = lambda: simulation.photograph(arm.mounted(mount), images.size)
    return cameras

"""Cameras of the simulated tasks: where they stand, how large their images are, and what draws them.

Images are squares (size, size, 3) uint8, and the same for the same seed in any process. Knows arguments of
environments. Knows no simulator and no task.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from diffusion_policy.basics.images import LEAST_SIDE

IMAGE, WRIST_IMAGE = "image", "wrist_image"
"""Keys of what the cameras see: the whole workspace; the tool, from the wrist."""
MOST_SIDE = 512
"""[px]"""

Renderer = Literal["tiny", "egl"]
RENDERERS: tuple[Renderer, ...] = get_args(Renderer)
"""What draws images: PyBullet's TinyRenderer, on the CPU; its OpenGL renderer without a window, where there is EGL."""


class Viewpoint(NamedTuple):
    """Where the scene is seen from, and the size of its picture."""

    target: tuple[float, float, float]
    """Point looked at [m]."""
    distance: float
    """From the target to the eye [m]."""
    yaw: float
    """Around the vertical axis [degrees]."""
    pitch: float
    """Above (negative: looking down) the horizon [degrees]."""
    width: int = 480
    """[px]"""
    height: int = 384
    """[px]"""
    field: float = 45.0
    """Of view, from the lower to the upper edge [degrees]."""


class Mount(NamedTuple):
    """How a camera sits on a link, in the link's own frame."""

    eye: tuple[float, float, float]
    """[m]"""
    target: tuple[float, float, float]
    """Point looked at [m]."""
    up: tuple[float, float, float]
    """Direction that is up in the picture."""
    field: float
    """Of view [degrees]."""


class Mounted(NamedTuple):
    """A camera on a link of a body."""

    body: str
    link: int
    mount: Mount


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

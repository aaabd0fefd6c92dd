"""What is an image among the arrays of observations: rows (height, width, channels), as cameras give them; uint8 from
where they come in on.

Knows arrays. Knows no encoder and no file.
"""

from typing import Any

import numpy as np

CHANNELS = (1, 3, 4)
"""Grey, colour, colour and depth or opacity."""
LEAST_SIDE = 8
"""[px]"""


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether one step of a key with this shape is an image, (height, width, channels)."""
    return len(shape) == 3 and shape[2] in CHANNELS and min(shape[:2]) >= LEAST_SIDE


def as_uint8(images: np.ndarray, key: str) -> np.ndarray:
    """Images of any type (..., H, W, C) as uint8. Floats are shares of the full brightness, from 0 to 1, unless some
    are above 1: then they are from 0 to 255. Raises ValueError, which names the key, for numbers that are neither."""
    if images.dtype == np.uint8 or images.size == 0:
        return images.astype(np.uint8, copy=False)
    low, high = images.min(), images.max()
    if not (images.dtype.kind in "biuf" and low >= 0 and high <= 255):  # NaN is neither
        raise ValueError(
            f"{key} must hold images of uint8, or floats from 0 to 1 or from 0 to 255; got {images.dtype} from {low:g} "
            f"to {high:g}"
        )
    scale = 255 if images.dtype.kind == "f" and high <= 1 else 1
    return np.rint(images * scale).astype(np.uint8)


def observed_type(shape: tuple[int, ...]) -> type:
    """The type in which observations of this shape at one step are planned from: uint8 of images, else float64."""
    return np.uint8 if is_image(shape) else np.float64


def as_observed(values: Any, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """An observation, of one step or of several, as it is planned from; `shape`: that of one step. Raises ValueError
    for images that are none, see `as_uint8`."""
    return as_uint8(np.asarray(values), key) if is_image(shape) else np.asarray(values, np.float64)


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether one step looks like an image whose channels come first, (channels, height, width)."""
    return len(shape) == 3 and not is_image(shape) and is_image((*shape[1:], shape[0]))

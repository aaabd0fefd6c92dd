"""What is an image among the arrays of observations: rows (height, width, channels), as cameras give them.

Knows shapes. Knows no pixels.
"""

CHANNELS = (1, 3, 4)
"""Grey, colour, colour and depth or opacity."""
LEAST_SIDE = 8
"""[px]"""


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether one step of a key with this shape is an image, (height, width, channels)."""
    return len(shape) == 3 and shape[2] in CHANNELS and min(shape[:2]) >= LEAST_SIDE


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether one step looks like an image whose channels come first, (channels, height, width)."""
    return not is_image(shape) and is_image((*shape[1:], shape[0])) if len(shape) == 3 else False

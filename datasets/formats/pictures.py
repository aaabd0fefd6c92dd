"""Pictures in files' bytes, PNG or JPEG, of unknown origin: none is unpacked that has another size than expected.

Knows Pillow. Knows no layout of a dataset.
"""

import io

import numpy as np

from diffusion_policy.datasets.formats.reading import library
from diffusion_policy.datasets.storage import StoreError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for so many channels of 8 bits."""


def decode_picture(packed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of a PNG or JPEG, `shape` (height, width, channels) uint8; raises StoreError for one of another size
    or kind, and for damage."""
    image = library("PIL.Image", "pictures")
    try:
        with image.open(io.BytesIO(packed), formats=("PNG", "JPEG")) as picture:
            if (picture.height, picture.width, picture.mode) != (*shape[:2], MODES[shape[2]]):
                found = f"{picture.height} x {picture.width} in {picture.mode}"
                raise StoreError(f"a picture is {found}; it should be {shape[0]} x {shape[1]} in {MODES[shape[2]]}")
            return np.asarray(picture).reshape(shape)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises about damage
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"a picture cannot be decoded: {' '.join(str(error).split())[:200]}") from error


def encode_png(pixels: np.ndarray) -> bytes:
    """Pixels (height, width, channels) uint8 as a PNG, which loses nothing."""
    image, file = library("PIL.Image", "pictures"), io.BytesIO()
    image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", compress_level=3)
    return file.getvalue()

"""From the bytes of an image file to a square of pixels."""

import io
import math
import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

_MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3  # where Pillow begins to warn of decompression bombs
_SMALLEST_CROP = 0.8  # of the shorter side, in random crops


def decode_image(encoded: bytes) -> Image.Image:
    """An RGB image from the bytes of a file; the first frame where there are several.

    Greys of 16 bits are scaled to 8. What is transparent is laid over white. Orientation tags
    (EXIF) are left alone, as the reference leaves them, so that the crops are the reference's.

    Raises:
        Exception: whatever Pillow raises for damaged data; ValueError for an image of too many
            pixels or of values without a known range.
    """
    if not encoded:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(encoded)) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if image.mode[0] in "IF":  # I;16 and its byte orders, I, F
            greys = np.asarray(image)
            if image.mode == "F" or greys.min() < 0 or greys.max() > 65535:
                raise ValueError(f"greys beyond 16 bits (mode {image.mode})")
            image = Image.fromarray(((greys.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The square in the middle of an image whose shorter side is brought to `size`.

    This is the crop of ADM (Dhariwal and Nichol, 2021), which the published tokens and reference
    statistics were made with: halved by boxes while that leaves at least `size`, then bicubic.
    """
    pixels = _resized(image, size, size)
    y, x = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[y : y + size, x : x + size]


def random_crop(
    image: Image.Image, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """A square anywhere in an image, of 0.8 to 1 of its shorter side: ADM's random crop."""
    shorter = int(rng.integers(size, math.ceil(size / _SMALLEST_CROP), endpoint=True))
    pixels = _resized(image, shorter, size)
    y, x = (int(rng.integers(side - size, endpoint=True)) for side in pixels.shape[:2])
    return pixels[y : y + size, x : x + size]


def _resized(image: Image.Image, shorter: int, size: int) -> UInt8[np.ndarray, "y x 3"]:
    """The image with a shorter side of `shorter` pixels, at least `size`."""
    while min(image.size) >= 2 * shorter:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > _MAX_PIXELS:
        raise ValueError(f"too narrow: {width} x {height} pixels where {size} x {size} are cropped")
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def reason(error: Exception) -> str:
    """Why an image is unreadable, in words that are the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {_MAX_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split())) or type(error).__name__

"""Pictures in the formats of files, decoded into one array."""

import io
import math
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pisa_fl.data.image_data import check_memory

MODES = {1: "L", 3: "RGB"}

LONGEST_SIDE = math.isqrt(Image.MAX_IMAGE_PIXELS or sys.maxsize)
"""Of a square that is as large as Pillow reads images without taking them for an attack, in pixels."""

NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"}
"""Formats that Pillow knows and that hold measurements, films or drawings, or that it can only write."""


@dataclass(frozen=True)
class Picture:
    """A picture that is still encoded.

    Attributes:
        content: The path of its file, or what is in it.
        said: What errors call it.
    """

    content: str | bytes
    said: str


def check_size(image_size: int | None) -> None:
    """Check the height and width to which pictures are to be resized.

    Raises:
        ValueError: It is none.
    """
    if image_size is not None and (type(image_size) is not int or not 1 <= image_size <= LONGEST_SIDE):
        raise ValueError(
            f"data.image_size={image_size} must be a number of pixels up to {LONGEST_SIDE}, or null"
        )


def decode(
    splits: Sequence[Sequence[Picture]], key: str, image_size: int | None, channels: int | None
) -> list[np.ndarray]:
    """Decode the pictures of each split, (n, channels, height, width) uint8 each.

    Args:
        splits: Pictures of each; the first has one at least.
        key: Configuration key that errors name.
        image_size: Height and width to which every picture is resized; None: those of the first.
        channels: 1 (grey) or 3 (colour); None: those of the first.

    Raises:
        ValueError: One cannot be read, or all together are more than memory holds.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor() as threads:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.init()  # finds all formats
        first = _read(splits[0][0], key)
        width, height = (image_size,) * 2 if image_size else first.size
        channels = channels or len(first.getbands())
        count = sum(map(len, splits))
        check_memory(
            "data.image_size", f"{count} images of {width} x {height}", count * channels * width * height
        )

        def fill(image: np.ndarray, picture: Picture) -> None:
            read = _read(picture, key).convert(MODES[channels])
            resized = read.resize((width, height), Image.Resampling.BILINEAR)
            image[:] = np.asarray(resized).reshape(height, width, channels).transpose(2, 0, 1)

        arrays = []
        for pictures in splits:
            images = np.empty((len(pictures), channels, height, width), np.uint8)
            for _ in threads.map(fill, images, pictures):
                pass
            arrays.append(images)
    return arrays


def _read(picture: Picture, key: str) -> Image.Image:
    """Decode a picture as it is shown, upright as its EXIF data say and on white where it is transparent."""
    try:
        formats = [name for name in Image.OPEN if name not in NO_PICTURES]
        file = io.BytesIO(picture.content) if isinstance(picture.content, bytes) else picture.content
        with Image.open(file, formats=formats) as image:
            ImageOps.exif_transpose(image, in_place=True)
            shown = _opaque(image)
            shown.load()
            return shown
    except Exception as error:  # whatever a damaged file makes a decoder raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{key}: {picture.said} is not a readable image ({reason}); replace or remove it"
        ) from error


def _opaque(image: Image.Image) -> Image.Image:
    """Turn an image of any mode into an opaque one of 8 bits a channel, grey or colour."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scaled(image))
    if image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")


def _scaled(image: Image.Image) -> np.ndarray:
    """Map grey values, integers 0..65535 or floats 0..1, to 0..255.

    Raises:
        ValueError: if they lie elsewhere, or so close to 0 that hardly anything would be left of them.
    """
    values = np.asarray(image)
    lowest, highest, white = values.min(), values.max(), 1 if image.mode.startswith("F") else 65535
    if not 0 <= lowest <= highest <= white or 0 < highest < white / 255:
        raise ValueError(
            f"its grey values run from {lowest} to {highest} where 0 is black and {white} is white:"
            " scale them to that, or save 8 bits"
        )
    grey = np.rint(values.astype(np.float32) * np.float32(255 / white)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return grey

"""Image files decoded into one tensor of bytes; the only place that uses Pillow."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .splits import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm")

_GREY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# What Pillow's decoders raise on damaged files, apart from its own errors.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Decoding leaves the interpreter lock, the steps around it do not: with images of 64x64 two threads
# take 1.4 times as long as one, of 128x128 0.8 times, of 256x256 0.6 times.
_AREA_WORTH_A_THREAD = 128 * 128
_MAX_THREADS = 8


def decode_sets(
    root: Path,
    parts: Sequence[Mapping[str, int]],
    read: Callable[[str], bytes],
    image_size: int | None = None,
) -> list[ImageSet]:
    """Decode the images of a data set's parts.

    Args:
        root: where the images are, for the errors.
        parts: labels by the images' names below `root`; at least one image in all.
        read: gives the bytes of one; called from several threads.
        image_size: the shorter side of each image is scaled to this size and the middle square
            cut out; None where all images have one size.

    Returns:
        A set for each part; images have 1 channel if those of all parts are grey, else 3 (RGB).

    Raises:
        ValueError: an image is damaged or of more than 8 bits a channel, or (without `image_size`)
            two differ in size; with their names.
        ImportError: Pillow is missing.
    """
    names = [name for part in parts for name in part]
    images = _decode_all(root, names, read, image_size)
    return [
        ImageSet(pixels, torch.tensor(list(part.values())), scale=255.0)
        for pixels, part in zip(images.split([len(part) for part in parts]), parts, strict=True)
    ]


def _decode_all(
    root: Path, names: Sequence[str], read: Callable[[str], bytes], image_size: int | None
) -> Tensor:
    first = _decode(root / names[0], read(names[0]), image_size)
    images = torch.empty((len(names), *first.pixels.shape), dtype=torch.uint8)

    def decode(index: int) -> bool:
        where = root / names[index]
        decoded = _decode(where, read(names[index]), image_size)
        if decoded.pixels.shape != first.pixels.shape:
            raise ValueError(
                f"images differ in size: {root / names[0]} is {_size(first.pixels)}, {where} is "
                f"{_size(decoded.pixels)}; image_size (--image-size) brings them to one"
            )
        images[index] = decoded.pixels
        return decoded.grey

    workers = min(os.cpu_count() or 1, _MAX_THREADS)
    if first.area < _AREA_WORTH_A_THREAD or workers == 1:
        grey = [decode(index) for index in range(len(names))]
    else:
        with ThreadPoolExecutor(workers) as pool:
            grey = list(pool.map(decode, range(len(names))))
    return images[:, :1].contiguous() if all(grey) else images


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image files need Pillow: pip install 'ssp_fused[images]'") from error
    return Image


class _Decoded(NamedTuple):
    pixels: Tensor  # [3, H, W] bytes; the channels of a grey image are equal
    grey: bool
    area: int  # of the file's image, in pixels


def _decode(where: Path, payload: bytes, image_size: int | None) -> _Decoded:
    """One image; whatever Pillow says of a damaged file becomes a ValueError with its name."""
    pillow = _pillow()
    file = io.BytesIO(payload)
    try:
        with pillow.open(file, formats=FORMATS) as image:
            if image.mode in _DEEP_MODES:
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            grey, area = image.mode in _GREY_MODES, image.width * image.height
            return _Decoded(_pixels(image, image_size), grey, area)
    except (*_DECODE_ERRORS, pillow.DecompressionBombError) as error:
        reason = str(error).replace(repr(file), "the file")
        raise ValueError(f"{where}: not a readable image ({reason})") from error


def _pixels(image: Image, image_size: int | None) -> Tensor:
    """An image as `[3, H, W]` bytes, upright, without alpha."""
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    image = image.convert("RGB")
    if image_size:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        # The filter looks beyond the box: this is the middle of the whole image scaled.
        box = (left, top, left + side, top + side)
        image = image.resize((image_size, image_size), _pillow().Resampling.BILINEAR, box)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"

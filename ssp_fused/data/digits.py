"""The 8x8 handwritten digits that come with the package.

The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine
Learning Repository, 1998, doi 10.24432/C50P49, CC BY 4.0) as scikit-learn ships it: 1,797 images
with 17 grey levels. `tools/make_digits.py` wrote the file.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import torch

from .files import check_digest
from .splits import ImageSet, ImageSplits, stratified_split

FILE = Path(__file__).with_name("digits.bin.gz")
SHA256 = "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2"
_PIXELS = 64


def load_digits() -> ImageSplits:
    """The embedded digits: 1x8x8 images, 10 classes, about 65 / 10 / 25 % train / val / test.

    Raises:
        ValueError: the file is damaged.
    """
    samples = _read(FILE)
    images = samples[:, :_PIXELS].reshape(-1, 1, 8, 8)
    every = ImageSet(images, samples[:, _PIXELS].long(), scale=16.0)
    parts = stratified_split(every.labels.tolist(), (0.10, 0.25), "digits")
    train, val, test = map(every.select, parts)
    return ImageSplits("digits", train, val, test, 10, mean=(0.305,), std=(0.376,))


def _read(path: Path) -> torch.Tensor:
    try:
        payload = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    check_digest(path, hashlib.sha256(payload).hexdigest(), SHA256, "SHA-256 of the contents")
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(-1, _PIXELS + 1)

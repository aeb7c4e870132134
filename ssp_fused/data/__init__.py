"""Image data held in memory as tensors: a registry of data sets, each in three splits.

    splits = load("digits")
    for x, y in splits.train.batches(128, shuffle_seed=0):
        ...

Nothing may be chosen on `test`; validation images are carved from the training part by a fixed
rule, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .digits import load_digits
from .idx import load_fashion_mnist, load_mnist
from .splits import ImageSet, ImageSplits

__all__ = ["ImageSet", "ImageSplits", "load", "names"]

_LOADERS: dict[str, Callable[[Path | None], ImageSplits]] = {
    "digits": load_digits,
    "fashion-mnist": load_fashion_mnist,
    "mnist": load_mnist,
}


def names() -> tuple[str, ...]:
    """The data sets that `load` knows."""
    return tuple(_LOADERS)


def load(name: str, data_dir: str | Path | None = None) -> ImageSplits:
    """Load a data set into memory.

    Args:
        name: one of `names()`.
        data_dir: folder with the data files (or with a folder named `name` that has them); if
            None, the environment's SSP_FUSED_DATA, then the place where the system's package of
            the data puts them. Ignored by "digits", which comes with this package.

    Returns:
        Training, validation and test sets on the CPU.

    Raises:
        ValueError: an unknown name, or a file that is truncated, garbled or has another checksum.
        FileNotFoundError: the files are in none of the places; the message names them.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(_LOADERS)}")
    return _LOADERS[name](None if data_dir is None else Path(data_dir))

"""Image data held in memory as tensors: a registry of data sets, each in three splits.

    splits = load("digits")
    for x, y in splits.train.batches(128, shuffle_seed=0):
        ...

Nothing may be chosen on `test`; validation images are carved from the training part by a fixed
rule, the same on every machine. Nothing is downloaded unless that is asked for.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .augment import AUGMENTATIONS
from .cifar import CIFAR10, CIFAR100, load_cifar
from .digits import load_digits
from .folder import load_folder
from .idx import load_fashion_mnist, load_mnist
from .splits import ImageSet, ImageSplits
from .tiny_imagenet import load_tiny_imagenet

__all__ = ["AUGMENTATIONS", "ImageSet", "ImageSplits", "load", "names"]

FOLDER_PREFIX = "folder:"
_EMBEDDED = "digits"
_SCALED = "tiny-imagenet"
# Each takes data_dir and download.
_LOADERS = {
    "fashion-mnist": load_fashion_mnist,
    "mnist": load_mnist,
    "cifar10": partial(load_cifar, CIFAR10),
    "cifar100": partial(load_cifar, CIFAR100),
    _SCALED: load_tiny_imagenet,
}


def names() -> tuple[str, ...]:
    """The data sets that `load` knows; it also takes "folder:PATH"."""
    return (_EMBEDDED, *_LOADERS)


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
) -> ImageSplits:
    """Load a data set into memory.

    Args:
        name: one of `names()`, or "folder:PATH" for images of one's own in class folders (see
            `ssp_fused.data.folder.load_folder`).
        data_dir: folder with the data files (or with a folder named `name` that has them); if
            None, the environment's SSP_FUSED_DATA, then ssp_fused in the cache folder and the
            place where the system's package of the data puts them. A relative PATH of
            "folder:PATH" is taken from `data_dir`. Ignored by "digits", which comes with this
            package.
        download: fetch files that are in none of these places into the first of them.
        image_size: scale images to this height and width; for "folder:PATH" and "tiny-imagenet".

    Returns:
        Training, validation and test sets on the CPU.

    Raises:
        ValueError: an unknown name, an option that the data set does not have, or a file that is
            truncated, garbled or has another checksum.
        FileNotFoundError: the files are in none of the places; the message names them.
        OSError: a download failed.
        ImportError: image files need Pillow, and it is missing.
    """
    folder = name.startswith(FOLDER_PREFIX)
    if not folder and name not in names():
        known = ", ".join((*names(), f"{FOLDER_PREFIX}PATH"))
        raise ValueError(f"unknown data set {name!r}; known: {known}")
    if download and name not in _LOADERS:
        raise ValueError(f"download: there is nothing to download for {name!r}")
    _check_image_size(name, image_size, has_option=folder or name == _SCALED)
    data_dir = None if data_dir is None else Path(data_dir)
    if folder:
        path = name.removeprefix(FOLDER_PREFIX)
        if not path:
            raise ValueError(f"the data set {name!r} must name a folder, as in folder:PATH")
        return load_folder(Path(data_dir or "", path), image_size)
    if name == _EMBEDDED:
        return load_digits()
    if name == _SCALED:
        return load_tiny_imagenet(data_dir, download, image_size)
    return _LOADERS[name](data_dir, download)


def _check_image_size(name: str, image_size: int | None, *, has_option: bool) -> None:
    if image_size is None:
        return
    if not has_option:
        raise ValueError(
            f"image_size: only for {FOLDER_PREFIX}PATH and {_SCALED}, got {image_size} for {name!r}"
        )
    if isinstance(image_size, bool) or not isinstance(image_size, int):
        raise TypeError(f"image_size must be an integer, got {type(image_size).__name__}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")

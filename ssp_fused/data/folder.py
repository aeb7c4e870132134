"""Any images of one's own: a folder of class folders, named as `folder:PATH`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .decode import SUFFIXES, decode_sets
from .splits import ImageSplits, stratified_split

_TRAIN, _VAL, _TEST = "train", "val", "test"
_KEY = "folder"

# Class index by the image's name below the root.
Labels = dict[str, int]


def load_folder(root: Path, image_size: int | None = None) -> ImageSplits:
    """Images in class folders: root/train/CLASS/**, root/test/CLASS/** and maybe root/val/CLASS/**.

    Without `val`, a tenth of `train` is set aside. With `train` and `val` alone, `val` is the test
    set and a tenth of `train` validates. Without any of them, root/CLASS/** is split 80 / 10 / 10.
    Splits are stratified, by a hash of each image's name: images added later leave (nearly) all
    others where they are. Classes are numbered by name. Hidden files and others than images (by
    their suffix) are passed over.

    Args:
        root: the folder.
        image_size: the shorter side of each image is scaled to this size, in pixels, and the
            middle square cut out; None where all have one size.

    Returns:
        Grey images (1 channel) if all are grey, else RGB (3); alpha is dropped, and the EXIF
        orientation followed. mean and std are those of the training images; a channel that is the
        same everywhere has std 1.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the parts have different classes, fewer than two classes, a class or a part
            without images, images of different sizes (without `image_size`), a damaged image.
        ImportError: Pillow is missing.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    classes, parts = _parts(root)
    train, val, test = decode_sets(root, parts, lambda name: (root / name).read_bytes(), image_size)
    mean, std = _moments(train.images)
    return ImageSplits(f"folder:{root}", train, val, test, len(classes), mean, std)


def _parts(root: Path) -> tuple[list[str], list[Labels]]:
    """The classes' names, and the images of train, val and test."""
    given = [part for part in (_TRAIN, _VAL, _TEST) if (root / part).is_dir()]
    if not given:
        classes, images = _scan(root, "")
        return classes, _split(root, images, (0.1, 0.1))
    if _TRAIN not in given or len(given) == 1:
        raise ValueError(
            f"{root} has {' and '.join(given)}; expected train and test (and val), train and val, "
            "or class folders alone, which are then split"
        )
    scanned = {part: _scan(root, part) for part in given}
    classes = scanned[_TRAIN][0]
    for part in given:
        _same_classes(root, part, classes, scanned[part][0])
    # A part that is not split is mixed all the same: a cut of its first images is a fair sample.
    train, *others = [
        _split(root / part, scanned[part][1], (0.1,) if part == _TRAIN and len(given) == 2 else ())
        for part in given
    ]
    return classes, [*train, *(part for parts in others for part in parts)]


def _scan(root: Path, part: str) -> tuple[list[str], Labels]:
    """Classes in the order of their names, and images as the system lists them."""
    folder = root / part
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise ValueError(f"{folder}: expected at least two class folders, found {found}")
    labels: Labels = {}
    for label, name in enumerate(classes):
        images = _images(folder / name, f"{part}/{name}" if part else name)
        if not images:
            raise ValueError(f"{folder / name}: no images ({', '.join(SUFFIXES)})")
        labels.update(dict.fromkeys(images, label))
    return classes, labels


def _images(folder: Path, prefix: str) -> list[str]:
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        below = Path(prefix, Path(place).relative_to(folder)).as_posix()
        names += [
            f"{below}/{name}"
            for name in files
            if name[0] != "." and name.lower().endswith(SUFFIXES)
        ]
    return names


def _same_classes(root: Path, part: str, expected: Sequence[str], found: Sequence[str]) -> None:
    if found == expected:
        return
    extra = [f"{part} alone has {name}" for name in found if name not in expected]
    lacking = [f"{part} lacks {name}" for name in expected if name not in found]
    raise ValueError(f"{root}: classes differ from those of train: {', '.join(extra + lacking)}")


def _split(root: Path, images: Labels, fractions: Sequence[float]) -> list[Labels]:
    """Parts whose order follows from the images' names alone, whatever the file system."""
    names = list(images)
    parts = stratified_split(list(images.values()), fractions, _KEY, names)
    if not all(parts):
        raise ValueError(
            f"{root}: too few images to set a tenth aside: at least 6 of a class are needed"
        )
    return [{names[index]: images[names[index]] for index in part} for part in parts]


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel in [0, 1], from exact counts of the bytes."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        weights = channel.flatten().bincount(minlength=256).double() / channel.numel()
        mean = weights @ values
        means.append(mean.item())
        deviations.append((weights @ (values - mean).square()).sqrt().item() or 1.0)
    return tuple(means), tuple(deviations)

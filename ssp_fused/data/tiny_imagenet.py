"""Tiny ImageNet, from the zip file of Stanford's course CS231n or the folder extracted from it.

200 classes of ImageNet at 64x64. Labels are the places of the classes in sorted wnids.txt. The test
set is the published validation part: the published test part has no labels.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .decode import decode_sets
from .download import SOURCES, download_files
from .files import check_digest, file_sha256, missing, search_folders
from .splits import ImageSplits, stratified_split

NAME = "tiny-imagenet"
FOLDER = "tiny-imagenet-200"
CLASSES, TRAIN_PER_CLASS, TEST_PER_CLASS = 200, 500, 50
_SIZE = 64
_SUFFIX = ".JPEG"


@dataclass(frozen=True)
class _Source:
    """The files of the zip or of the folder.

    Attributes:
        root: the zip file or the folder.
        names: of all files, below the folder.
        read: gives the bytes of one.
    """

    root: Path
    names: frozenset[str]
    read: Callable[[str], bytes]


def load_tiny_imagenet(
    data_dir: Path | None = None, download: bool = False, image_size: int | None = None
) -> ImageSplits:
    """Tiny ImageNet: 3x64x64 (or 3 x image_size x image_size), 90,000 / 10,000 / 10,000 images.

    Args:
        data_dir: holds tiny-imagenet-200.zip or the folder tiny-imagenet-200.
        download: fetch the zip file if there is neither.
        image_size: scale the images to this size.

    Raises:
        FileNotFoundError: there is neither, or a file is missing.
        ValueError: the zip has another digest, or the contents do not fit; with the file's name.
        ImportError: Pillow is missing.
    """
    folders = search_folders(NAME, data_dir)
    found = _find(folders)
    if found is None and download:
        download_files(NAME, folders[0])
        found = _find(folders)
    if found is None:
        raise missing(f"{FOLDER}.zip or {FOLDER}/", NAME, folders)
    with _opened(found) as source:
        known, test = _labels(source)
        names = list(known)
        split = stratified_split(list(known.values()), (0.1,), NAME, names)
        train, val = ({names[index]: known[names[index]] for index in part} for part in split)
        sets = decode_sets(source.root, (train, val, test), source.read, image_size)
    shape = (3, image_size or _SIZE, image_size or _SIZE)
    if sets[0].images.shape[1:] != shape:
        found = "x".join(map(str, sets[0].images.shape[1:]))
        raise ValueError(f"{source.root}: images are {found}, expected {'x'.join(map(str, shape))}")
    mean, std = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    return ImageSplits(NAME, *sets, CLASSES, mean, std)


def _find(folders: list[Path]) -> Path | None:
    for folder in folders:
        if (folder / f"{FOLDER}.zip").is_file():
            return folder / f"{FOLDER}.zip"
        if (folder / FOLDER).is_dir():
            return folder / FOLDER
    return None


@contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    if path.is_dir():
        files = (Path(place, name) for place, _, names in os.walk(path) for name in names)
        names = frozenset(file.relative_to(path).as_posix() for file in files)
        yield _Source(path, names, lambda name: (path / name).read_bytes())
        return
    with path.open("rb") as file:
        check_digest(path, file_sha256(file), SOURCES[NAME][0].sha256)
        with zipfile.ZipFile(file) as members:
            prefix = f"{FOLDER}/"
            names = (name for name in members.namelist() if name.startswith(prefix))
            names = frozenset(name.removeprefix(prefix) for name in names)
            yield _Source(path, names, lambda name: members.read(prefix + name))


def _labels(source: _Source) -> tuple[dict[str, int], dict[str, int]]:
    """Labels of the training and of the test images, by the images' names."""
    classes = sorted(_text(source, "wnids.txt").split())
    if len(set(classes)) != CLASSES or len(classes) != CLASSES:
        raise ValueError(
            f"{source.root / 'wnids.txt'}: {len(set(classes))} classes, expected {CLASSES}"
        )
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    train = {}
    for name in sorted(source.names):
        part, _, rest = name.partition("/")
        wnid = rest.partition("/")[0]
        if part == "train" and wnid in label_of and name.endswith(_SUFFIX):
            train[name] = label_of[wnid]
    test = {}
    for number, line in enumerate(_text(source, "val/val_annotations.txt").splitlines(), 1):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label_of:
            where = source.root / "val/val_annotations.txt"
            raise ValueError(f"{where}: line {number} names no class of wnids.txt")
        test[f"val/images/{file}"] = label_of[wnid]
    _check_counts(source, classes, train, f"train/*/images/*{_SUFFIX}", TRAIN_PER_CLASS)
    _check_counts(source, classes, test, "val/val_annotations.txt", TEST_PER_CLASS)
    return train, test


def _text(source: _Source, name: str) -> str:
    if name not in source.names:
        raise FileNotFoundError(f"{source.root / name} is missing")
    return source.read(name).decode(errors="replace")


def _check_counts(
    source: _Source, classes: list[str], labels: Mapping[str, int], where: str, expected: int
) -> None:
    counts = Counter(labels.values())
    for label, wnid in enumerate(classes):
        if counts[label] != expected:
            raise ValueError(
                f"{source.root / where}: {counts[label]} images of {wnid}, expected {expected}"
            )
    for name in labels:
        if name not in source.names:
            raise FileNotFoundError(f"{source.root / name} is missing")

"""MNIST and Fashion-MNIST from IDX files, compressed or not.

The IDX format is that of Y. LeCun's MNIST page: two zero bytes, a type byte (8: unsigned byte), the
number of dimensions, each dimension as a big-endian 32-bit integer, then the bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .download import download_files
from .files import check_digest, missing, search_folders
from .splits import ImageSet, ImageSplits, stratified_split

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
_FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
_UNSIGNED_BYTE = 8

# Of the uncompressed files, so that a recompressed copy is still known.
MNIST_SHA256 = {
    TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FASHION_MNIST_SHA256 = {
    TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")


def load_fashion_mnist(data_dir: Path | None = None, download: bool = False) -> ImageSplits:
    """Fashion-MNIST (Xiao et al. 2017): 1x28x28, 10 classes, 54,000 / 6,000 / 10,000 images.

    Looked for in `data_dir`, or SSP_FUSED_DATA, or the cache folder and where Debian's
    dataset-fashion-mnist puts it; downloaded if it is in none of them and `download` is true.
    """
    folder = _find_folder(
        "fashion-mnist",
        data_dir,
        download,
        FASHION_MNIST_PACKAGE,
        ", or install Debian's dataset-fashion-mnist",
    )
    return read_splits(
        "fashion-mnist", folder, mean=(0.2860,), std=(0.3530,), sha256=FASHION_MNIST_SHA256
    )


def load_mnist(data_dir: Path | None = None, download: bool = False) -> ImageSplits:
    """MNIST (LeCun et al. 1998): 1x28x28, 10 classes, 54,000 / 6,000 / 10,000 images.

    Looked for in `data_dir`, or SSP_FUSED_DATA, or the cache folder; downloaded if it is in none
    of them and `download` is true.
    """
    folder = _find_folder("mnist", data_dir, download)
    return read_splits("mnist", folder, mean=(0.1307,), std=(0.3081,), sha256=MNIST_SHA256)


def _find_folder(
    name: str, data_dir: Path | None, download: bool, package: Path | None = None, hint: str = ""
) -> Path:
    """The folder that holds the four files or, where none does, the first."""
    folders = search_folders(name, data_dir, package)
    for wanted in (_FILES, _FILES[:1]):
        for folder in folders:
            if all(_find(folder, file) for file in wanted):
                return folder
        if download:
            download_files(name, folders[0])
            return folders[0]
    raise missing(f"{TRAIN_IMAGES}[.gz]", name, folders, hint)


def read_splits(
    name: str,
    folder: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    sha256: Mapping[str, str] | None = None,
) -> ImageSplits:
    """Read the four IDX files of a folder; a tenth of the training images becomes validation.

    Args:
        name: name of the data set.
        folder: holds the four files of MNIST's names, each with or without `.gz`.
        mean: per-channel mean of the training images in [0, 1].
        std: as `mean`.
        sha256: digests of the uncompressed files by name; not checked if None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or garbled, or does not fit to the others; with its name.
    """
    digests = sha256 or {}
    sets = []
    for image_name, label_name in ((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)):
        images = read_idx(_need(folder, image_name), 3, digests.get(image_name))
        label_path = _need(folder, label_name)
        labels = read_idx(label_path, 1, digests.get(label_name))
        if len(labels) != len(images):
            raise ValueError(f"{label_path}: {len(labels)} labels for {len(images)} images")
        if len(labels) and int(labels.max()) > 9:
            raise ValueError(f"{label_path}: label {int(labels.max())}, expected 0 to 9")
        sets.append(ImageSet(images.unsqueeze(1), labels.long(), scale=255.0))
    known, test = sets
    train, val = map(known.select, stratified_split(known.labels.tolist(), (0.1,), name))
    return ImageSplits(name, train, val, test, 10, mean=tuple(mean), std=tuple(std))


def read_idx(path: Path, dimensions: int, sha256: str | None = None) -> Tensor:
    """Read one IDX file of unsigned bytes, gzip-compressed if its name ends in `.gz`.

    Args:
        path: the file.
        dimensions: how many dimensions it must have.
        sha256: hex digest the uncompressed contents must have; None to skip.

    Returns:
        A uint8 tensor of the shape in the header.

    Raises:
        ValueError: the file is truncated, too long, of another type or of another digest.
    """
    try:
        payload = path.read_bytes()
        if path.suffix == ".gz":
            payload = gzip.decompress(payload)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    if sha256 is not None:
        found = hashlib.sha256(payload).hexdigest()
        check_digest(path, found, sha256, "SHA-256 of the contents")
    header = 4 + 4 * dimensions
    expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if payload[:4] != expected or len(payload) < header:
        raise ValueError(
            f"{path}: not an IDX file of bytes in {dimensions} dimensions "
            f"(starts with {payload[:4].hex() or 'nothing'}, expected {expected.hex()})"
        )
    shape = struct.unpack(f">{dimensions}I", payload[4:header])
    count = math.prod(shape)
    if len(payload) != header + count:
        raise ValueError(
            f"{path}: {len(payload) - header} bytes of data, its header {shape} asks for {count}"
        )
    if count == 0:
        raise ValueError(f"{path}: empty, its header is {shape}")
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)[header:].view(shape)


def _find(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _need(folder: Path, name: str) -> Path:
    path = _find(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder / name}[.gz] is missing")
    return path

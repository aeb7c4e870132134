"""MNIST and Fashion-MNIST from IDX files, compressed or not.

The IDX format is that of Y. LeCun's MNIST page: two zero bytes, a type byte (8: unsigned byte), the
number of dimensions, each dimension as a big-endian 32-bit integer, then the bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .splits import ImageSet, ImageSplits, stratified_split

ENVIRONMENT = "SSP_FUSED_DATA"

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
_UNSIGNED_BYTE = 8

# Of the uncompressed files, so that a recompressed copy is still known.
FASHION_MNIST_SHA256 = {
    TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")


def load_fashion_mnist(data_dir: Path | None = None) -> ImageSplits:
    """Fashion-MNIST (Xiao et al. 2017): 1x28x28, 10 classes, 54,000 / 6,000 / 10,000 images.

    Looked for in `data_dir`, or SSP_FUSED_DATA, or where Debian's dataset-fashion-mnist puts it.
    """
    folder = find_folder(
        "fashion-mnist",
        data_dir,
        FASHION_MNIST_PACKAGE,
        "install Debian's dataset-fashion-mnist or give the folder with --data-dir",
    )
    return read_splits(
        "fashion-mnist",
        folder,
        mean=(0.2860,),
        std=(0.3530,),
        sha256=FASHION_MNIST_SHA256,
    )


def load_mnist(data_dir: Path | None = None) -> ImageSplits:
    """MNIST (LeCun et al. 1998): 1x28x28, 10 classes, from `data_dir` or SSP_FUSED_DATA."""
    folder = find_folder("mnist", data_dir, None, "give the folder with --data-dir")
    return read_splits("mnist", folder, mean=(0.1307,), std=(0.3081,))


def find_folder(name: str, data_dir: Path | None, package: Path | None, hint: str) -> Path:
    """The folder that holds the data set's files.

    A folder that was asked for, by argument or environment, is the only place looked at: data
    from elsewhere would not be what the caller meant.

    Raises:
        FileNotFoundError: naming the folders looked at and `hint`.
    """
    asked = data_dir or os.environ.get(ENVIRONMENT)
    if asked:
        folders = [Path(asked), Path(asked) / name]
    else:
        folders = [] if package is None else [package]
    for folder in folders:
        if _find(folder, TRAIN_IMAGES) is not None:
            return folder
    looked = ", ".join(str(folder) for folder in folders) or "no folder"
    raise FileNotFoundError(f"no {TRAIN_IMAGES}[.gz] of {name} in {looked}; {hint}")


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
        digest = hashlib.sha256(payload).hexdigest()
        if digest != sha256:
            raise ValueError(f"{path}: SHA-256 of the contents is {digest}, expected {sha256}")
    header = 4 + 4 * dimensions
    expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if payload[:4] != expected or len(payload) < header:
        raise ValueError(
            f"{path}: not an IDX file of bytes in {dimensions} dimensions "
            f"(starts with {payload[:4].hex() or 'nothing'}, expected {expected.hex()})"
        )
    shape = struct.unpack(f">{dimensions}I", payload[4:header])
    count = 1
    for size in shape:
        count *= size
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

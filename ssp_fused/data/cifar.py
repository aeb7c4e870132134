"""CIFAR-10 and CIFAR-100, in the binary and the Python form that their author publishes.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html. A record of the binary form is a label byte (CIFAR-100:
coarse, then fine) and 3072 bytes, the red, green and blue planes of 32x32 pixels; the Python form
is a pickled dictionary with the same bytes. Nothing is extracted to disk and no pickle is run.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .download import download_files
from .files import check_digest, file_sha256, missing, search_folders
from .pickles import ByteArray, read_pickle
from .splits import ImageSet, ImageSplits, stratified_split

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_KINDS = {64: ("SHA-256", "sha256"), 32: ("MD5", "md5")}  # by the digest's length in hex


@dataclass(frozen=True)
class Form:
    """One of the forms in which a data set is published.

    Attributes:
        archive: file name of the archive, and `archive_sha256` its digest.
        folder: the folder in the archive.
        train, test: digests of the members by name, SHA-256 or MD5 in hex.
        read: makes images and labels of one member's bytes.
    """

    archive: str
    archive_sha256: str
    folder: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    read: Callable[[Cifar, bytes, Path], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Cifar:
    """What CIFAR-10 and CIFAR-100 differ in.

    Attributes:
        name: the name in the registry.
        num_classes: labels are 0 to num_classes - 1.
        train_count, test_count: images in the two parts.
        label_bytes: bytes before the pixels of a binary record; the last of them is the label.
        label_key: the labels' key in the pickled dictionary.
        mean, std: per channel, of the training images in [0, 1].
        forms: in the order in which they are looked for.
    """

    name: str
    num_classes: int
    train_count: int
    test_count: int
    label_bytes: int
    label_key: bytes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    forms: tuple[Form, ...]


def load_cifar(cifar: Cifar, data_dir: Path | None = None, download: bool = False) -> ImageSplits:
    """CIFAR-10 or CIFAR-100: 3x32x32, 45,000 / 5,000 / 10,000 images, fine labels.

    Args:
        cifar: which of the two.
        data_dir: holds one of the archives as downloaded, or a folder extracted from it.
        download: fetch the binary archive if there is nothing yet.

    Raises:
        FileNotFoundError: neither an archive nor a folder was found, or a file of one is missing.
        ValueError: a file has another digest, or its contents do not fit; with its name.
    """
    folders = search_folders(cifar.name, data_dir)
    found = _find(cifar, folders)
    if found is None and download:
        download_files(cifar.name, folders[0])
        found = _find(cifar, folders)
    if found is None:
        names = " or ".join(f"{form.archive} ({form.folder}/)" for form in cifar.forms)
        raise missing(names, cifar.name, folders)
    known, test = _read(cifar, *found)
    train, val = map(known.select, stratified_split(known.labels.tolist(), (0.1,), cifar.name))
    return ImageSplits(cifar.name, train, val, test, cifar.num_classes, cifar.mean, cifar.std)


def _find(cifar: Cifar, folders: list[Path]) -> tuple[Form, Path] | None:
    for folder in folders:
        for form in cifar.forms:
            if (folder / form.archive).is_file():
                return form, folder / form.archive
            if (folder / form.folder).is_dir():
                return form, folder / form.folder
    return None


def _read(cifar: Cifar, form: Form, path: Path) -> tuple[ImageSet, ImageSet]:
    digests = {**form.train, **form.test}
    if path.name == form.archive:
        payloads = _archive_members(form, path, digests)
    else:
        payloads = _folder_members(path, digests)
    sets = []
    for names, count in ((form.train, cifar.train_count), (form.test, cifar.test_count)):
        images, labels = [], []
        for name in names:
            pixels, classes = form.read(cifar, payloads.pop(name), path / name)
            _check(cifar, path / name, classes, count // len(names))
            images.append(pixels)
            labels.append(classes)
        sets.append(ImageSet(torch.cat(images), torch.cat(labels), scale=255.0))
    return sets[0], sets[1]


def _folder_members(folder: Path, digests: Mapping[str, str]) -> dict[str, bytes]:
    payloads = {}
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
        payloads[name] = (folder / name).read_bytes()
        _check_member(folder / name, payloads[name], digest)
    return payloads


def _archive_members(form: Form, archive: Path, digests: Mapping[str, str]) -> dict[str, bytes]:
    payloads = {}
    with archive.open("rb") as file:
        check_digest(archive, file_sha256(file), form.archive_sha256)
        with tarfile.open(fileobj=file, mode="r:gz") as members:
            for member in members:
                folder, _, name = member.name.partition("/")
                if folder == form.folder and name in digests:
                    payloads[name] = members.extractfile(member).read()
                    _check_member(archive / name, payloads[name], digests[name])
    return payloads


def _check_member(where: Path, payload: bytes, digest: str) -> None:
    kind, algorithm = _KINDS[len(digest)]
    found = hashlib.new(algorithm, payload, usedforsecurity=False).hexdigest()
    check_digest(where, found, digest, kind)


def _check(cifar: Cifar, where: Path, labels: Tensor, count: int) -> None:
    if len(labels) != count:
        raise ValueError(f"{where}: {len(labels)} images, expected {count}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= cifar.num_classes:
        raise ValueError(f"{where}: labels {low} to {high}, expected 0 to {cifar.num_classes - 1}")


def read_binary(cifar: Cifar, payload: bytes, where: Path) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 32, 32]` uint8 and labels `[N]` int64 of a file of the binary form."""
    record = cifar.label_bytes + _PIXELS
    if not payload or len(payload) % record:
        raise ValueError(f"{where}: {len(payload)} bytes, expected a multiple of {record}")
    records = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(-1, record)
    images = records[:, cifar.label_bytes :].reshape(-1, *_SHAPE)
    return images, records[:, cifar.label_bytes - 1].long()


def read_batch(cifar: Cifar, payload: bytes, where: Path) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 32, 32]` uint8 and labels `[N]` int64 of a file of the Python form."""
    batch = read_pickle(payload, str(where))
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(cifar.label_key) if isinstance(batch, dict) else None
    if not isinstance(pixels, ByteArray) or not isinstance(labels, list):
        raise ValueError(
            f"{where}: not a dictionary with an array 'data' and a list '{cifar.label_key.decode()}'"
        )
    if not labels or pixels.shape != (len(labels), _PIXELS):
        raise ValueError(f"{where}: data of shape {pixels.shape} for {len(labels)} labels")
    if not all(type(label) is int and 0 <= label < cifar.num_classes for label in labels):
        raise ValueError(f"{where}: labels must be integers from 0 to {cifar.num_classes - 1}")
    images = torch.frombuffer(bytearray(pixels.data), dtype=torch.uint8).view(-1, *_SHAPE)
    return images, torch.tensor(labels, dtype=torch.int64)


# The members' digests: of the binary forms as torchvision's Ruby port pins them, of CIFAR-10's
# Python form as several projects record them beside torchvision's MD5s.
_CIFAR10_BINARY = Form(
    archive="cifar-10-binary.tar.gz",
    archive_sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
    train={
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    },
    test={"test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"},
    read=read_binary,
)
_CIFAR10_PYTHON = Form(
    archive="cifar-10-python.tar.gz",
    archive_sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
    },
    test={"test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"},
    read=read_batch,
)
_CIFAR100_BINARY = Form(
    archive="cifar-100-binary.tar.gz",
    archive_sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
    train={"train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"},
    test={"test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"},
    read=read_binary,
)
_CIFAR100_PYTHON = Form(
    archive="cifar-100-python.tar.gz",
    archive_sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    folder="cifar-100-python",
    # torchvision's MD5s: no SHA-256 of these two members is published. They tell damage from the
    # original, not a forgery, which could hold other images but run nothing.
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    read=read_batch,
)

CIFAR10 = Cifar(
    name="cifar10",
    num_classes=10,
    train_count=50_000,
    test_count=10_000,
    label_bytes=1,
    label_key=b"labels",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    forms=(_CIFAR10_BINARY, _CIFAR10_PYTHON),
)
CIFAR100 = Cifar(
    name="cifar100",
    num_classes=100,
    train_count=50_000,
    test_count=10_000,
    label_bytes=2,
    label_key=b"fine_labels",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    forms=(_CIFAR100_BINARY, _CIFAR100_PYTHON),
)

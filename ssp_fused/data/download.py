"""Downloads of data files: resumed where they broke off, checked before they get their name.

The addresses, sizes and SHA-256 digests are those that the data sets' authors, torchvision,
TensorFlow Datasets and others publish. Whatever the address, a file is what its digest says.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from .._version import __version__
from .files import file_sha256

TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 3  # on one address, as long as each adds to the file
_CHUNK = 1 << 18
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be downloaded.

    Attributes:
        name: its name on the disk.
        size: in bytes.
        sha256: of the file as downloaded, in hex.
        urls: where it is, in the order in which they are tried.
    """

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


def download_files(data_set: str, folder: Path) -> None:
    """Download the files of a data set that are not yet in a folder, which is made if need be.

    Raises:
        OSError: no address answers with the whole file, or the folder cannot be written.
        ValueError: what came is not the file that was expected; nothing is left of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in SOURCES[data_set]:
        _download(file, folder / file.name)


def _download(file: RemoteFile, target: Path) -> None:
    """Download one file to NAME.part beside its target, check it, and give it its name."""
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    with _locked(part) as stream:
        if target.exists():  # another process was first; the part is a new, empty one
            part.unlink()
            return
        failures: list[str] = []
        damaged: list[str] = []
        for url in file.urls:
            try:
                _transfer(file, url, stream)
            except _NETWORK_ERRORS as error:
                failures.append(f"{url}: {error}")
                continue
            found = file_sha256(stream)
            if found == file.sha256:
                os.fsync(stream.fileno())
                os.replace(part, target)
                return
            damaged.append(f"SHA-256 of what {url} sent is {found}, expected {file.sha256}")
            stream.truncate(0)
        if not stream.seek(0, os.SEEK_END):
            part.unlink()
    if damaged:
        raise ValueError(f"{target}: {'; '.join(damaged + failures)}")
    raise OSError(
        f"{target} could not be downloaded ({'; '.join(failures)}); a copy from elsewhere can be "
        "put there by hand"
    )


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """The part file, open for appending by this process alone; others wait here.

    The system frees the lock of a process that died, so that its part is resumed.
    """
    import fcntl  # of POSIX systems only: elsewhere all but downloading works

    while True:
        with part.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            # Whoever had the lock may have renamed or removed the file that was opened.
            if _is_at(part, stream):
                yield stream
                return


def _is_at(path: Path, stream: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _transfer(file: RemoteFile, url: str, stream: BinaryIO) -> None:
    """Bring the part to its full size from one address, going on where it breaks off."""
    for attempt in range(1, _ATTEMPTS + 1):
        before = stream.seek(0, os.SEEK_END)
        try:
            _receive(file, url, stream)
            return
        except _NETWORK_ERRORS:
            if attempt == _ATTEMPTS or stream.seek(0, os.SEEK_END) <= before:
                raise


def _receive(file: RemoteFile, url: str, stream: BinaryIO) -> None:
    have = stream.seek(0, os.SEEK_END)
    if have == file.size:
        return
    headers = {"User-Agent": f"ssp_fused/{__version__}"}
    if 0 < have < file.size:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        elif not response.getheader("Content-Range", "").startswith(f"bytes {have}-"):
            raise http.client.HTTPException(f"sent {response.getheader('Content-Range')}")
        # Some networks answer with a page of their own: nothing of it may reach the part.
        if response.length is not None and have + response.length != file.size:
            raise http.client.HTTPException(f"has {have + response.length} bytes, not {file.size}")
        stream.truncate(have)
        # disable=None: shown only on a terminal.
        with tqdm(
            desc=file.name, total=file.size, initial=have, unit="B", unit_scale=True, disable=None
        ) as bar:
            for chunk in _chunks(response):
                have += len(chunk)
                if have > file.size:
                    stream.truncate(0)
                    raise http.client.HTTPException(f"longer than {file.size} bytes")
                stream.write(chunk)
                bar.update(len(chunk))
    if have < file.size:
        raise ConnectionError(f"broke off after {have} of {file.size} bytes")


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """What a connection delivers; its errors are made to differ from those of the disk."""
    try:
        while chunk := response.read1(_CHUNK):  # as it comes: a connection may fall silent
            yield chunk
    except OSError as error:
        raise ConnectionError(str(error)) from error


def _mnist_like(
    bases: tuple[str, ...], sizes_and_digests: dict[str, tuple[int, str]]
) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(name, size, digest, tuple(base + name for base in bases))
        for name, (size, digest) in sizes_and_digests.items()
    )


SOURCES: dict[str, tuple[RemoteFile, ...]] = {
    "mnist": _mnist_like(
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        {
            "train-images-idx3-ubyte.gz": (
                9_912_422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            "train-labels-idx1-ubyte.gz": (
                28_881,
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            "t10k-images-idx3-ubyte.gz": (
                1_648_877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            "t10k-labels-idx1-ubyte.gz": (
                4_542,
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        },
    ),
    "fashion-mnist": _mnist_like(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/"
            "b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/",
        ),
        {
            "train-images-idx3-ubyte.gz": (
                26_421_880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            "train-labels-idx1-ubyte.gz": (
                29_515,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            "t10k-images-idx3-ubyte.gz": (
                4_422_102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            "t10k-labels-idx1-ubyte.gz": (
                5_148,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        },
    ),
    "cifar10": (
        RemoteFile(
            "cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        ),
    ),
    "cifar100": (
        RemoteFile(
            "cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
        ),
    ),
    "tiny-imagenet": (
        RemoteFile(
            "tiny-imagenet-200.zip",
            248_100_043,
            "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
            (
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
            ),
        ),
    ),
}

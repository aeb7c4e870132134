"""Downloads from a server in a thread: resumed, checked, and never half there."""

import gzip
import hashlib
import http.server
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_data import idx_bytes

from ssp_fused import data
from ssp_fused.data import download, idx
from ssp_fused.data.download import RemoteFile, download_files
from ssp_fused.data.files import ENVIRONMENT

CONTENTS = bytes(
    torch.randint(256, (100_000,), generator=torch.Generator().manual_seed(1)).tolist()
)
NAME = "file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, in the way that the first folder of the address names."""

    def do_GET(self) -> None:
        _, way, name = self.path.split("/")
        self.server.requests.append((way, self.headers["Range"]))
        body = self.server.files.get(name)
        if body is None or way == "missing":
            self.send_error(404)
            return
        if way == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if way == "page":
            body = b"<html>please log in</html>"
        start = 0
        if self.headers["Range"] and way not in ("plain", "wrong", "cut-plain"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            told = start + 1 if way == "shifted" else start
            self.send_header("Content-Range", f"bytes {told}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if way != "endless":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start:]
        if way in ("cut", "cut-plain", "cut-once") and not (way == "cut-once" and start):
            body = body[: len(body) // 2]
        if way == "endless":
            body += b"more"
        self.wfile.write(body)
        if self.server.pause is not None:
            self.server.pause.wait(10)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {NAME: CONTENTS}
        self.requests: list[tuple[str, str | None]] = []
        self.pause: threading.Event | None = None

    def url(self, way: str, name: str = NAME) -> str:
        return f"http://127.0.0.1:{self.server_port}/{way}/{name}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Download a file in these ways into tmp_path/to."""

    def run(*ways: str) -> Path:
        digest = hashlib.sha256(CONTENTS).hexdigest()
        urls = tuple(server.url(way) for way in ways)
        remote = RemoteFile(NAME, len(CONTENTS), digest, urls)
        monkeypatch.setitem(download.SOURCES, "made-up", (remote,))
        download_files("made-up", tmp_path / "to")
        return tmp_path / "to" / NAME

    return run


def part(tmp_path: Path) -> Path:
    return tmp_path / "to" / f"{NAME}.part"


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "to").iterdir())


@pytest.mark.parametrize("way", ["range", "plain"])
def test_download(fetch, server: Server, tmp_path: Path, way: str) -> None:
    assert fetch(way).read_bytes() == CONTENTS
    assert left(tmp_path) == [NAME]
    fetch(way)  # it is there: nothing is asked for
    assert server.requests == [(way, None)]


def test_a_broken_download_is_resumed(fetch, server: Server, tmp_path: Path) -> None:
    assert fetch("cut-once").read_bytes() == CONTENTS
    assert server.requests == [("cut-once", None), ("cut-once", "bytes=50000-")]
    assert left(tmp_path) == [NAME]


def test_what_a_broken_download_left_is_used_next_time(
    fetch, server: Server, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=r"could not be downloaded .*broke off"):
        fetch("cut")
    # Three attempts: a half, a half of the rest, and again.
    assert left(tmp_path) == [f"{NAME}.part"]
    assert part(tmp_path).read_bytes() == CONTENTS[:87_500]
    server.requests.clear()
    assert fetch("range").read_bytes() == CONTENTS
    assert server.requests == [("range", "bytes=87500-")]
    assert left(tmp_path) == [NAME]


def test_a_server_without_ranges_starts_over(fetch, server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="broke off after 50000 of 100000 bytes"):
        fetch("cut-plain")
    assert part(tmp_path).stat().st_size == 50_000
    assert [asked for _, asked in server.requests] == [None, "bytes=50000-"]
    assert fetch("plain").read_bytes() == CONTENTS
    assert left(tmp_path) == [NAME]


def test_wrong_bytes_leave_nothing(fetch, tmp_path: Path) -> None:
    expected = hashlib.sha256(CONTENTS).hexdigest()
    found = hashlib.sha256(CONTENTS[:-1] + bytes([CONTENTS[-1] ^ 1])).hexdigest()
    with pytest.raises(
        ValueError, match=rf"to/{NAME}: .*/wrong/.* is {found}, expected {expected}"
    ):
        fetch("wrong")
    assert left(tmp_path) == []


def test_a_damaged_part_leaves_nothing(fetch, tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir()
    for damaged in (b"x" * 1000, b"x" * len(CONTENTS)):
        part(tmp_path).write_bytes(damaged)
        with pytest.raises(ValueError, match="expected"):
            fetch("range")
        assert left(tmp_path) == []
    part(tmp_path).write_bytes(b"x" * (len(CONTENTS) + 1))  # too long to be one: starts over
    assert fetch("range").read_bytes() == CONTENTS


def test_a_whole_part_needs_no_server(fetch, server: Server, tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(CONTENTS)
    assert fetch("missing").read_bytes() == CONTENTS
    assert server.requests == [] and left(tmp_path) == [NAME]


@pytest.mark.parametrize("bad", ["missing", "wrong", "page", "cut-plain", "endless"])
def test_mirrors_are_tried_in_order(fetch, server: Server, tmp_path: Path, bad: str) -> None:
    assert fetch(bad, "range").read_bytes() == CONTENTS
    assert server.requests[0][0] == bad and server.requests[-1][0] == "range"
    assert left(tmp_path) == [NAME]
    server.requests.clear()
    (tmp_path / "to" / NAME).unlink()
    fetch("range", bad)
    assert [way for way, _ in server.requests] == ["range"]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("missing", "404"),
        ("page", "has 26 bytes, not 100000"),
        ("endless", "longer than 100000 bytes"),
    ],
)
def test_what_no_address_has_is_reported(fetch, tmp_path: Path, way: str, reason: str) -> None:
    message = rf"to/{NAME} could not be downloaded \(http.*/{way}/{NAME}: .*{reason}.*by hand"
    with pytest.raises(OSError, match=message):
        fetch(way)
    assert left(tmp_path) == []


def test_another_range_than_asked_for_is_not_used(fetch, tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(CONTENTS[:1000])
    with pytest.raises(OSError, match="sent bytes 1001-"):
        fetch("shifted")
    assert part(tmp_path).read_bytes() == CONTENTS[:1000]


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens here
        urls = tuple(f"http://127.0.0.1:{free.getsockname()[1]}/{way}" for way in "ab")
        monkeypatch.setitem(download.SOURCES, "made-up", (RemoteFile(NAME, 1, "0" * 64, urls),))
        with pytest.raises(OSError, match=r"/a: .*refused.*/b: .*refused.*by hand"):
            download_files("made-up", tmp_path / "to")
    assert left(tmp_path) == []


def test_a_silent_server_is_given_up(
    fetch, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.pause = threading.Event()
    with pytest.raises(OSError, match="timed out"):
        fetch("cut")
    server.pause.set()
    assert part(tmp_path).stat().st_size > 0


def test_several_downloads_at_once(fetch, server: Server, tmp_path: Path) -> None:
    errors = []

    def run() -> None:
        try:
            fetch("cut-once")
        except BaseException as error:
            errors.append(error)

    server.pause = threading.Event()
    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    server.pause.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert left(tmp_path) == [NAME] and (tmp_path / "to" / NAME).read_bytes() == CONTENTS
    # One of them downloaded; the others waited for it.
    assert server.requests == [("cut-once", None), ("cut-once", "bytes=50000-")]


def test_a_full_disk_is_not_taken_for_the_network(fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        fetch("range")
    assert "by hand" not in str(raised.value)


@pytest.fixture
def mnist_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server has a made-up MNIST, and the package knows its digests."""
    labels = torch.arange(100) % 10
    images = torch.randint(256, (100, 28, 28))
    uncompressed = {
        idx.TRAIN_IMAGES: idx_bytes(images),
        idx.TRAIN_LABELS: idx_bytes(labels),
        idx.TEST_IMAGES: idx_bytes(images[:7]),
        idx.TEST_LABELS: idx_bytes(labels[:7]),
    }
    server.files = {f"{name}.gz": gzip.compress(body, 1) for name, body in uncompressed.items()}
    digests = {name: hashlib.sha256(body).hexdigest() for name, body in uncompressed.items()}
    monkeypatch.setattr(idx, "MNIST_SHA256", digests)
    sources = tuple(
        RemoteFile(name, len(body), hashlib.sha256(body).hexdigest(), (server.url("range", name),))
        for name, body in server.files.items()
    )
    monkeypatch.setitem(download.SOURCES, "mnist", sources)
    return server


def test_load_downloads_only_what_is_asked_for(
    mnist_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="--download"):
        data.load("mnist")
    assert mnist_server.requests == [] and not (tmp_path / "cache").exists()
    assert len(data.load("mnist", download=True).test) == 7
    folder = tmp_path / "cache" / "ssp_fused" / "mnist"
    assert sorted(path.name for path in folder.iterdir()) == sorted(mnist_server.files)
    assert len(mnist_server.requests) == 4
    assert len(data.load("mnist").test) == 7 and len(mnist_server.requests) == 4
    assert len(data.load("mnist", download=True).test) == 7 and len(mnist_server.requests) == 4
    # A file that is gone is fetched again, the others stay.
    (folder / f"{idx.TEST_LABELS}.gz").unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        data.load("mnist")
    assert len(data.load("mnist", download=True).test) == 7 and len(mnist_server.requests) == 5


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_downloads_go_to_the_folder_asked_for(
    mnist_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = tmp_path / "asked"
    if how == "environment":
        monkeypatch.setenv(ENVIRONMENT, str(asked))
        data.load("mnist", download=True)
    else:
        data.load("mnist", asked, download=True)
    assert len(list((asked / "mnist").iterdir())) == 4 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_archives_are_downloaded_into_their_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (source,) = download.SOURCES[name]
    server.files[source.name] = CONTENTS
    digest = hashlib.sha256(CONTENTS).hexdigest()
    remote = RemoteFile(source.name, len(CONTENTS), digest, (server.url("range", source.name),))
    monkeypatch.setitem(download.SOURCES, name, (remote,))
    # It arrives, and is then found not to be the data set.
    with pytest.raises((ValueError, zipfile.BadZipFile, tarfile.TarError)):
        data.load(name, tmp_path, download=True)
    assert (tmp_path / name / source.name).read_bytes() == CONTENTS


def test_the_addresses_and_digests_are_well_formed() -> None:
    for files in download.SOURCES.values():
        for file in files:
            assert len(bytes.fromhex(file.sha256)) == 32 and file.size > 1000
            assert file.urls and all(url.endswith(f"/{file.name}") for url in file.urls)
    assert set(download.SOURCES) == set(data.names()) - {"digits"}

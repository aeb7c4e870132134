"""Data sets: contents, splits, batches, and what damaged files get."""

import gzip
import hashlib
import struct
from pathlib import Path

import pytest
import torch

from ssp_fused import data
from ssp_fused.data import digits, idx
from ssp_fused.data.files import ENVIRONMENT
from ssp_fused.data.splits import ImageSet, stratified_split


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data of this machine is found by chance."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def any_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST's files may have any contents."""
    monkeypatch.setattr(idx, "MNIST_SHA256", None)


def test_digits() -> None:
    splits = data.load("digits")
    assert splits.image_shape == (1, 8, 8) and splits.num_classes == 10
    sizes = [len(part) for part in (splits.train, splits.val, splits.test)]
    assert sum(sizes) == 1797 and sizes == [1168, 179, 450]
    for part in (splits.train, splits.val, splits.test):
        counts = part.labels.bincount(minlength=10)
        assert counts.min() >= 0.9 * counts.max()
    pixels = splits.train.images.double() / splits.train.scale
    assert pixels.max() == 1 and pixels.min() == 0
    assert splits.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-3)
    assert splits.std[0] == pytest.approx(pixels.std().item(), abs=1e-3)


def test_digits_split_is_fixed_and_disjoint() -> None:
    splits, again = data.load("digits"), data.load("digits")
    assert torch.equal(splits.test.images, again.test.images)
    # Pinned: another split would make results on it incomparable.
    assert splits.test.labels[:12].tolist() == [4, 2, 6, 4, 9, 7, 2, 8, 3, 0, 9, 1]
    everything = torch.cat([splits.train.images, splits.val.images, splits.test.images])
    assert len(everything.flatten(1).unique(dim=0)) == 1797


def test_damaged_digits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = bytearray(gzip.decompress(digits.FILE.read_bytes()))
    payload[1000] ^= 1
    wrong, short = tmp_path / "wrong.gz", tmp_path / "short.gz"
    wrong.write_bytes(gzip.compress(payload))
    short.write_bytes(digits.FILE.read_bytes()[:-100])
    monkeypatch.setattr(digits, "FILE", wrong)
    with pytest.raises(ValueError, match=r"wrong\.gz: SHA-256 .* expected 68aea0"):
        data.load("digits")
    monkeypatch.setattr(digits, "FILE", short)
    with pytest.raises(ValueError, match=r"short\.gz: not a complete gzip file"):
        data.load("digits")


def test_stratified_split() -> None:
    labels = [0] * 100 + [1] * 50 + [2] * 10
    train, val, test = stratified_split(labels, (0.1, 0.2), "key")
    assert sorted(train + val + test) == list(range(160))
    for part, share in ((val, 0.1), (test, 0.2)):
        counts = [sum(labels[index] == label for index in part) for label in range(3)]
        assert counts == [round(share * size) for size in (100, 50, 10)]
    assert stratified_split(labels, (0.1, 0.2), "key") == [train, val, test]
    assert stratified_split(labels, (0.1, 0.2), "other")[1] != val
    (mixed,) = stratified_split(labels, (), "key")
    assert sorted(mixed) == list(range(160))
    assert {labels[index] for index in mixed[:40]} == {0, 1, 2}
    # A cut of the first images must be a fair sample: --limit takes one.
    assert {labels[index] for index in train[:40]} == {0, 1, 2}
    first = sum(labels[index] == 0 for index in train[: len(train) // 2])
    assert 25 <= first <= 45


def test_named_samples_keep_their_part_when_others_are_added() -> None:
    names = [f"{index}.png" for index in range(400)]
    parts = [{names[i] for i in part} for part in stratified_split([0] * 400, (0.1,), "k", names)]
    more = [*names[:123], "new.png", *names[123:]]
    moved = [{more[i] for i in part} for part in stratified_split([0] * 401, (0.1,), "k", more)]
    assert len(parts[1] ^ (moved[1] - {"new.png"})) <= 2


def test_batches_cover_the_set_once_in_the_seed_s_order() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    part = ImageSet(images, torch.arange(10), scale=10.0)
    in_order = torch.cat([y for _, y in part.batches(4)])
    assert in_order.tolist() == list(range(10))
    first = [y for _, y in part.batches(4, shuffle_seed=1)]
    assert [len(y) for y in first] == [4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == list(range(10))
    assert torch.cat(first).tolist() != list(range(10))
    again = torch.cat([y for _, y in part.batches(4, shuffle_seed=1)])
    assert torch.equal(torch.cat(first), again)
    other = torch.cat([y for _, y in part.batches(4, shuffle_seed=2)])
    assert not torch.equal(again, other)
    for x, y in part.batches(3, shuffle_seed=3):
        assert x.dtype == torch.float32
        assert torch.equal(x.flatten(), y / 10)
    assert [len(y) for _, y in part.batches(4, drop_last=True)] == [4, 4]
    assert [len(y) for _, y in part.batches(20, drop_last=True)] == [10]
    for size, drop_last in ((4, False), (4, True), (5, True), (20, True), (10, False)):
        batches = list(part.batches(size, drop_last=drop_last))
        assert len(batches) == part.batch_count(size, drop_last)
    with pytest.raises(ValueError, match="batch_size"):
        next(part.batches(0))


def idx_bytes(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def write_folder(folder: Path, *, compressed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.randint(256, (100, 28, 28))
    labels = torch.arange(100) % 10
    for name, values in (
        (idx.TRAIN_IMAGES, images),
        (idx.TRAIN_LABELS, labels),
        (idx.TEST_IMAGES, images[:7]),
        (idx.TEST_LABELS, labels[:7]),
    ):
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(values)))
        else:
            (folder / name).write_bytes(idx_bytes(values))
    return images, labels


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.usefixtures("any_mnist")
def test_idx_folder(tmp_path: Path, compressed: bool) -> None:
    images, labels = write_folder(tmp_path / "mnist", compressed=compressed)
    splits = data.load("mnist", tmp_path)
    assert splits.image_shape == (1, 28, 28)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [90, 10, 7]
    assert torch.equal(splits.test.images[:, 0], images[:7].to(torch.uint8))
    assert torch.equal(splits.test.labels, labels[:7])
    known = {bytes(i.to(torch.uint8).numpy()): int(y) for i, y in zip(images, labels, strict=True)}
    for image, label in zip(splits.train.images, splits.train.labels, strict=True):
        assert known[bytes(image.numpy())] == int(label)


@pytest.mark.usefixtures("any_mnist")
def test_data_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"cache.*--download.*--data-dir"):
        data.load("mnist")
    write_folder(tmp_path, compressed=True)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert len(data.load("mnist").test) == 7
    # A folder that was asked for is the only one looked at.
    with pytest.raises(FileNotFoundError, match="nowhere") as raised:
        data.load("mnist", tmp_path / "nowhere")
    assert "cache" not in str(raised.value)


@pytest.mark.usefixtures("any_mnist")
def test_data_in_the_cache_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "cache" / "ssp_fused" / "mnist", compressed=True)
    assert len(data.load("mnist").test) == 7


@pytest.mark.usefixtures("any_mnist")
def test_the_data_set_s_own_folder_and_whole_copies_come_first(tmp_path: Path) -> None:
    # MNIST and Fashion-MNIST have the same file names: a folder may hold one, its subfolder another.
    write_folder(tmp_path, compressed=True)
    images, _ = write_folder(tmp_path / "mnist", compressed=True)
    own = images[:7].to(torch.uint8)
    assert torch.equal(data.load("mnist", tmp_path).test.images[:, 0], own)
    (tmp_path / "mnist" / f"{idx.TEST_IMAGES}.gz").unlink()
    assert not torch.equal(data.load("mnist", tmp_path).test.images[:, 0], own)


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match=r"'nope'; known: digits, fashion-mnist, mnist, .*folder:"):
        data.load("nope")
    assert data.names() == (
        "digits",
        "fashion-mnist",
        "mnist",
        "cifar10",
        "cifar100",
        "tiny-imagenet",
    )


@pytest.mark.parametrize("name", ["digits", "folder:somewhere"])
def test_nothing_to_download(name: str) -> None:
    with pytest.raises(ValueError, match=f"download: there is nothing to download for '{name}'"):
        data.load(name, download=True)


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "mnist", "cifar10", "cifar100"])
def test_image_size_is_refused_where_sizes_are_fixed(name: str) -> None:
    with pytest.raises(ValueError, match=f"image_size: only for .* got 32 for '{name}'"):
        data.load(name, image_size=32)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_digests_of_idx_files_are_checked(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, compressed=True)
    with pytest.raises(ValueError, match=rf"{idx.TRAIN_IMAGES}\.gz: SHA-256 .* expected \w+$"):
        data.load(name, tmp_path)


def test_known_digests_are_of_the_uncompressed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, compressed=False)
    known = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in tmp_path.iterdir()
        if file.is_file()
    }
    monkeypatch.setattr(idx, "MNIST_SHA256", known)
    assert len(data.load("mnist", tmp_path).test) == 7
    for name in known:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(whole, 1))
        (tmp_path / name).unlink()
    assert len(data.load("mnist", tmp_path).test) == 7
    (tmp_path / f"{idx.TEST_LABELS}.gz").write_bytes(gzip.compress(whole[:-1] + b"\1"))
    with pytest.raises(ValueError, match=f"{idx.TEST_LABELS}.gz: SHA-256 of the contents is"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (idx.TRAIN_IMAGES, lambda b: b[:-1], "78399 bytes of data, its header"),
        (idx.TRAIN_IMAGES, lambda b: b + b"x", "78401 bytes of data"),
        (idx.TRAIN_IMAGES, lambda b: b[:6], "not an IDX file"),
        (idx.TRAIN_IMAGES, lambda b: b"", "starts with nothing"),
        (idx.TRAIN_IMAGES, lambda b: b"\x00\x00\x0d\x03" + b[4:], "starts with 00000d03"),
        (idx.TRAIN_LABELS, lambda b: b"\x00\x00\x08\x03" + b[4:], "in 1 dimensions"),
        (idx.TEST_IMAGES, lambda b: b"\x00\x00\x08\x03" + bytes(12), "empty"),
        (idx.TRAIN_LABELS, lambda b: b[:-1] + b"\x0a", "label 10, expected 0 to 9"),
        (idx.TEST_LABELS, lambda b: idx_bytes(torch.zeros(6)), "6 labels for 7 images"),
    ],
)
@pytest.mark.usefixtures("any_mnist")
def test_damaged_idx_files_are_named(tmp_path: Path, name: str, change, message: str) -> None:
    write_folder(tmp_path, compressed=False)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        data.load("mnist", tmp_path)


@pytest.mark.usefixtures("any_mnist")
def test_damaged_gzip_and_missing_files_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, compressed=True)
    path = tmp_path / f"{idx.TEST_IMAGES}.gz"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not gzip", whole[:50] + b"zzzz" + whole[54:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name}: not a complete gzip file"):
            data.load("mnist", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{idx.TEST_IMAGES}.*missing"):
        data.load("mnist", tmp_path)


@pytest.mark.skipif(
    not idx.FASHION_MNIST_PACKAGE.is_dir(), reason="Debian's dataset-fashion-mnist is missing"
)
def test_fashion_mnist_of_the_system() -> None:
    splits = data.load("fashion-mnist")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [54000, 6000, 10000]
    assert splits.train.labels.bincount().tolist() == [5400] * 10
    pixels = splits.train.images[:5000].double() / splits.train.scale
    assert splits.mean[0] == pytest.approx(pixels.mean().item(), abs=5e-3)
    assert splits.std[0] == pytest.approx(pixels.std().item(), abs=5e-3)

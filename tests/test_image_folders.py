"""Image folders and Tiny ImageNet, on made-up images."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ssp_fused import data
from ssp_fused.data import decode, folder, tiny_imagenet
from ssp_fused.data.download import RemoteFile

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def random_pixels(height: int = 6, width: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (channels, height, width), dtype=torch.uint8)


def to_image(pixels: torch.Tensor):
    channels, height, width = pixels.shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return Image.frombytes(mode, (width, height), pixels.permute(1, 2, 0).contiguous().numpy())


def save(path: Path, pixels: torch.Tensor, **options: object) -> torch.Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_image(pixels).save(path, **options)
    return pixels


def make_tree(
    root: Path, parts: dict[str, int], classes=("cat", "dog"), channels: int = 3
) -> dict[str, torch.Tensor]:
    """PNG files part/class/index.png; pixels by the files' names below `root`."""
    made = {}
    for part, count in parts.items():
        for name in classes:
            for index in range(count):
                file = Path(part, name, f"{index}.png")
                made[file.as_posix()] = save(root / file, random_pixels(channels=channels))
    return made


def contents(part: data.ImageSet) -> dict[bytes, int]:
    pairs = zip(part.images, part.labels.tolist(), strict=True)
    return {image.contiguous().numpy().tobytes(): label for image, label in pairs}


def expected(made: dict[str, torch.Tensor], part: str) -> dict[bytes, int]:
    chosen = {name: pixels for name, pixels in made.items() if name.startswith(part)}
    return {
        pixels.contiguous().numpy().tobytes(): int("dog" in name) for name, pixels in chosen.items()
    }


def test_train_val_and_test_are_taken_as_they_are(tmp_path: Path) -> None:
    made = make_tree(tmp_path, {"train": 12, "val": 3, "test": 4})
    splits = data.load(f"folder:{tmp_path}")
    assert splits.num_classes == 2 and splits.image_shape == (3, 6, 8)
    for part in ("train", "val", "test"):
        found = getattr(splits, part)
        assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
        assert contents(found) == expected(made, part)
        assert len(found) == len(expected(made, part))
    # Mixed: a cut of the first images is a fair sample.
    assert len(set(splits.train.labels[:12].tolist())) == 2


@pytest.mark.parametrize("other", ["test", "val"])
def test_a_tenth_of_train_is_set_aside(tmp_path: Path, other: str) -> None:
    made = make_tree(tmp_path, {"train": 20, other: 3})
    splits = data.load(f"folder:{tmp_path}")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [36, 4, 6]
    assert splits.val.labels.bincount().tolist() == [2, 2]
    assert contents(splits.test) == expected(made, other)
    assert contents(splits.train) | contents(splits.val) == expected(made, "train")


def test_class_folders_alone_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_tree(tmp_path, {"": 20})
    splits = data.load(f"folder:{tmp_path}")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [32, 4, 4]
    assert splits.test.labels.bincount().tolist() == [2, 2]
    parts = [contents(part) for part in (splits.train, splits.val, splits.test)]
    assert parts[0] | parts[1] | parts[2] == expected(made, "")
    # The place of the folder, and the order in which the system lists it, change nothing.
    elsewhere = tmp_path / "elsewhere"
    for name, pixels in made.items():
        save(elsewhere / name, pixels)
    walk = os.walk

    def backwards(top: Path):
        return ((place, folders, sorted(files)[::-1]) for place, folders, files in walk(top))

    monkeypatch.setattr(folder.os, "walk", backwards)
    again = data.load("folder:elsewhere", tmp_path)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(splits, part).images, getattr(again, part).images)
    # An image more leaves nearly all others in their parts.
    save(elsewhere / "cat" / "00.png", random_pixels())
    more = data.load("folder:elsewhere", tmp_path)
    assert len(set(contents(more.test)) & set(contents(splits.test))) >= 3


def test_mean_and_std_are_those_of_the_training_images(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train": 30, "test": 2})
    splits = data.load(f"folder:{tmp_path}")
    pixels = splits.train.images.double().transpose(0, 1).flatten(1) / 255
    for channel in range(3):
        assert splits.mean[channel] == pytest.approx(pixels[channel].mean().item(), abs=1e-14)
        deviation = pixels[channel].std(correction=0).item()
        assert splits.std[channel] == pytest.approx(deviation, abs=1e-14)


def test_a_constant_channel_divides_by_one(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            for index in range(10):
                pixels = random_pixels()
                pixels[1] = 51
                save(tmp_path / part / name / f"{index}.png", pixels)
    splits = data.load(f"folder:{tmp_path}")
    assert splits.mean[1] == pytest.approx(0.2, abs=1e-15) and splits.std[1] == 1
    assert splits.std[0] < 1


@pytest.mark.parametrize("suffix", [".png", ".BMP", ".gif", ".webp", ".pgm", ".jpg", ".JPEG"])
def test_grey_images_have_one_channel(tmp_path: Path, suffix: str) -> None:
    pixels = random_pixels(channels=1)
    options = {"lossless": True} if suffix == ".webp" else {}
    for part in ("train", "test"):
        for name in ("a", "b"):
            for index in range(6):
                save(tmp_path / part / name / f"{index}{suffix}", pixels, **options)
    splits = data.load(f"folder:{tmp_path}")
    if suffix in (".webp", ".gif"):  # the formats know no grey, or only as a palette of colours
        assert splits.image_shape == (3, 6, 8)
    else:
        assert splits.image_shape == (1, 6, 8) and splits.train.images.is_contiguous()
    if suffix.lower() not in (".jpg", ".jpeg"):
        assert torch.equal(splits.test.images[0, :1], pixels)


def test_one_colour_image_makes_all_rgb(tmp_path: Path) -> None:
    made = make_tree(tmp_path, {"train": 12, "test": 2}, channels=1)
    colour = save(tmp_path / "test" / "cat" / "0.png", random_pixels())
    splits = data.load(f"folder:{tmp_path}")
    assert splits.image_shape == (3, 6, 8)
    found = contents(splits.test)
    assert found[colour.numpy().tobytes()] == 0
    assert found[made["test/dog/0.png"].expand(3, -1, -1).contiguous().numpy().tobytes()] == 1


def test_alpha_is_dropped_and_orientation_followed(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train": 12, "test": 1})
    with_alpha = save(tmp_path / "test" / "cat" / "0.png", random_pixels(channels=4))
    turned = random_pixels(height=8, width=6)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    save(tmp_path / "test" / "dog" / "0.png", turned, exif=exif)
    splits = data.load(f"folder:{tmp_path}")
    shown = turned.rot90(-1, dims=(1, 2)).contiguous()
    expected = {with_alpha[:3].contiguous().numpy().tobytes(): 0, shown.numpy().tobytes(): 1}
    assert contents(splits.test) == expected


def test_hidden_and_other_files_are_passed_over_and_folders_searched(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train": 12, "test": 2})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"not an image")
    (tmp_path / "train" / "README").write_text("not a class")
    save(tmp_path / "train" / ".trash" / "0.png", random_pixels())
    save(tmp_path / "train" / "cat" / ".trash" / "0.png", random_pixels())
    deep = save(tmp_path / "test" / "dog" / "a" / "b" / "0.PNG", random_pixels())
    splits = data.load(f"folder:{tmp_path}")
    assert splits.num_classes == 2 and len(splits.train) + len(splits.val) == 24
    assert len(splits.test) == 5 and contents(splits.test)[deep.numpy().tobytes()] == 1


def test_different_sizes_need_image_size(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train": 12, "test": 2})
    big = save(tmp_path / "test" / "dog" / "0.png", random_pixels(20, 60))
    message = r"images differ in size: .*\.png is 8x6, .*dog/0\.png is 60x20; image_size"
    with pytest.raises(ValueError, match=message):
        data.load(f"folder:{tmp_path}")
    splits = data.load(f"folder:{tmp_path}", image_size=5)
    assert splits.image_shape == (3, 5, 5)
    middle = to_image(big).resize((15, 5), Image.Resampling.BILINEAR).crop((5, 0, 10, 5))
    middle = torch.frombuffer(bytearray(middle.tobytes()), dtype=torch.uint8).view(5, 5, 3)
    assert contents(splits.test)[middle.permute(2, 0, 1).contiguous().numpy().tobytes()] == 1


def test_threads_decode_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, {"train": 30, "test": 5})
    one = data.load(f"folder:{tmp_path}")
    monkeypatch.setattr(decode, "_AREA_WORTH_A_THREAD", 1)
    monkeypatch.setattr(decode.os, "cpu_count", lambda: 4)
    several = data.load(f"folder:{tmp_path}")
    assert torch.equal(one.train.images, several.train.images)
    assert torch.equal(one.test.images, several.test.images)
    (tmp_path / "test" / "dog" / "3.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"dog/3\.png: not a readable image"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"GIF89a"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".webp", ".ppm"])
def test_damaged_images_are_named(tmp_path: Path, damage, suffix: str) -> None:
    make_tree(tmp_path, {"train": 12, "test": 2})
    path = tmp_path / "test" / "dog" / f"bad{suffix}"
    save(path, random_pixels())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"dog/bad\{suffix}: not a readable image \(") as raised:
        data.load(f"folder:{tmp_path}")
    assert "BytesIO" not in str(raised.value)


def test_sixteen_bits_a_channel_are_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train": 12, "test": 2})
    Image.new("I;16", (8, 6), 40000).save(tmp_path / "test" / "dog" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: .*expected 8 bits a channel"):
        data.load(f"folder:{tmp_path}")


def test_classes_must_agree(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train": 12})
    make_tree(tmp_path, {"test": 2}, classes=("cat", "fox"))
    with pytest.raises(ValueError, match="train: test alone has fox, test lacks dog"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("parts", "classes", "message"),
    [
        ({"train": 12}, ("a", "b"), "has train; expected train and test"),
        ({"val": 2, "test": 2}, ("a", "b"), "has val and test; expected train and test"),
        ({"train": 12, "test": 2}, ("a",), r"train: expected at least two class folders, found a$"),
        ({"": 12}, (), "at least two class folders, found none"),
        ({"train": 5, "test": 2}, ("a", "b"), "train: too few images to set a tenth aside"),
        ({"": 5}, ("a", "b"), "too few images to set a tenth aside"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path: Path, parts, classes, message: str) -> None:
    make_tree(tmp_path, parts, classes)
    with pytest.raises(ValueError, match=message):
        data.load(f"folder:{tmp_path}")


def test_an_empty_class_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train": 12, "test": 2})
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"train/empty: no images \(\.jpg"):
        data.load(f"folder:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        data.load(f"folder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="must name a folder"):
        data.load("folder:")


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_image_size_is_checked(size: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="image_size must be"):
        data.load("folder:nowhere", image_size=size)


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, {"train": 12, "test": 2})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"Pillow: pip install 'ssp_fused\[images\]'"):
        data.load(f"folder:{tmp_path}")


WNIDS = ("n03", "n01", "n02")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Tiny ImageNet of three classes in tmp_path, as the folder; pixels by the files' names."""
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 3)
    monkeypatch.setattr(tiny_imagenet, "TRAIN_PER_CLASS", 10)
    monkeypatch.setattr(tiny_imagenet, "TEST_PER_CLASS", 2)
    root = tmp_path / tiny_imagenet.FOLDER
    made = {}
    for wnid in WNIDS:
        for index in range(10):
            name = f"train/{wnid}/images/{wnid}_{index}.JPEG"
            # JPEG's colours are exact on one flat colour of grey; some of the originals are grey.
            pixels = torch.full((3, 64, 64), len(made) + 1, dtype=torch.uint8)
            made[name] = save(root / name, pixels[: 1 if index % 2 else 3], quality=100)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1")
    lines = []
    for index in range(6):
        name = f"val_{index}.JPEG"
        pixels = torch.full((3, 64, 64), 100 + index, dtype=torch.uint8)
        made[f"val/images/{name}"] = save(root / "val" / "images" / name, pixels, quality=100)
        lines.append(f"{name}\t{WNIDS[index % 3]}\t0\t0\t62\t57\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    save(root / "test" / "images" / "test_0.JPEG", random_pixels(64, 64))
    return root, made


def zip_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    archive = root.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as members:
        for path in sorted(root.rglob("*"), reverse=True):
            members.write(path, path.relative_to(root.parent))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    remote = RemoteFile(archive.name, archive.stat().st_size, digest, ())
    monkeypatch.setitem(tiny_imagenet.SOURCES, tiny_imagenet.NAME, (remote,))
    return archive


def test_tiny_imagenet(tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    root, made = tiny
    from_folder = data.load("tiny-imagenet", tmp_path)
    assert from_folder.image_shape == (3, 64, 64) and from_folder.num_classes == 3
    parts = (from_folder.train, from_folder.val, from_folder.test)
    assert [len(part) for part in parts] == [27, 3, 6]
    assert from_folder.val.labels.bincount().tolist() == [1, 1, 1]
    labels = {"n01": 0, "n02": 1, "n03": 2}
    of_value = {
        int(made[name][0, 0, 0]): labels[name.split("/")[1]] for name in made if "train" in name
    }
    of_value |= {100 + index: labels[WNIDS[index % 3]] for index in range(6)}
    for part in parts:
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            assert image.unique().numel() == 1 and of_value[int(image[0, 0, 0])] == label
    archive = zip_up(root, monkeypatch)
    root.rename(tmp_path / "away")
    from_zip = data.load("tiny-imagenet", tmp_path)
    assert not root.exists()
    assert torch.equal(from_zip.train.images, from_folder.train.images)
    assert torch.equal(from_zip.test.labels, from_folder.test.labels)
    assert data.load("tiny-imagenet", tmp_path, image_size=16).image_shape == (3, 16, 16)
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"tiny-imagenet-200\.zip: SHA-256 is .* expected"):
        data.load("tiny-imagenet", tmp_path)


def break_file(name: str, change):
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            break_file("wnids.txt", lambda b: b[:8]),
            ValueError,
            r"wnids\.txt: 2 classes, expected 3",
        ),
        (break_file("wnids.txt", lambda b: b + b"n01\n"), ValueError, "3 classes, expected 3|4"),
        (
            break_file("val/val_annotations.txt", lambda b: b.replace(b"n02", b"n09")),
            ValueError,
            r"val_annotations\.txt: line 3 names no class",
        ),
        (
            break_file("val/val_annotations.txt", lambda b: b.replace(b"val_2", b"val_8")),
            FileNotFoundError,
            r"val/images/val_8\.JPEG is missing",
        ),
        (
            break_file("val/val_annotations.txt", lambda b: b[: b.index(b"val_5")]),
            ValueError,
            r"val_annotations\.txt: 1 images of n02, expected 2",
        ),
        (
            lambda root: (root / "train/n01/images/n01_3.JPEG").unlink(),
            ValueError,
            "9 images of n01, expected 10",
        ),
        (
            break_file("train/n01/images/n01_3.JPEG", lambda b: b[:300]),
            ValueError,
            r"n01_3\.JPEG: not a readable image",
        ),
        (lambda root: (root / "wnids.txt").unlink(), FileNotFoundError, r"wnids\.txt is missing"),
    ],
)
def test_damaged_tiny_imagenet(tmp_path: Path, tiny, damage, error, message: str) -> None:
    damage(tiny[0])
    with pytest.raises(error, match=message):
        data.load("tiny-imagenet", tmp_path)


def test_tiny_imagenet_of_another_size_is_refused(tmp_path: Path, tiny) -> None:
    for path in tiny[0].rglob("*.JPEG"):
        save(path, random_pixels(32, 32))
    with pytest.raises(ValueError, match="images are 3x32x32, expected 3x64x64"):
        data.load("tiny-imagenet", tmp_path)


def test_missing_tiny_imagenet(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tiny-imagenet-200\.zip .*--download.*--data-dir"):
        data.load("tiny-imagenet", tmp_path)

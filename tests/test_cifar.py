"""CIFAR's two forms on made-up files; pickles that ask for more than arrays are refused."""

import dataclasses
import hashlib
import pickle
import struct
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from ssp_fused import data
from ssp_fused.data import cifar
from ssp_fused.data.cifar import CIFAR10, CIFAR100, Cifar, Form
from ssp_fused.data.pickles import ByteArray, read_pickle

PER_FILE = 20


def short_string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def python2_array(pixels: torch.Tensor, *, code: bytes = b"u1", module: bytes = b"core") -> bytes:
    """What Python 2 writes for a numpy array, opcode by opcode."""
    rows, columns = pixels.shape
    contents = pixels.contiguous().numpy().tobytes()
    return (
        b"cnumpy."
        + module
        + b".multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09"
        b"U\x01bq\x0a\x87q\x0bRq\x0c(K\x01J" + struct.pack("<i", rows) + b"M"
        b""
        + struct.pack("<H", columns)
        + b"\x86q\x0dcnumpy\ndtype\nq\x0e"
        + short_string(code)
        + b""
        b"q\x0fK\x00K\x01\x87q\x10Rq\x11(K\x03U\x01|q\x12NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq"
        b"\x13b\x89T" + struct.pack("<i", len(contents)) + contents + b"q\x14tq\x15b"
    )


def python2_batch(key: bytes, labels: list[int], array: bytes) -> bytes:
    items = b"".join(b"K" + bytes([label]) for label in labels)
    names = b"".join(short_string(b"image_%d.png" % index) for index in range(len(labels)))
    return (
        b"\x80\x02}q\x01("
        + short_string(b"batch_label")
        + b"q\x02"
        + short_string(b"made up")
        + b""
        b"q\x03" + short_string(key) + b"q\x04]q\x05(" + items + b"e" + short_string(b"data") + b""
        b"q\x06" + array + short_string(b"filenames") + b"]q\x16(" + names + b"eu."
    )


def labels_of(spec: Cifar) -> torch.Tensor:
    return torch.randperm(spec.num_classes).repeat(PER_FILE)[:PER_FILE]


def write_form(spec: Cifar, form: Form, folder: Path) -> tuple[Form, torch.Tensor, torch.Tensor]:
    """Made-up members in `folder`/form.folder; the form with their digests, images, labels."""
    (folder / form.folder).mkdir(parents=True)
    images, labels, digests = [], [], {}
    for name in (*form.train, *form.test):
        pixels = torch.randint(256, (PER_FILE, 3072), dtype=torch.uint8)
        classes = labels_of(spec)
        if form.read is cifar.read_binary:
            coarse = torch.full((PER_FILE, spec.label_bytes - 1), 255, dtype=torch.uint8)
            records = torch.cat([coarse, classes.byte()[:, None], pixels], dim=1)
            payload = records.numpy().tobytes()
        else:
            payload = python2_batch(spec.label_key, classes.tolist(), python2_array(pixels))
        (folder / form.folder / name).write_bytes(payload)
        kind = hashlib.sha256 if len({**form.train, **form.test}[name]) == 64 else hashlib.md5
        digests[name] = kind(payload).hexdigest()
        images.append(pixels.view(-1, 3, 32, 32))
        labels.append(classes)
    form = dataclasses.replace(
        form,
        train={name: digests[name] for name in form.train},
        test={name: digests[name] for name in form.test},
    )
    return form, torch.cat(images), torch.cat(labels)


def pack(form: Form, folder: Path) -> Form:
    """The folder as an archive, which takes its place."""
    archive = folder / form.archive
    with tarfile.open(archive, "w:gz") as members:
        members.add(folder / form.folder, form.folder)
    for member in (folder / form.folder).iterdir():
        member.unlink()
    (folder / form.folder).rmdir()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return dataclasses.replace(form, archive_sha256=digest)


def with_form(spec: Cifar, form: Form) -> Cifar:
    train, test = PER_FILE * len(form.train), PER_FILE * len(form.test)
    return dataclasses.replace(spec, forms=(form,), train_count=train, test_count=test)


FORMS = [(spec, form) for spec in (CIFAR10, CIFAR100) for form in spec.forms]
NAMES = [form.folder for _, form in FORMS]


@pytest.mark.parametrize(("spec", "form"), FORMS, ids=NAMES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "own"])
def test_every_form(tmp_path: Path, spec: Cifar, form: Form, packed: bool, below: str) -> None:
    folder = tmp_path / (spec.name if below else "")
    form, images, labels = write_form(spec, form, folder)
    if packed:
        form = pack(form, folder)
    before = sorted(tmp_path.rglob("*"))
    splits = cifar.load_cifar(with_form(spec, form), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is extracted to disk
    assert splits.image_shape == (3, 32, 32) and splits.num_classes == spec.num_classes
    assert torch.equal(splits.test.images, images[-PER_FILE:])
    assert torch.equal(splits.test.labels, labels[-PER_FILE:])
    known = {
        bytes(image.numpy().tobytes()): int(y) for image, y in zip(images, labels, strict=True)
    }
    for part in (splits.train, splits.val):
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        for image, label in zip(part.images, part.labels, strict=True):
            assert known[image.numpy().tobytes()] == int(label)
    assert len(splits.train) + len(splits.val) == len(labels) - PER_FILE


def test_the_registry_knows_them(tmp_path: Path) -> None:
    for name, archive in (("cifar10", "cifar-10"), ("cifar100", "cifar-100")):
        with pytest.raises(FileNotFoundError, match=f"{archive}-binary.*--download.*--data-dir"):
            data.load(name, tmp_path)
        (tmp_path / f"{archive}-python.tar.gz").write_bytes(b"something else")
        with pytest.raises(ValueError, match=rf"{archive}-python\.tar\.gz: SHA-256 is .* expected"):
            data.load(name, tmp_path)


@pytest.mark.parametrize(("spec", "form"), FORMS, ids=NAMES)
def test_damaged_members_and_archives_are_named(tmp_path: Path, spec: Cifar, form: Form) -> None:
    form, _, _ = write_form(spec, form, tmp_path)
    spec = with_form(spec, form)
    member = tmp_path / form.folder / next(iter(form.train))
    whole = member.read_bytes()
    for damaged in (whole[:-1], whole[:999] + bytes([whole[999] ^ 1]) + whole[1000:], b""):
        member.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{member.name}: (SHA-256|MD5) is .* expected"):
            cifar.load_cifar(spec, tmp_path)
    member.unlink()
    with pytest.raises(FileNotFoundError, match=f"{member.name} is missing"):
        cifar.load_cifar(spec, tmp_path)
    member.write_bytes(whole)
    spec = with_form(spec, pack(form, tmp_path))
    archive = tmp_path / form.archive
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{archive.name}: SHA-256 is .* expected"):
        cifar.load_cifar(spec, tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_contents_that_do_not_fit_are_named() -> None:
    where = Path("batch")
    with pytest.raises(ValueError, match="batch: 3072 bytes, expected a multiple of 3073"):
        cifar.read_binary(CIFAR10, bytes(3072), where)
    pixels = torch.zeros(2, 3072, dtype=torch.uint8)
    array = python2_array(pixels)
    for labels, text in (([1], "2, 3072.* for 1 labels"), ([1, 10], "integers from 0 to 9")):
        with pytest.raises(ValueError, match=f"batch: .*{text}"):
            cifar.read_batch(CIFAR10, python2_batch(b"labels", labels, array), where)
    with pytest.raises(ValueError, match="a list 'fine_labels'"):
        cifar.read_batch(CIFAR100, python2_batch(b"labels", [1, 2], array), where)
    with pytest.raises(ValueError, match="not a dictionary"):
        cifar.read_batch(CIFAR10, b"]q\x01.", where)


@pytest.mark.parametrize("form", CIFAR10.forms, ids=lambda form: form.folder)
def test_label_ranges_and_counts_are_checked(tmp_path: Path, form: Form) -> None:
    form, _, _ = write_form(dataclasses.replace(CIFAR10, num_classes=11), form, tmp_path)
    with pytest.raises(ValueError, match=r"batch.*(0 to 9)"):
        cifar.load_cifar(with_form(CIFAR10, form), tmp_path)
    spec = with_form(dataclasses.replace(CIFAR10, num_classes=11), form)
    spec = dataclasses.replace(spec, train_count=5 * PER_FILE + 5)
    with pytest.raises(ValueError, match=r"data_batch_1.*: 20 images, expected 21"):
        cifar.load_cifar(spec, tmp_path)


def test_the_made_up_pickles_are_ones_that_numpy_reads() -> None:
    pytest.importorskip("numpy")
    pixels = torch.randint(256, (2, 3072), dtype=torch.uint8)
    payload = python2_batch(b"labels", [3, 4], python2_array(pixels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core is _core by now
        batch = pickle.loads(payload, encoding="bytes")
    assert batch[b"labels"] == [3, 4] and batch[b"data"].tolist() == pixels.tolist()


def test_digests_are_well_formed() -> None:
    for _, form in FORMS:
        assert len(bytes.fromhex(form.archive_sha256)) == 32
        for digest in (form.train | form.test).values():
            assert len(bytes.fromhex(digest)) == (16 if form.folder == "cifar-100-python" else 32)


def test_pickles_of_python_2_and_of_pickle_itself() -> None:
    pixels = torch.arange(6, dtype=torch.uint8).view(2, 3)
    for module in (b"core", b"_core"):
        batch = read_pickle(python2_batch(b"k", [3, 4], python2_array(pixels, module=module)), "f")
        assert batch[b"k"] == [3, 4] and batch[b"filenames"] == [b"image_0.png", b"image_1.png"]
        assert batch[b"data"] == ByteArray((2, 3), bytes(range(6)))
    shared = [1, 2]
    value = {"a": [None, True, False, -1, 300, 70000, 1 << 40, "text"], "b": ((), (1,), (1, 2))}
    value |= {"c": (1, 2, 3, 4), "d": {"e": {}}, "s": [shared, shared]}
    for protocol in (0, 1, 2):
        assert read_pickle(pickle.dumps(value, protocol), "f") == value


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touched(path: Path) -> list[bytes]:
    """Pickles that would make the file `path` if anything in them were run."""
    import os

    command = f"touch {path}"
    return [
        pickle.dumps(Calls(os.system, command), 2),
        pickle.dumps(Calls(eval, f"open({str(path)!r}, 'w')"), 2),
        b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93.",
    ]


@pytest.mark.parametrize("index", range(7))
def test_nothing_in_a_pickle_is_run(tmp_path: Path, index: int) -> None:
    made = tmp_path / "made"
    with pytest.raises(ValueError, match=r"batch: .*(system|eval|SHORT_BINUNICODE|OBJ)"):
        read_pickle(touched(made)[index], "batch")
    assert not made.exists()


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
NDARRAY = b"cnumpy\nndarray\n"
ARRAY = RECONSTRUCT + b"(" + NDARRAY + b"(I0\ntU\x01btR"
DTYPE = b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR"


def state(shape: bytes, contents: bytes, dtype: bytes = DTYPE, fortran: bytes = b"\x89") -> bytes:
    return ARRAY + b"(K\x01" + shape + dtype + fortran + short_string(contents) + b"tb."


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (b"cnumpy\nload\n(S'x'\ntR.", "asks for numpy.load"),
        (b"cnumpy.ma.core\n_mareconstruct\n.", "numpy.ma.core._mareconstruct"),
        (b"c__builtin__\neval\n.", "__builtin__.eval"),
        (b"cnumpy\nndarray\n(I9\ntR.", "asks to call numpy.ndarray"),
        (RECONSTRUCT + b"(" + DTYPE + b"tR.", "asks to call numpy.core.multiarray._reconstruct"),
        (NDARRAY + b"}U\x01aK\x01sb.", "BUILD of a _Global"),
        (ARRAY + b"}U\x09__class__K\x01sb.", "state a dict"),
        (b"]}b.", "BUILD of a list"),
        (b"](K\x01tR.", "call of a list"),
        (state(b"K\x02\x85", b"abc"), r"shape \(2,\) with 3 bytes"),
        (
            state(b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86", b"abc"),
            r"shape \(-1, -3\) with 3 bytes",
        ),
        (state(b"(" + b"K\x01" * 9 + b"t", b"a"), "not a few integers"),
        (state(b"U\x01a\x85", b"a"), "not a few integers"),
        (state(b"K\x01\x85", b"a", dtype=DTYPE.replace(b"u1", b"O8")), "not of unsigned bytes"),
        (state(b"K\x01\x85", b"a", fortran=b"\x88"), "not of unsigned bytes in C order"),
        (state(b"K\x01\x85", b"a", dtype=b"N"), "not of unsigned bytes"),
        (b"Pid\n.", "opcode PERSID id"),
        (b"K\x01Q.", "opcode BINPERSID"),
        (b"\x82\x01.", "opcode EXT1 1"),
        (b"\x83\x01\x01.", "opcode EXT2 257"),
        (b"\x84\x01\x01\x01\x01.", "opcode EXT4"),
        (NDARRAY + b")\x81.", "opcode NEWOBJ"),
        (b"T\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
        (b"T\xff\xff\xff\xffabc.", "string4 byte count < 0"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "bytes8"),
        (b"X\xff\xff\xff\xffabc.", "expected 4294967295 bytes"),
        (b"K\x01r\xff\xff\xff\xff0.", "opcode POP"),
        (b"h\x07.", "7"),
        (b"}(K\x01K\x02u.", "key a int"),
        (b"})K\x02s.", "key a tuple"),
        (b"}(U\x01au.", "shorter"),
        (b"e.", "pop from empty list"),
        (b"K\x01a.", "from empty|index out of range"),
        (b"\x85.", "the stack is empty"),
        (b".", "pop from empty list"),
        (b"", "pickle exhausted"),
        (b"\xff\xff", "at position 0, opcode"),
    ],
)
def test_hostile_and_garbled_pickles_are_refused(payload: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^batch: not a pickle of plain values \(.*{message}"):
        read_pickle(payload, "batch")


def test_every_truncation_is_refused() -> None:
    pixels = torch.zeros(2, 4, dtype=torch.uint8)
    whole = python2_batch(b"labels", [1, 2], python2_array(pixels))
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"^batch: not a pickle of plain values"):
            read_pickle(whole[:length], "batch")


def test_a_memo_index_takes_no_memory_and_depth_no_stack() -> None:
    assert read_pickle(b"K\x05r\xff\xff\xff\xffj\xff\xff\xff\xff\x86.", "batch") == (5, 5)
    deep = b")" + b"\x85" * 100_000
    with pytest.raises(ValueError, match="key a tuple"):
        read_pickle(b"}" + deep + b"K\x01s.", "batch")
    with pytest.raises(ValueError, match="not a few integers"):
        read_pickle(state(deep + b"\x85", b"a"), "batch")


def test_archive_members_of_other_names_are_passed_over(tmp_path: Path) -> None:
    spec, form = FORMS[0]
    form, images, _ = write_form(spec, form, tmp_path)
    (tmp_path / form.folder / "readme.html").write_bytes(b"hello")
    form = pack(form, tmp_path)
    splits = cifar.load_cifar(with_form(spec, form), tmp_path)
    assert torch.equal(splits.test.images, images[-PER_FILE:])

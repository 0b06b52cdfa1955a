"""CIFAR's and Fashion-MNIST's own files: read as torchvision reads them, with nothing unpickled, fetched only as published."""

import gzip
import hashlib
import io
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_data import fashion, options

from pipeline.data import cifar, downloads, fashion_mnist, sources
from pipeline.errors import InputError


def python_2(values: dict[str, Any], fortran: bool = False) -> bytes:
    """A pickle as Python 2's cPickle wrote those of CIFAR: protocol 2, lists in parts of 1000, an array by numpy of 2009."""
    puts = iter(range(1, 1_000_000))

    def put() -> bytes:
        number = next(puts)
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def one(value: Any) -> bytes:
        match value:
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                return (
                    b"K" + bytes([value])
                    if 0 <= value < 256
                    else b"M" + struct.pack("<H", value)
                    if value > 0
                    else b"J\xff\xff\xff\xff"
                )
            case str():
                text = value.encode("latin-1")
                return (b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<I", len(text))) + text + put()
            case list():
                parts = (value[start : start + 1000] for start in range(0, len(value), 1000))
                marked = (
                    b"a".join([one(part[0]), b""]) if len(part) == 1 else b"(" + b"".join(map(one, part)) + b"e" for part in parts
                )
                return b"]" + put() + b"".join(marked)
        rows, columns = value.shape
        content = value.tobytes("F" if fortran else "C").decode("latin-1")
        head = b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put() + b"K\x00\x85" + put() + one("b")
        shape = b"(K\x01" + (one(rows) + one(columns)) + b"\x86" + put()
        kind = b"cnumpy\ndtype\n" + put() + one("u1") + b"K\x00K\x01\x87" + put() + b"R" + put()
        kind += b"(K\x03" + one("|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00t" + put() + b"b"
        return head + b"\x87" + put() + b"R" + put() + shape + kind + one(fortran) + one(content) + b"t" + put() + b"b"

    return b"\x80\x02}" + put() + b"(" + b"".join(one(key) + one(value) for key, value in values.items()) + b"u."


def batch(count: int, labels: str, seed: int, classes: int, fortran: bool = False) -> tuple[bytes, np.ndarray, list[int]]:
    draw = np.random.default_rng(seed)
    pixels, names = draw.integers(0, 256, (count, 3072), dtype=np.uint8), [f"{seed}_{index}.png" for index in range(count)]
    numbers = [int(label) for label in draw.permutation(np.arange(count) % classes)]
    values = {"batch_label": "training batch", labels: numbers, "data": pixels, "filenames": names}
    return python_2(values, fortran), pixels, numbers


def small(which: cifar.Published, classes: int) -> tuple[cifar.Published, dict[str, bytes]]:
    """The same with files of some images, one of them with more labels than cPickle puts at once, and their sums."""
    contents = {}
    for seed, name in enumerate(name for names in which.splits.values() for name in names):
        contents[name] = batch(1001 if not seed else 30, which.labels, seed, classes, fortran=seed % 2 == 1)[0]
    contents[which.meta[0]] = python_2({which.names: [f"class {index}" for index in range(classes)], "num_vis": 3072})
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    splits = {split: {name: sums[name] for name in names} for split, names in which.splits.items()}
    return replace(which, splits=splits, meta=(which.meta[0], sums[which.meta[0]])), contents


def archive(entries: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A .tar.gz of files, and of whatever a `TarInfo` says."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, entry in entries.items():
            info = entry if isinstance(entry, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if entry is info else len(entry)
            tar.addfile(info, io.BytesIO(b"" if entry is info else entry))
    return content.getvalue()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that both downloads come from."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for module in (cifar, fashion_mnist):
        monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{server.server_port}/")
    yield folder
    server.shutdown()
    server.server_close()


def published(which: cifar.Published, entries: dict[str, bytes | tarfile.TarInfo], folder: Path) -> cifar.Published:
    """The archive put where it is served from, and what is then said of it."""
    content = archive({f"{which.folder}/{name}": entry for name, entry in entries.items()})
    (folder / which.archive).write_bytes(content)
    return replace(which, size=len(content), digest=f"sha256:{hashlib.sha256(content).hexdigest()}")


@pytest.mark.parametrize(("which", "classes"), [(cifar.CIFAR10, 10), (cifar.CIFAR100, 100)])
def test_cifar_is_read_as_torchvision_reads_it(
    which: cifar.Published, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    made, contents = small(which, classes)
    (tmp_path / made.folder).mkdir()
    for name, content in contents.items():
        (tmp_path / made.folder / name).write_bytes(content)
    theirs: Any = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    for split, files in made.splits.items():
        monkeypatch.setattr(theirs, f"{split}_list", [list(entry) for entry in files.items()])
    monkeypatch.setattr(theirs, "meta", {"filename": made.meta[0], "key": made.names, "md5": made.meta[1]})
    splits, names = cifar.read(made, tmp_path, download=False)
    for split, (images, labels) in splits.items():
        expected = theirs(tmp_path, train=split == "train")
        assert np.array_equal(images, expected.data) and labels.tolist() == expected.targets
        assert images.dtype == np.uint8 and names == tuple(expected.classes)


def test_the_published_files_are_torchvisions() -> None:
    from torchvision import datasets

    for which, theirs in ((cifar.CIFAR10, datasets.CIFAR10), (cifar.CIFAR100, datasets.CIFAR100)):
        assert [list(entry) for entry in which.splits["train"].items()] == theirs.train_list
        assert [list(entry) for entry in which.splits["test"].items()] == theirs.test_list
        meta = {"filename": which.meta[0], "key": which.names, "md5": which.meta[1]}
        assert (meta, which.folder, cifar.URL + which.archive) == (theirs.meta, theirs.base_folder, theirs.url)
    fashions = datasets.FashionMNIST
    assert [(f"{name}.gz", f"{sums[1][4:]}") for name, sums in fashion_mnist.PUBLISHED.items()] == fashions.resources
    assert (list(fashion_mnist.CLASSES), [fashion_mnist.URL]) == (fashions.classes, fashions.mirrors)


def test_fashion_mnist_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    from torchvision import datasets

    fashion(tmp_path)
    for split, (images, labels) in fashion_mnist.read(tmp_path, download=False).items():
        expected = datasets.FashionMNIST(tmp_path, train=split == "train")
        assert np.array_equal(images, expected.data.numpy()) and labels.tolist() == expected.targets.tolist()


def test_nothing_in_a_pickle_is_called(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    hostile = b"\x80\x02}q\x01(U\x04dataq\x02cposix\nsystem\nq\x03U" + bytes([len(f"touch {mark}")]) + f"touch {mark}".encode()
    hostile += b"\x85R" + b"u."
    value = cifar.spelled(hostile)["data"]
    assert (value.name, value.arguments) == ("posix system", (f"touch {mark}",)) and not mark.exists()
    for content in (b"", b".", b"\x80\x04\x8c\x02os\x93.", b"(lp0\n.", b"e.", b"K\x01K\x02b.", b"h\x05.", b"U\xffshort", b"R."):
        with pytest.raises(ValueError):
            cifar.spelled(content)


def test_what_is_missing_or_changed_is_fetched_and_checked(tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, contents = small(cifar.CIFAR10, 10)
    made = published(made, {**contents, "readme.html": b"more"}, served)
    monkeypatch.setattr(cifar, "CIFAR10", made)
    root = tmp_path / "raw"
    with pytest.raises(InputError, match=r"CIFAR10 cannot be read from .* set data\.download: true"):
        sources.load(options("cifar10", root))
    source = sources.load(options("cifar10", root, download=True))
    assert source.classes == tuple(f"class {index}" for index in range(10))
    assert sorted(path.name for path in (root / made.folder).iterdir()) == sorted(contents)
    (served / made.archive).unlink()
    again = sources.load(options("cifar10", root))
    assert np.array_equal(again.splits["test"].images, source.splits["test"].images)
    (root / made.folder / "test_batch").write_bytes(contents["test_batch"][:-1] + b"!")
    with pytest.raises(InputError, match=r"test_batch has the md5"):
        sources.load(options("cifar10", root))
    with pytest.raises(InputError, match=r"404.*: check the network"):
        sources.load(options("cifar10", root, download=True))
    published(made, contents, root)  # by hand
    made = replace(made, digest=f"sha256:{hashlib.sha256((root / made.archive).read_bytes()).hexdigest()}")
    monkeypatch.setattr(cifar, "CIFAR10", made)
    sources.load(options("cifar10", root, download=True))
    assert (root / made.folder / "test_batch").read_bytes() == contents["test_batch"]


@pytest.mark.parametrize(
    "case", ["longer", "shorter", "another sum", "no archive", "link", "device", "huge", "missing", "another file"]
)
def test_a_download_that_is_not_as_published_leaves_nothing(case: str, tmp_path: Path, served: Path, monkeypatch: Any) -> None:
    made, contents = small(cifar.CIFAR10, 10)
    entries: dict[str, bytes | tarfile.TarInfo] = dict(contents)
    if case in ("link", "device"):
        info = tarfile.TarInfo(f"{made.folder}/test_batch")
        info.type, info.linkname = tarfile.SYMTYPE if case == "link" else tarfile.FIFOTYPE, "/etc/passwd"
        entries["test_batch"] = info
    if case == "missing":
        del entries["test_batch"]
    if case == "another file":
        entries["test_batch"] = b"other"
    made = published(made, entries, served)
    if case == "longer":
        made = replace(made, size=made.size - 1)
    if case == "shorter":
        made = replace(made, size=made.size + 1)
    if case == "another sum":
        made = replace(made, digest="sha256:" + 64 * "0")
    if case == "no archive":
        (served / made.archive).write_bytes(b"hello")
        made = replace(made, size=5, digest=f"sha256:{hashlib.sha256(b'hello').hexdigest()}")
    if case == "huge":
        monkeypatch.setattr(cifar, "LARGEST", 1000)
    monkeypatch.setattr(cifar, "CIFAR10", made)
    with pytest.raises(InputError, match="CIFAR10 cannot be read"):
        sources.load(options("cifar10", tmp_path / "raw", download=True))
    assert not (tmp_path / "raw").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    way_out = tarfile.TarInfo("batch")
    way_out.type, way_out.linkname = tarfile.SYMTYPE, str(tmp_path)
    content = archive({"../escaped": b"x", "/absolute": b"x", "link": way_out, "batch/escaped": b"x", "batch/one": b"1"})
    assert downloads.members(content, ["batch/one"], 10) == {"batch/one": b"1"}
    with pytest.raises(ValueError, match="no plain file"):
        downloads.members(archive({"batch/one": b"12345"}), ["batch/one"], 4)


def test_fashion_mnist_is_fetched_and_checked(tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fashion(tmp_path / "other")
    raw, sums = tmp_path / "other/FashionMNIST/raw", {}
    for name in fashion_mnist.PUBLISHED:
        inside = (raw / name).read_bytes()
        content = gzip.compress(inside)
        (served / f"{name}.gz").write_bytes(content)
        sums[name] = (len(content), f"md5:{hashlib.md5(content).hexdigest()}", len(inside))
    monkeypatch.setattr(fashion_mnist, "PUBLISHED", sums)
    source = sources.load(options("fashion_mnist", tmp_path / "raw", download=True))
    assert len(source.splits["train"].labels) == 40 and source.classes == fashion_mnist.CLASSES
    assert {path.name: path.read_bytes() for path in (tmp_path / "raw/FashionMNIST/raw").iterdir()} == {
        name: (raw / name).read_bytes() for name in sums
    }
    for name, change in (("train-labels-idx1-ubyte", lambda size, md5, inside: (size, md5, inside - 1)),
                         ("t10k-labels-idx1-ubyte", lambda size, md5, inside: (size, "md5:" + 32 * "0", inside))):  # fmt: skip
        monkeypatch.setattr(fashion_mnist, "PUBLISHED", {**sums, name: change(*sums[name])})
        (tmp_path / "raw/FashionMNIST/raw" / name).unlink()
        with pytest.raises(InputError, match="FashionMNIST cannot be read"):
            sources.load(options("fashion_mnist", tmp_path / "raw", download=True))
        assert not (tmp_path / "raw/FashionMNIST/raw" / name).exists()
        (tmp_path / "raw/FashionMNIST/raw" / name).write_bytes((raw / name).read_bytes())


def test_a_gzip_file_that_unpacks_to_more_than_it_should_is_not_unpacked() -> None:
    with pytest.raises(ValueError, match="does not hold 10 bytes"):
        downloads.inflated(gzip.compress(bytes(100_000_000), 1), 10)
    with pytest.raises(ValueError, match="no gzip file"):
        downloads.inflated(b"hello", 10)

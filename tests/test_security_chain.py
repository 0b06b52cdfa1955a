"""Nothing that the chain writes is pickled, and names that come from data are text wherever they are shown."""

import contextlib
import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_chain
import torch
import yaml
from PIL import Image

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
]


def pickles(content: bytes, name: str = "") -> list[str]:
    """Where `content` is pickled, or holds something that is: members of zip files, arrays of objects, streams within it."""
    found = [name] if re.search(r"\.(pkl|pickle|pt|pth|ckpt|joblib|dill)$", name) else []
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return found + [place for member in archive.namelist() for place in pickles(archive.read(member), f"{name}/{member}")]
    if content[:6] == b"\x93NUMPY":
        try:
            np.load(io.BytesIO(content), allow_pickle=False)
        except ValueError:
            return [*found, name]
        return found
    starts = [match.start() for match in re.finditer(rb"\x80[\x02-\x05]", content)]
    starts += [0] if re.match(rb"[(\]}cicI-NPSVX]", content) else []  # older forms have no mark at their beginning
    return found + [f"{name} from byte {start} on" for start in starts if spells_something(content[start:])]


def spells_something(content: bytes) -> bool:
    """Whether it begins with a pickle that does more than hold a number or two, which bytes of weights may look like."""
    names = []
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ValueError, IndexError, UnicodeDecodeError, OverflowError):
        for opcode, _, _ in pickletools.genops(content):
            names.append(opcode.name)
            if opcode.name == "STOP":
                return len(names) > 6 or bool({"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ"} & set(names))
    return False


def torch_file(new: bool) -> bytes:
    content = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, content, _use_new_zipfile_serialization=new)
    return content.getvalue()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_scan_finds_pickles_alone_and_hidden(protocol: int) -> None:
    for value in ({"a": [1, 2, 3], "b": "c"}, Path("x"), np.ones(3), ["text", 1.5, None]):
        assert pickles(pickle.dumps(value, protocol), "model.bin")
        if protocol > 1:
            assert pickles(b"some header\n" + pickle.dumps(value, protocol) + b"and more", "model.onnx")


def test_the_scan_finds_files_of_others_and_lets_ours_pass() -> None:
    objects, plain, nested = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([{}, []], dtype=object), allow_pickle=True)
    np.save(plain, np.arange(1000), allow_pickle=False)
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("inner.npy", objects.getvalue())
    assert all(pickles(content) for content in (objects.getvalue(), nested.getvalue(), torch_file(True), torch_file(False)))
    noise = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8).tobytes()
    assert not pickles(noise) and not pickles(plain.getvalue()) and not pickles(b'{"a": 1}') and not pickles(b"(text)\n1.5 N.")


NASTY = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)<script>",
    'it\'s "one" & {two}\\n',
    "line\nbreak\t,;$(touch ran)`touch ran`",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole chain, published and ready to be served, on pictures of classes with unfriendly names."""
    folder = tmp_path_factory.mktemp("chain")
    draw = np.random.default_rng(0)
    for index, name in enumerate(NASTY):
        (folder / "raw" / name).mkdir(parents=True)
        for number in range(30):
            pixels = draw.integers(0, 40, (16, 16), dtype=np.uint8) + np.uint8(70 * index)
            Image.fromarray(pixels).save(folder / "raw" / name / f"{number} <b>&.png")
    params = small_chain.parameters()
    params["data"] |= {"name": "folder", "validation": 0.3, "test": 0.3}
    params["train"]["fit"] |= {"epochs": 4, "batch_size": 8}
    params["export"] |= {"max_loss": 0.99, "int8": params["export"]["int8"] | {"images": 16}}
    params["variants"]["compress"] = ["none"]
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        small_chain.write_parameters(folder, params)
        Path("data/start").mkdir(parents=True)
        for words in [*small_chain.CHAIN, ("repository",), ("report",), ("track",)]:
            assert small_chain.call(*words) == 0, words
    yield folder


def test_nothing_that_is_written_is_pickled(built: Path) -> None:
    paths = [path for path in built.rglob("*") if path.is_file() and "raw" not in path.relative_to(built).parts]
    kinds = {path.suffix for path in paths}
    assert {".onnx", ".safetensors", ".npy", ".json", ".html", ".db", ".pbtxt", ".md"} <= kinds
    assert any("mlartifacts" in path.parts for path in paths)
    assert [place for path in paths for place in pickles(path.read_bytes(), str(path.relative_to(built)))] == []
    for path in paths:
        if path.name == "MLmodel":
            assert "cloudpickle" not in path.read_text() and yaml.safe_load(path.read_text())["flavors"].keys() <= {
                "onnx",
                "python_function",
            }


class Page(HTMLParser):
    """The elements of a page, and the texts between them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        (self.scripts if self.elements and self.elements[-1][0] == "script" else self.texts).append(data)


def harm(text: str) -> list[Any]:
    """What of the unfriendly names a browser would take for elements, attributes or scripts."""
    page = Page()
    page.feed(f"{text}</script>")  # an open one would swallow the rest unread
    found: list[Any] = [attributes for _, attributes in page.elements if any(key.startswith("on") for key in attributes)]
    found += [attributes for _, attributes in page.elements if attributes.get("src") == "x"]
    return found + [script for script in page.scripts if script.strip().startswith("alert(1)")]


def test_names_from_data_are_text_on_the_page(built: Path) -> None:
    assert all(harm(f"<p>{name}</p>") for name in NASTY[:2])
    text = (built / "outputs/report/index.html").read_text()
    assert harm(text) == []
    page = Page()
    page.feed(f"{text}</script>")  # an open one would swallow the rest unread
    shown = "".join(page.texts) + "".join(str(value) for _, attributes in page.elements for value in attributes.values())
    assert "onerror=alert(1)" in shown  # it is there, as text


def test_names_from_data_run_nothing_and_come_back_from_what_is_served(built: Path) -> None:
    import onnx

    assert not list(built.rglob("ran"))
    graphs = list((built / "repository").rglob("*.onnx"))
    assert graphs
    classes = {tuple(json.loads(next(p.value for p in onnx.load(path).metadata_props if p.key == "classes"))) for path in graphs}
    assert classes == {tuple(sorted(NASTY))}
    for path in (built / "repository").rglob("labels.txt"):
        assert len(path.read_text().splitlines()) == len(NASTY), "Triton reads a label a line"

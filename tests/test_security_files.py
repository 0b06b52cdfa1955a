"""Models, weights, pictures and archives of others: what they hold is data, checked before it is used."""

import json
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raw_data
import torch
from PIL import Image

from pipeline import checkpoint, files, weights
from pipeline.data import batches, carvana, nyu_v2, sources, stream
from pipeline.data.batches import Prepared
from pipeline.data.prepare import prepare
from pipeline.errors import InputError

DEEP = 200_000
CARDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "network elsewhere": lambda card: card["network"].update(name="../../../tmp/evil"),
    "network of the library": lambda card: card["network"].update(name="os"),
    "network's package": lambda card: card["network"].update(name="__init__"),
    "network with points": lambda card: card["network"].update(name="resnet.torch"),
    "expansion elsewhere": lambda card: card.update(expansion={"method": "..revive.restart", "arguments": {}}),
    "expansion's private part": lambda card: card.update(expansion={"method": "kflo", "arguments": {"__class__": 1}}),
    "endless network": lambda card: card.update(network={"name": "resnet", "arguments": {"depth": 120_002}}),
    "endless arguments": lambda card: card.update(network={"name": "resnet", "arguments": {"depth": [[[10**9]]]}}),
    "endless channels": lambda card: card["channels"]["filtering"].update(
        {next(iter(card["channels"]["filtering"])): [1, 10**12, 1]}
    ),
    "endless expansion": lambda card: card.update(expansion={"method": "kflo", "arguments": {"depth": 10**8}}),
    "layer that is no layer": lambda card: card["channels"]["filtering"].update({"__init__.__globals__": [1, 1, 1]}),
    "not a number": lambda card: card["input"].update(mean=[float("nan")]),
}


@pytest.fixture
def model(tmp_path: Path, prepared: Prepared) -> Path:
    card = checkpoint.new_card({"name": "cifar_quick", "arguments": {}}, prepared)
    checkpoint.save(tmp_path / "model", checkpoint.build(card), card)
    return tmp_path / "model"


@pytest.mark.parametrize("case", CARDS)
def test_a_card_is_data_that_is_checked_before_anything_is_built(case: str, model: Path) -> None:
    checkpoint.load(model)
    card = files.read_json(model / "model.json")
    CARDS[case](card)
    (model / "model.json").write_text(json.dumps(card))
    before, begun = set(sys.modules), time.perf_counter()
    with pytest.raises(InputError, match=r"model\.json is damaged"):
        checkpoint.load(model)
    assert time.perf_counter() - begun < 2
    assert not {name for name in set(sys.modules) - before if not name.startswith("pipeline.")}


@pytest.mark.parametrize(
    "content", ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "1" * 10_000, "NaN", "", "\x00", '"\\ud800"']
)
def test_a_card_that_is_no_card_is_refused(content: str, model: Path) -> None:
    (model / "model.json").write_text(content)
    with pytest.raises(InputError, match=r"model\.json is (damaged|not valid JSON)"):
        checkpoint.load(model)


def headed(header: bytes) -> bytes:
    """A safetensors file without values."""
    return struct.pack("<Q", len(header)) + header


HEADERS = {
    "longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "tensor beyond the end": headed(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
    "negative": headed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'),
    "a pickle": pickle.dumps({"a": Path("x")}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_weights_that_say_what_is_not_there_are_refused(case: str, model: Path) -> None:
    (model / "model.safetensors").write_bytes(HEADERS[case])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        checkpoint.load(model)


class Harmful:
    """What unpickling it does is to leave a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_a_weight_file_of_others_runs_nothing(suffix: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / f"weights{suffix}"
    for write in (lambda: torch.save({"a": Harmful(mark)}, path), lambda: path.write_bytes(pickle.dumps(Harmful(mark)))):
        write()
        with pytest.raises(InputError, match="cannot be read as one"):
            weights.read(path)
        assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # as others would have read it


def test_a_picture_that_is_a_program_is_not_handed_to_what_runs_it(tmp_path: Path) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (w) file closefile showpage\n%%EOF\n"
    path = tmp_path / "picture.png"
    path.write_bytes(program)
    with Image.open(path) as image:
        assert image.format == "EPS"
    for read in (stream.header, lambda path: stream.decode(path, program, 3, None), nyu_v2.read_depth, carvana.read_mask):
        with pytest.raises(InputError, match=r"picture\.png cannot be read as"):
            read(path)


def test_lists_of_files_cannot_lead_out_of_their_folder(tmp_path: Path) -> None:
    outside = raw_data.nyu_v2(tmp_path / "raw")
    assert outside
    Image.new("L", (32, 24)).save(tmp_path / "secret.png")
    listed = tmp_path / "raw/data/nyu2_test.csv"
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        listed.write_text(f"{name},{name}\n")
        with pytest.raises(InputError, match=r"nyu2_test\.csv, line 1: .* leads out of"):
            nyu_v2.load(raw_data.options("nyu_v2", tmp_path / "raw"))
    streamed = raw_data.image_folder(tmp_path / "pictures")
    prepare(raw_data.options("folder", streamed, storage="stream", image_size=8), tmp_path / "out")
    path = tmp_path / "out/test_files.json"
    told, data = json.loads(path.read_text()), batches.load(tmp_path / "out")
    for name in ("../secret.png", str(tmp_path / "secret.png"), 7):
        path.write_text(json.dumps(told | {"paths": [name, *told["paths"][1:]]}))
        with pytest.raises(InputError, match=r"test_files\.json is damaged \(it lists files outside"):
            batches.Batches(data, "test", 4, "cpu", None, shuffle=False, seed=0)


def test_an_archive_of_arrays_is_not_unpacked_beyond_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(
        path, **{f"{split}_{kind}": np.zeros(10**6, np.uint8) for split in ("train", "test") for kind in ("images", "labels")}
    )
    monkeypatch.setattr(sources, "LIMIT", 10**6)
    with pytest.raises(InputError, match="unpacks to more than 1000000 bytes"):
        sources.load(raw_data.options("cifar10", path))

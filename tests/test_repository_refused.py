"""Model repositories that are damaged, foreign or wrongly asked for: refused, with nothing lost."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import sample_records
from onnx import TensorProto, helper
from test_repository import CHAMPION, NOBODY, Grid, describe

from pipeline import triton_config
from pipeline.errors import InputError


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path)


def _foreign(grid: Grid) -> None:
    (grid.folder / "thesis").mkdir()


def _file(grid: Grid) -> None:
    (grid.folder / "notes.txt").write_text("mine")


def _config(grid: Grid) -> None:
    (grid.folder / "champion/config.pbtxt").write_text('name: "champion"\nbackend: [')


def _unknown(grid: Grid) -> None:
    (grid.folder / "champion/config.pbtxt").write_text('name: "champion"\nbackends: "x"')


def _other(grid: Grid) -> None:
    (grid.folder / "champion/config.pbtxt").write_text('name: "another"')


def _version(grid: Grid) -> None:
    (grid.folder / "champion/2").mkdir()
    (grid.folder / "champion/2/model.onnx").write_bytes(b"mine")


def _changed(grid: Grid) -> None:
    path = grid.folder / "champion/1/model.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def _missing(grid: Grid) -> None:
    (grid.outputs / "export/finetune-none-0/int8/pictures.onnx").unlink()


def _strange(grid: Grid) -> None:
    path = grid.outputs / "export/finetune-none-0/int8/pictures.onnx"
    onnx.save_model(onnx.load_model_from_string(sample_records.pictures_bytes()), path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_foreign, "thesis has no config.pbtxt, so "),
        (_file, "notes.txt is a file, so "),
        (_config, r"champion is damaged: .*config.pbtxt.*\(.*move the folder away"),
        (_unknown, r"2:1 : .*has no field named \"backends\""),
        (_other, "is that of the model 'another'"),
        (_version, "champion/2 was not written by this stage"),
        (_changed, "champion/1/model.onnx is not what version.json says"),
        (_missing, "int8/pictures.onnx is missing"),
        (_strange, "int8/pictures.onnx was not exported by Winnow"),
    ],
)
def test_what_is_damaged_or_foreign_is_refused_and_nothing_is_lost(harm, said, grid):
    grid.write()
    harm(grid)
    before = grid.tree()
    grid.rebuild("finetune-diet-0")
    with pytest.raises(InputError, match=said):
        grid.write()
    assert grid.tree() == before


def test_names_that_are_no_safe_folders_and_names_that_meet_are_refused(grid):
    for revive in ("..", "../up", "a/b", ".hidden", "a b", "é", ""):
        chain = replace(grid.chains[0], revive=revive)
        with pytest.raises(InputError, match="is no name for a folder"):
            grid.write(NOBODY, [chain])
    with pytest.raises(InputError, match="two models of the repository are called"):
        grid.write(NOBODY, grid.chains[:1] * 2)
    with pytest.raises(InputError, match="finetune-takeover-0 is no variant of the present grid"):
        grid.write(CHAMPION | {"champion": "finetune-takeover-0"})
    assert not grid.folder.exists()


def test_a_file_in_the_place_of_the_repository_is_refused(grid):
    grid.folder.write_text("mine")
    with pytest.raises(InputError, match="is a file where the model repository should be"):
        grid.write()
    assert grid.folder.read_text() == "mine"


def test_a_graph_with_a_fixed_batch_is_refused(tmp_path):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "fixed", values[:1], values[1:])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "model.onnx")
    describe(tmp_path / "model.onnx", "classify", "x")
    with pytest.raises(InputError, match=r"images has the axes \[1, 3\]: the first must be a batch of any size"):
        triton_config.Graph(tmp_path / "model.onnx")

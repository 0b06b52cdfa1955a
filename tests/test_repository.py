"""The model repository for Triton: what its files say, what becomes a version, and what is left alone."""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest
import sample_records
import small_chain
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc.model_config_pb2 import ModelConfig

from pipeline import files, lineage, repository, triton_config
from pipeline.deployment import Repository
from pipeline.lineage import Chain

OPTIONS = {"folder": "repository", "models": "all", "forms": ["pictures", "tensors"], "max_batch": 32}
OPTIONS |= {"queue_delay_us": 700, "tensorrt": False, "versions": 2}
CHAMPION = {"champion": "finetune-diet-0", "feasible": True, "reason": "the best", "nearest": None}
NOBODY = {"champion": None, "feasible": False, "reason": "none is small enough", "nearest": "finetune-diet-0"}
PICTURES = """
name: "finetune-none-0" backend: "onnxruntime" max_batch_size: 32
input { name: "pictures" data_type: TYPE_UINT8 dims: [-1, -1, 1] }
output { name: "probabilities" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }
output { name: "logits" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }
version_policy { latest { num_versions: 1 } }
instance_group { count: 1 kind: KIND_GPU }
dynamic_batching { preferred_batch_size: [8, 16, 32] max_queue_delay_microseconds: 700 }
model_warmup { name: "batch of 1" batch_size: 1
  inputs { key: "pictures" value { data_type: TYPE_UINT8 dims: [4, 4, 1] zero_data: true } } }
model_warmup { name: "batch of 32" batch_size: 32
  inputs { key: "pictures" value { data_type: TYPE_UINT8 dims: [4, 4, 1] zero_data: true } } }
"""


class Grid:
    """The exports of finetune-none-0 and finetune-diet-0 in fp32 and int8, and a repository made of them."""

    def __init__(self, root: Path) -> None:
        self.outputs, self.folder = root / "outputs", root / "repository"
        records = sample_records.grid((0,), ("finetune",), ("none", "diet"), ("fp32", "int8"))
        sample_records.write(records, self.outputs)
        self.chains = lineage.chains(records)
        for path in self.outputs.glob("export/*/*/*.onnx"):
            describe(path, "classify", mark=path.parent.as_posix())

    def write(self, champion: dict[str, Any] = CHAMPION, chains: list[Chain] | None = None, **changes: Any) -> dict[str, bool]:
        """Write the repository; its models, and whether a version was added."""
        options = Repository.model_validate(OPTIONS | changes)
        done, self.others = repository.write(chains or self.chains, champion, self.outputs, self.folder, options)
        return {f"{model.name} {model.version}": model.added for model in done}

    def rebuild(self, variant: str = "finetune-none-0", precision: str = "fp32", mark: str = "again", **changes: Any) -> None:
        """Export other bytes, as a new training would."""
        describe(self.outputs / "export" / variant / precision / "pictures.onnx", "classify", mark=mark, **changes)

    def tree(self) -> dict[str, bytes]:
        """All files of the repository, hidden ones too, but for its lock."""
        paths = (path for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def versions(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name).iterdir() if path.is_dir() and path.name != "configs")


def describe(path: Path, task: str, mark: str, classes: tuple[str, ...] = ("zero", "one", "two")) -> None:
    """Give an ONNX file the metadata of an export; `mark` tells files of one network apart."""
    proto = onnx.load_model(path)
    texts = {"network": "{}", "classes": files.as_json(classes).decode(), "mean": "[0.25]", "std": "[0.5]", "shape": "[1, 4, 4]"}
    texts |= {"crop": "null", "lineage": f'{{"mark": "{mark}"}}', "format": "1", "task": task, "producer": "winnow"}
    helper.set_model_props(proto, texts)
    onnx.save_model(proto, path)


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path)


def config_of(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


def test_every_variant_precision_and_form_is_a_model_and_so_is_the_champion(grid):
    assert grid.write() == {
        f"{name} 1": True
        for variant in ("finetune-none-0", "finetune-diet-0")
        for name in (variant, f"{variant}-tensors", f"{variant}-int8", f"{variant}-int8-tensors")
    } | {"champion 1": True}
    for place in grid.folder.iterdir():
        if place.name != ".lock":
            assert {path.name for path in place.iterdir()} == {"1", "config.pbtxt", "configs", "labels.txt"}
            assert {path.name for path in (place / "1").iterdir()} == {"model.onnx", "MODEL_CARD.md", "version.json"}
            assert (place / "labels.txt").read_text() == "zero\none\ntwo\n"
    source = grid.outputs / "export/finetune-diet-0"
    assert (grid.folder / "champion/1/model.onnx").read_bytes() == (source / "fp32/pictures.onnx").read_bytes()
    tensors = grid.folder / "finetune-diet-0-int8-tensors/1/model.onnx"
    assert tensors.read_bytes() == (source / "int8/model.onnx").read_bytes()


def test_the_configuration_is_what_the_graph_takes_and_gives(grid):
    grid.write()
    wanted = config_of(PICTURES)
    assert config_of((grid.folder / "finetune-none-0/config.pbtxt").read_text()) == wanted
    cpu = config_of(PICTURES.replace("KIND_GPU", "KIND_CPU"))
    assert config_of((grid.folder / "finetune-none-0/configs/cpu.pbtxt").read_text()) == cpu
    tensors = triton_config.parse(grid.folder / "finetune-none-0-tensors/config.pbtxt")
    (images,), (logits,) = tensors.input, tensors.output
    assert (images.name, images.data_type, list(images.dims)) == ("images", 11, [1, 4, 4])  # 11: TYPE_FP32
    assert (logits.name, list(logits.dims), logits.label_filename) == ("logits", [3], "labels.txt")


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_what_has_no_classes_has_no_labels_and_free_axes_of_its_pictures(task, tmp_path):
    names = {"segment": ["probabilities", "logits"], "depth": ["depth"]}[task]
    given = helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["n", "h", "w", 1])
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, "h", "w"]) for name in names]
    nodes = [helper.make_node("Cast", ["pictures"], ["float"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Transpose", ["float"], [name], perm=[0, 3, 1, 2]) for name in names]
    made = helper.make_model(helper.make_graph(nodes, task, [given], told), opset_imports=[helper.make_opsetid("", 20)])
    path = tmp_path / "pictures.onnx"
    onnx.save_model(made, path)
    describe(path, task, "x", classes=())
    graph = triton_config.Graph(path)
    found = triton_config.config("m", graph, Repository.model_validate(OPTIONS), precision="fp32", versions=1, gpu=True)
    assert [(output.name, list(output.dims), output.label_filename) for output in found.output] == [
        (n, [1, -1, -1], "") for n in names
    ]
    assert list(found.input[0].dims) == [-1, -1, 1]


def test_batches_and_tensorrt_are_options(grid):
    grid.write(max_batch=1, tensorrt=True)
    alone = triton_config.parse(grid.folder / "finetune-none-0/config.pbtxt")
    assert not alone.HasField("dynamic_batching")
    assert [warm.batch_size for warm in alone.model_warmup] == [1]
    (fast,) = alone.optimization.execution_accelerators.gpu_execution_accelerator
    assert (fast.name, dict(fast.parameters)) == ("tensorrt", {"precision_mode": "FP32"})
    for other in ("finetune-none-0-int8/config.pbtxt", "finetune-none-0/configs/cpu.pbtxt"):  # TensorRT takes no zero points
        assert not triton_config.parse(grid.folder / other).HasField("optimization")


def test_equal_bytes_add_nothing_and_others_become_the_next_version(grid):
    grid.write()
    before = grid.tree()
    assert not any(grid.write().values())
    assert grid.tree() == before
    for version in (2, 3):
        grid.rebuild(mark=f"build {version}")
        added = [name for name, new in grid.write().items() if new]
        assert added == [f"finetune-none-0 {version}"]
    after = grid.tree()
    assert grid.versions("finetune-none-0") == ["1", "2", "3"]
    kept = {name for name in before if name != "finetune-none-0/config.pbtxt" and name != "finetune-none-0/configs/cpu.pbtxt"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert triton_config.parse(grid.folder / "finetune-none-0/config.pbtxt").version_policy.latest.num_versions == 2


def test_a_version_with_other_classes_is_not_served_beside_the_old_one(grid):
    grid.write()
    grid.rebuild(classes=("cat", "dog", "a long\nname"))
    grid.write()
    assert grid.versions("finetune-none-0") == ["1", "2"]
    assert (grid.folder / "finetune-none-0/labels.txt").read_text() == "cat\ndog\na long name\n"
    assert triton_config.parse(grid.folder / "finetune-none-0/config.pbtxt").version_policy.latest.num_versions == 1


def test_another_choice_is_a_new_version_of_the_champion(grid):
    grid.write()
    assert [name for name, new in grid.write(CHAMPION | {"champion": "finetune-none-0-int8"}).items() if new] == ["champion 2"]
    assert [name for name, new in grid.write(CHAMPION).items() if new] == ["champion 3"]
    assert files.read_json(grid.folder / "champion/2/version.json")["variant"] == "finetune-none-0-int8"
    assert files.sha256(grid.folder / "champion/3/model.onnx") == files.sha256(grid.folder / "champion/1/model.onnx")


def test_another_choice_with_equal_bytes_is_a_new_version_too(grid):
    for variant, precision in (("finetune-diet-0", "fp32"), ("finetune-none-0", "int8")):
        grid.rebuild(variant, precision, mark="the same")
    grid.write()
    assert grid.write(CHAMPION | {"champion": "finetune-none-0-int8"})["champion 2"]
    assert [files.read_json(grid.folder / f"champion/{n}/version.json")["precision"] for n in "12"] == ["fp32", "int8"]


def test_without_a_champion_none_is_written_and_an_earlier_one_stays(grid):
    assert not any(name.startswith("champion") for name in grid.write(NOBODY))
    assert not (grid.folder / "champion").exists()
    grid.write(CHAMPION)
    grid.write(NOBODY)
    assert grid.versions("champion") == ["1"] and grid.others == ["champion"]


def test_the_champion_can_be_the_only_model(grid):
    assert grid.write(models="champion") == {"champion 1": True}


def test_a_full_disk_leaves_the_repository_as_it_was(grid, monkeypatch):
    grid.write(models="champion")
    before, partial = grid.tree(), grid.folder.with_name(".repository.partial")
    grid.rebuild("finetune-diet-0")
    sync = os.fsync

    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name.startswith(".version.json"):
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        grid.write(models="champion")
    assert grid.tree() == before and grid.versions("champion") == ["1"] and not partial.exists()
    monkeypatch.undo()
    partial.mkdir()  # as a killed writer leaves it
    assert grid.write(models="champion") == {"champion 2": True} and not partial.exists()


def test_a_repository_on_another_disk_gets_whole_versions_too(grid):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == grid.outputs.stat().st_dev:
        pytest.skip("needs two file systems")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        grid.folder.symlink_to(folder)
        assert all(grid.write().values())
        grid.rebuild()
        assert grid.write()["finetune-none-0 2"] and grid.others == []
        assert not (grid.folder / ".partial").exists() and files.sha256(grid.folder / "finetune-none-0/2/model.onnx")


def test_writers_at_once_add_each_version_once(grid):
    grid.write()
    grid.rebuild()
    results: list[dict[str, bool]] = []
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        results.append(Grid.write(grid))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and sum(result["finetune-none-0 2"] for result in results) == 1
    assert grid.versions("finetune-none-0") == ["1", "2"]


def test_the_stage_says_what_was_added_and_plainly_that_there_is_no_champion(grid, tmp_path, monkeypatch, capsys):
    params = small_chain.parameters() | {"variants": {"revive": ["finetune"], "compress": ["none", "diet"]}}
    small_chain.write_parameters(tmp_path, params)
    monkeypatch.chdir(tmp_path)
    said = []
    for chosen in (CHAMPION, NOBODY):
        files.write_json(tmp_path / "outputs/champion/champion.json", chosen)
        assert small_chain.call("repository") == 0
        said.append(capsys.readouterr().out)
        written = files.read_json(tmp_path / "outputs/repository/written.json")
        assert written["champion"] == chosen["champion"] and written["reason"] == chosen["reason"]
    assert said[0] == "repository: 9 versions added, 0 there already\n"
    assert said[1].startswith(
        "repository: 0 versions added, 8 there already\nno champion: none is small enough; repository/champion is"
    )
    (first,) = (model for model in written["models"] if model["name"] == "finetune-diet-0-int8-tensors")
    source = grid.outputs / "export/finetune-diet-0/int8/model.onnx"
    assert first == {
        "name": "finetune-diet-0-int8-tensors",
        "version": 1,
        "variant": "finetune-diet-0-int8",
        "precision": "int8",
    } | {"form": "tensors", "sha256": files.sha256(source), "added": False}

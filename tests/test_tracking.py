"""Publishing to a real MLflow store in sqlite, made by two processes at once."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_records

from pipeline.deployment import Tracking
from pipeline.errors import InputError
from pipeline.tracking import Published, publish

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
]
ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {"finetune-none-0", "finetune-diet-0"}
STAGES = ["prepare", "train", "revive", "compress", "collapse", "export", "profile"]
PUBLISH = """
import json, sys
from pathlib import Path
from pipeline.deployment import Tracking
from pipeline.tracking import publish
records = json.loads(Path(sys.argv[1], "records.json").read_text())
decision = {"champion": None, "reason": "no rule"}
done = publish(records, Path(sys.argv[1], "outputs"), Tracking(experiment="first", timeout_s=5), sys.argv[2], decision)
print(done.added, done.unchanged)
"""


def small_grid() -> list[dict[str, Any]]:
    return sample_records.grid((0,), ("finetune",), ("none", "diet"))


class Store:
    """A store on disk; each test has an experiment of its own in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outputs, self.uri = folder, folder / "outputs", f"sqlite:///{folder / 'mlflow.db'}"

    def publish(self, name: str, records: list[dict[str, Any]]) -> Published:
        decision = {"champion": None, "reason": "no rule"}
        return publish(records, self.outputs, Tracking(experiment=name, timeout_s=5), self.uri, decision)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def runs(self, name: str) -> list[Any]:
        return list(self.client.search_runs([self.client.get_experiment_by_name(name).experiment_id], max_results=1000))

    def tops(self, name: str) -> dict[str, Any]:
        """The top-level runs of the present grid in an experiment, by variant."""
        tops = [run for run in self.runs(name) if "mlflow.parentRunId" not in run.data.tags]
        tops = [run for run in tops if run.data.tags.get("winnow.current") != "false"]
        assert len({run.info.run_name for run in tops}) == len(tops)
        return {run.info.run_name: run for run in tops}

    def stages(self, name: str, top: Any) -> dict[str, Any]:
        """The runs nested below a top-level run by stage."""
        nested = [run for run in self.runs(name) if run.data.tags.get("mlflow.parentRunId") == top.info.run_id]
        return {run.data.tags["winnow.stage"]: run for run in nested}

    def files(self, run: Any, folder: str | None = None) -> set[str]:
        return {entry.path for entry in self.client.list_artifacts(run.info.run_id, folder)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that two processes made and filled at the same time, in folders of their own."""
    made = Store(tmp_path_factory.mktemp("store"))
    sample_records.write(small_grid(), made.outputs)
    (made.folder / "records.json").write_text(json.dumps(small_grid()))
    words = [sys.executable, "-c", PUBLISH, str(made.folder), made.uri]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    where = [made.folder / "here", made.folder / "there"]
    for folder in where:
        folder.mkdir()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(words, cwd=folder, env=environment, **pipes) for folder in where]
    made.said = [process.communicate() for process in both]  # type: ignore[attr-defined]
    made.codes = [process.returncode for process in both]  # type: ignore[attr-defined]
    return made


def test_two_processes_on_a_fresh_store_publish_once_and_say_nothing_else(store):
    assert store.codes == [0, 0], store.said
    assert sorted(out.strip() for out, _ in store.said) == ["0 2", "2 0"]
    assert [error for _, error in store.said] == ["", ""]


def test_each_variant_is_one_run_with_its_stages_nested(store):
    tops = store.tops("first")
    assert tops.keys() == VARIANTS
    assert len(store.runs("first")) == 2 + 2 * len(STAGES)
    for top in tops.values():
        assert sorted(store.stages("first", top)) == sorted(STAGES)
    assert Counter(run.info.status for run in store.runs("first")) == {"FINISHED": 16}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every single value in nested dicts by its dotted path."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}.{key}".lstrip(".")).items()}


def test_a_variants_run_has_every_parameter_of_its_chain(store):
    parameters = store.tops("first")["finetune-diet-0"].data.params
    chain = [entry for entry in small_grid() if "none" not in entry["variant"]]
    assert len(chain) == len(STAGES)
    expected = {key: value for entry in chain for key, value in leaves(entry["parameters"]).items()}
    assert parameters.keys() == expected.keys() | {"precision"} and parameters["precision"] == "fp32"
    for key, value in expected.items():
        assert parameters[key] == (value if isinstance(value, str) else json.dumps(value))


def test_a_variants_run_has_its_final_metrics_under_the_same_few_names(store):
    tops = store.tops("first")
    profile = next(e for e in small_grid() if (e["stage"], e["variant"]) == ("profile", "finetune-diet-0"))["metrics"]
    found = tops["finetune-diet-0"].data.metrics
    timed = {f"{kind}_cpu_b{batch}{end}" for kind, end in (("latency", "_ms"), ("speedup", "")) for batch in (1, 32)}
    assert found.keys() == {"accuracy", "error_percent", "validation_accuracy", "macs", "size_mb", "parameters"} | timed
    assert found.keys() == tops["finetune-none-0"].data.metrics.keys()
    assert (found["accuracy"], found["error_percent"]) == (pytest.approx(0.9805 - 0.0139), pytest.approx(3.34))
    assert (found["macs"], found["latency_cpu_b32_ms"]) == (profile["macs"], profile["latency_cpu_b32_p50_ms"])


def test_curves_have_a_value_at_each_epoch(store):
    compress = store.stages("first", store.tops("first")["finetune-diet-0"])["compress"]
    record = next(e for e in small_grid() if (e["stage"], e["variant"]) == ("compress", "finetune-diet-0"))
    for key in ("train_loss", "validation_accuracy", "lr"):
        points = store.client.get_metric_history(compress.info.run_id, f"epoch/{key}")
        assert [(point.step, point.value) for point in points] == [(row["epoch"], row[key]) for row in record["history"]]
    assert compress.data.metrics["test_accuracy"] == record["metrics"]["test_accuracy"]


def test_runs_name_their_origin(store):
    top = store.tops("first")["finetune-diet-0"]
    tags, record = top.data.tags, small_grid()[0]
    assert tags["mlflow.source.git.commit"] == tags["winnow.commit"] == record["commit"]
    assert [tags[key] for key in ("revive", "compress", "seed", "precision")] == ["finetune", "diet", "0", "fp32"]
    assert tags["winnow.data"] == record["data"]
    assert re.fullmatch("[0-9a-f]{64}", tags["winnow.fingerprint"])
    (dataset,) = top.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", record["data"][:36])
    assert top.info.start_time == 1795260600000  # 2026-11-21 11:30 UTC


def test_artifacts_lie_beside_the_database_and_shared_ones_are_uploaded_once(store):
    assert {"mlruns", "mlartifacts"}.isdisjoint(
        path.name for folder in ("here", "there") for path in (store.folder / folder).iterdir()
    )
    first, second = (store.stages("first", top) for top in store.tops("first").values())
    for stage in STAGES:
        assert "record.json" in store.files(first[stage]) & store.files(second[stage])
    for stage in ("train", "revive"):
        holder, other = sorted((first[stage], second[stage]), key=lambda run: run.data.tags["winnow.files"] != "here")
        assert other.data.tags["winnow.files"] == holder.info.run_id
        assert store.files(holder, "model") == {"model/model.json", "model/model.safetensors"}
        assert store.files(other) == {"record.json"}
    copies = list((store.folder / "mlartifacts").rglob("model.safetensors"))
    assert len(copies) == 1 + 1 + 2 + 2  # train, revive, two of compress, two of collapse
    assert store.files(store.tops("first")["finetune-diet-0"], "plots") == {
        f"plots/{n}.svg" for n in ("accuracy", "loss", "channels", "filters", "widths")
    }


def test_the_logged_model_is_the_exported_file_with_a_signature(store, monkeypatch):
    import mlflow
    import onnxruntime

    top = store.tops("first")["finetune-diet-0"]
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", store.uri)
    info = mlflow.models.get_model_info(f"runs:/{top.info.run_id}/model")
    described = [(spec.name, spec.type.name, spec.shape) for spec in info.signature.inputs.inputs]
    assert described == [("pictures", "uint8", (-1, -1, -1, 1))]
    assert [(spec.name, spec.shape) for spec in info.signature.outputs.inputs] == [("probabilities", (-1, 3)), ("logits", (-1, 3))]
    assert json.loads(info.metadata["classes"]) == ["zero", "one", "two"]
    proto = mlflow.onnx.load_model(f"runs:/{top.info.run_id}/model")
    images = {"pictures": np.random.default_rng(0).integers(0, 256, (3, 5, 7, 1), dtype=np.uint8)}
    file = store.outputs / "export" / "finetune-diet-0" / "fp32" / "pictures.onnx"
    expected, found = (
        onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]) for m in (file, proto.SerializeToString())
    )
    assert np.array_equal(expected.run(None, images)[0], found.run(None, images)[0])


def test_publishing_again_adds_nothing(store):
    before = {run.info.run_id for run in store.runs("first")}
    done = store.publish("first", small_grid())
    assert (done.added, done.replaced, done.unchanged) == (0, 0, 2)
    assert {run.info.run_id for run in store.runs("first")} == before


def test_a_changed_record_replaces_its_variant_alone_and_links_stay_alive(store):
    store.publish("changed", small_grid())
    before = store.tops("changed")
    records = small_grid()
    holder = next(n for n, t in before.items() if store.stages("changed", t)["train"].data.tags["winnow.files"] == "here")
    entry = next(e for e in records if (e["stage"], e["variant"]) == ("export", holder))
    entry["metrics"]["test_accuracy"] = 0.5
    done = store.publish("changed", records)
    after = store.tops("changed")
    assert (done.added, done.replaced, done.unchanged) == (0, 1, 1)
    assert after[holder].data.metrics["accuracy"] == 0.5
    assert after[holder].info.run_id != before[holder].info.run_id
    (other,) = VARIANTS - {holder}
    assert after[other].info.run_id == before[other].info.run_id
    assert len(store.runs("changed")) == 24  # the replaced run and its stages stay
    stale = [run for run in store.runs("changed") if run.data.tags.get("winnow.current") == "false"]
    assert [run.info.run_id for run in stale] == [before[holder].info.run_id]
    living = {run.info.run_id for run in store.runs("changed")}
    assert {run.data.tags.get("winnow.files", "here") for run in store.runs("changed")} - {"here"} <= living
    models = store.client.search_logged_models([done.experiment_id])
    assert {model.source_run_id for model in models} == {run.info.run_id for run in [*stale, *after.values()]}
    assert store.publish("changed", records).unchanged == 2
    assert store.publish("changed", small_grid()).unchanged == 2  # back to the first parameters: the first run is current again
    assert {name: run.info.run_id for name, run in store.tops("changed").items()} == {n: r.info.run_id for n, r in before.items()}


def test_a_publication_that_broke_off_is_repaired(store):
    records = small_grid()
    path = store.outputs / "export" / "finetune-diet-0" / "fp32" / "pictures.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(InputError, match="pictures.onnx is no ONNX file"):
            store.publish("broken", records)
    finally:
        path.write_bytes(whole)
    assert Counter(run.info.status for run in store.tops("broken").values()) == {"FINISHED": 1, "RUNNING": 1}
    store.publish("broken", records)
    top = store.tops("broken")["finetune-diet-0"]
    assert len(store.runs("broken")) == 16 and top.info.status == "FINISHED"
    # Killed between two stages: the fingerprint is there, the end is not.
    store.client.delete_run(store.stages("broken", top)["profile"].info.run_id)
    store.client.update_run(top.info.run_id, status="RUNNING")
    assert store.publish("broken", records).replaced == 1
    assert len(store.runs("broken")) == 16 and {run.info.status for run in store.runs("broken")} == {"FINISHED"}


def test_a_long_parameter_is_cut_and_kept_whole_beside_it(store):
    records = small_grid()[:3] + sample_records.variant("finetune", "none", 0)
    long = ["layer" * 4] * 400
    records[-4]["parameters"]["compress"]["protect"] = long
    sample_records.write(records, store.outputs)
    store.publish("long", records)
    top = store.tops("long")["finetune-none-0"]
    assert len(top.data.params["compress.protect"]) <= 6000 and "whole in the artifacts" in top.data.params["compress.protect"]
    folder = Path(top.info.artifact_uri.removeprefix("file://"))
    assert json.loads(json.loads((folder / "parameters.json").read_text())["compress.protect"]) == long


def test_a_missing_file_is_named_before_anything_is_published(store):
    records = small_grid()
    records[-3]["artifacts"] = ["model/lost.safetensors"]
    with pytest.raises(InputError, match=r"lost\.safetensors is missing"):
        store.publish("lost", records)
    assert store.client.get_experiment_by_name("lost") is None

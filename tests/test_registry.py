"""The registered model in a real MLflow store in sqlite: its versions, their tags, and the alias of the chosen one."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_records

from pipeline.champion import choose
from pipeline.deployment import Champion, Tracking
from pipeline.errors import InputError
from pipeline.tracking import Published, publish
from pipeline.tracking_registry import model_name

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
]
NAME = "grid"
RECORDS = sample_records.grid((0,), ("finetune",), ("diet",), ("fp32", "int8"))
PLAIN = choose(RECORDS, Champion(best="accuracy", at_most={}, at_least={}))  # fp32
SMALL = choose(RECORDS, Champion(best="accuracy", at_most={"size_mb": 0.05}, at_least={}))  # int8
NONE = choose(RECORDS, Champion(best="accuracy", at_most={"size_mb": 0.001}, at_least={}))


class Store:
    """A store on disk with one experiment; the tests below go through its life in their order."""

    def __init__(self, folder: Path) -> None:
        self.outputs, self.uri = folder / "outputs", f"sqlite:///{folder / 'mlflow.db'}"
        sample_records.write(RECORDS, self.outputs)

    def publish(self, decision: dict[str, Any], records: list[dict[str, Any]] = RECORDS) -> Published:
        return publish(records, self.outputs, Tracking(experiment=NAME, timeout_s=5), self.uri, decision)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @property
    def versions(self) -> dict[str, Any]:
        return {str(version.version): version for version in self.client.search_model_versions(f"name = '{NAME}'")}

    def bearer(self) -> Any:
        """The version that bears the alias."""
        return self.client.get_model_version_by_alias(NAME, "champion")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("registry"))
    made.done = made.publish(PLAIN)  # type: ignore[attr-defined]
    return made


def test_each_variant_and_precision_is_a_version_that_names_its_origin(store):
    assert (store.done.added, store.done.model, len(store.versions)) == (2, NAME, 2)
    runs = {run.info.run_name: run for run in store.client.search_runs([store.done.experiment_id], "tags.revive != ''")}
    for version in store.versions.values():
        tags, precision = version.tags, version.tags["precision"]
        run = runs["finetune-diet-0" if precision == "fp32" else "finetune-diet-0-int8"]
        assert version.run_id == run.info.run_id and version.status == "READY"
        assert tags["fingerprint"] == run.data.tags["winnow.fingerprint"]
        assert (tags["variant"], tags["seed"], tags["current"]) == ("finetune-diet-0", "0", "true")
        assert (tags["commit"], tags["data"]) == (RECORDS[0]["commit"], RECORDS[0]["data"])
        path = store.outputs / "export" / "finetune-diet-0" / precision / "pictures.onnx"
        assert tags["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"finetune, then diet, seed 0, in {precision}: test accuracy 96." in version.description
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        assert tags["sha256"] in (folder / "MODEL_CARD.md").read_text()
        assert run.data.tags["precision"] == run.data.params["precision"] == precision
    lost = runs["finetune-diet-0-int8"].data.metrics["precision_loss"]
    assert lost == 0.0028 and "precision_loss" not in runs["finetune-diet-0"].data.metrics


def test_the_alias_is_on_the_chosen_version_with_the_reason_and_serves_the_chosen_file(store, monkeypatch):
    import mlflow
    import onnxruntime

    bearer = store.bearer()
    assert (
        bearer.tags["precision"] == "fp32"
        and bearer.tags["champion"] == PLAIN["reason"]
        and str(bearer.version) == store.done.champion
    )
    assert store.client.get_registered_model(NAME).tags["champion"] == f"finetune-diet-0: {PLAIN['reason']}"
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", store.uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 9, 6, 1), dtype=np.uint8)
    session = onnxruntime.InferenceSession(sample_records.pictures_bytes(), providers=["CPUExecutionProvider"])
    for name, expected in zip(("probabilities", "logits"), session.run(None, {"pictures": pictures}), strict=True):
        assert np.array_equal(loaded.predict({"pictures": pictures})[name], expected)


def test_publishing_again_adds_no_version(store):
    done = store.publish(PLAIN)
    assert (done.unchanged, done.champion, len(store.versions)) == (2, store.done.champion, 2)


def test_the_alias_moves_with_the_choice_and_goes_where_there_is_none(store):
    moved = store.publish(SMALL)
    assert store.bearer().tags["precision"] == "int8" and str(store.bearer().version) == moved.champion
    assert [number for number, v in store.versions.items() if "champion" in v.tags] == [moved.champion]
    gone = store.publish(NONE)
    model = store.client.get_registered_model(NAME)
    assert gone.champion is None and model.aliases == {}
    assert model.tags["champion"] == f"none: {NONE['reason']}" and "nearest: finetune-diet-0-int8" in model.tags["champion"]
    assert len(store.versions) == 2 and not any("champion" in v.tags for v in store.versions.values())


def test_a_variant_built_anew_is_a_new_version_and_the_old_one_stays(store):
    records = copy.deepcopy(RECORDS)
    records[-1]["metrics"]["macs"] += 1
    before = set(store.versions)
    done = store.publish(SMALL, records)
    (new,) = set(store.versions) - before
    assert (done.replaced, done.unchanged, done.champion) == (1, 1, new) and str(store.bearer().version) == new
    old = [v for number, v in store.versions.items() if v.tags["precision"] == "int8" and number != new]
    assert [v.tags["current"] for v in old] == ["false"] and store.versions[new].tags["current"] == "true"
    store.publish(PLAIN)  # back to the first records: their versions are the current ones again
    assert {number for number, v in store.versions.items() if v.tags["current"] == "true"} == before and len(store.versions) == 3


def test_what_an_interruption_left_out_is_added_and_what_others_made_is_left_alone(store):
    theirs = store.client.create_model_version(NAME, "file:///elsewhere", tags={"note": "mine"})
    lost = store.bearer()
    store.client.delete_model_version(NAME, lost.version)  # as if it had ended before this version was made
    done = store.publish(PLAIN)
    assert done.unchanged == 2 and str(store.bearer().version) == done.champion != str(lost.version)
    assert store.bearer().tags["fingerprint"] == lost.tags["fingerprint"]
    assert store.versions[str(theirs.version)].tags == {"note": "mine"}


def test_a_champion_of_another_grid_is_refused(store):
    with pytest.raises(InputError, match="champion other-diet-0 is not of the present grid"):
        store.publish(PLAIN | {"champion": "other-diet-0"})


def test_a_model_can_be_named_as_any_experiment():
    assert (model_name("winnow"), model_name("team/winnow: 'a'")) == ("winnow", "team-winnow- -a-")

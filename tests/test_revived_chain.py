"""The chain, from data to a proven ONNX file, with each revive method at work from the first epoch and on the trained network."""

import contextlib
from pathlib import Path

import pytest
from small_chain import call, parameters, write_parameters
from test_laws import REVIVE

from pipeline import checkpoint, files, methods


def test_every_method_is_tested() -> None:
    assert set(REVIVE) == set(methods.names("revive"))


@pytest.mark.parametrize("method", REVIVE)
def test_the_chain_runs_from_data_to_a_proven_onnx_file(method: str, tmp_path: Path) -> None:
    params = parameters()
    first = {"train_first": True} if method == "restart" else {}
    params["train"] |= {"revive": {"method": method, **REVIVE[method], **first}, "fit": params["train"]["fit"] | {"epochs": 2}}
    params["revive"] = {"again": {"method": method, **REVIVE[method], "fit": params["train"]["fit"] | {"lr": 0.01}}}
    params["variants"] = {"revive": ["again"], "compress": ["none"]}
    params["profile"]["control"] = "again-none"
    with contextlib.chdir(tmp_path):
        Path("data/start").mkdir(parents=True)
        write_parameters(tmp_path, params)
        for stage in (("check",), ("prepare",), ("coverage",), ("train", "0"), ("revive", "again", "0")):
            assert call(*stage) == 0, stage
        for stage in ("compress", "collapse", "export"):
            assert call(stage, "again", "none", "0") == 0, stage
        outputs = tmp_path / "outputs"
        records = [files.read_json(outputs / folder / "record.json") for folder in ("train/0", "revive/again-0")]
        network, _ = checkpoint.load(outputs / "collapse/again-none-0/model")
        exported = files.read_json(outputs / "export/again-none-0/fp32/record.json")["metrics"]
    assert type(network).__name__ == "CifarQuick"
    assert exported["test_accuracy"] == exported["torch_test_accuracy"] and exported["top1_agreement"] == 1
    for record, key in zip(records, ("train", "revive"), strict=True):
        used = record["parameters"][key]["revive"] if key == "train" else record["parameters"][key]
        assert used == {"method": method, **REVIVE[method], **(first if key == "train" else {})} | (
            {"fit": used["fit"]} if "fit" in used else {}
        )
        kinds = [event["kind"] for event in record["events"]]
        assert (method in kinds) is (method != "finetune"), kinds
        assert all(row["filter_norm_p0"] <= row["filter_norm_p50"] <= row["filter_norm_p100"] for row in record["history"])

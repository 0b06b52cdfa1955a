"""Model cards of hand-made records: every figure in them is worked out here."""

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import sample_records
import yaml
from scipy import stats

from pipeline import model_card
from pipeline.card_figures import wilson
from pipeline.data.licences import LICENCES
from pipeline.data.sources import SOURCES
from pipeline.lineage import chains

GRID = sample_records.grid((0, 1), ("restart",), ("diet",), ("fp32", "int8"), idle=True)
CHAMPION = {"champion": "restart-diet-0-int8", "reason": "highest validation accuracy (96.4 %) of all 2"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "model.onnx").write_bytes(sample_records.onnx_bytes())
    (tmp_path / "pictures.onnx").write_bytes(sample_records.pictures_bytes())
    return {name: tmp_path / name for name in ("model.onnx", "pictures.onnx")}


def card(
    name: str, files: dict[str, Path], champion: dict[str, Any] | None = None, records: list | None = None, **more: Any
) -> str:
    chain = next(chain for chain in chains(records or GRID) if chain.name == name)
    return model_card.text(chain, champion or {}, files, **more)


def test_the_head_is_what_model_hubs_read(files):
    _, block, rest = card("restart-diet-0-int8", files).split("---\n", 2)
    head = yaml.safe_load(block)
    assert (head["library_name"], head["pipeline_tag"], head["datasets"]) == ("onnx", "image-classification", ["digits"])
    assert head["tags"] == ["winnow", "onnx", "int8", "revive-restart", "compress-diet"] and head["metrics"] == ["accuracy"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(0.9833 - 0.0139 - 0.0028) and result["dataset"]["split"] == "test"
    assert rest.lstrip().startswith("# restart-diet-0-int8\n")


def test_figures_are_those_of_the_records_with_what_chance_is_worth(files):
    text = card("restart-diet-0-int8", files)
    assert "| accuracy, test | 96.66 % | one seed: spread unknown |" in text
    low, high = stats.binomtest(347, 359).proportion_ci(method="wilson")  # 347 of 359 are 96.66 %
    assert f"95 % interval of a test with 359 images (Wilson): {100 * low:.2f} to {100 * high:.2f} %" in text
    assert "Against fp32 it loses 0.28 points of test accuracy." in text
    assert "same class for 99.44 %, outputs differ by 0.11 at most" in text
    profile = next(r for r in GRID if (r["stage"], r["seed"], r["precision"]) == ("profile", 0, "int8"))["metrics"]
    for setting in ("cpu_b1", "cpu_b1_idle", "cpu_b32"):
        assert f"| ms, {setting} (median) | {profile[f'latency_{setting}_p50_ms']:.3g} |" in text
    assert "Sample CPU, 2 usable cores, 1 threads; Linux 6.1 x86_64; onnxruntime-gpu 1.31.1" in text
    assert "cuda was not measured: onnxruntime finds no CUDA device" in text


def test_several_seeds_give_mean_and_spread(files):
    sibling = next(chain for chain in chains(GRID) if chain.name == "restart-diet-1-int8")
    first, second = 96.66, 96.66 + 0.28
    expected = f"{(first + second) / 2:.2f} ± {0.28 / math.sqrt(2):.2f} % (n = 2)"
    text = card("restart-diet-0-int8", files, siblings=[sibling])
    assert f"| accuracy, test | 96.66 % | {expected} |" in text and "Figures are of one training" not in text


def test_the_interval_is_wilsons():
    for hits, count in ((0, 5), (3, 7), (359, 359)):
        assert wilson(hits / count, count) == pytest.approx(stats.binomtest(hits, count).proportion_ci(method="wilson"), abs=1e-6)


def test_it_says_how_to_load_each_form_and_what_it_weighs(files):
    text = card("restart-diet-0-int8", files)
    assert "- in `pictures`: uint8 (any, any, any, 1)" in text and "- out `probabilities`: float32 (any, 3)" in text
    assert "- in `images`: float32 (any, 1, 4, 4)" in text and "mean [0.25] and std [0.5]" in text and "zero, one, two" in text
    for name, path in files.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"| {name} | {path.stat().st_size} | {digest} |" in text and f'InferenceSession("{name}")' in text


def test_the_choice_is_told_where_it_is_given(files):
    assert "It is the champion of its grid: highest validation accuracy" in card("restart-diet-0-int8", files, CHAMPION)
    other = card("restart-diet-0", files, CHAMPION)
    assert "It is not the champion of its grid; that is restart-diet-0-int8: highest" in other
    assert "Its grid has no champion: none" in card("restart-diet-0", files, {"champion": None, "reason": "none of the 2 keeps"})
    assert "champion" not in card("restart-diet-0", files)


def test_data_lineage_limits_and_licences_are_told(files):
    text = card("restart-diet-0-int8", files)
    assert "Images: 1,222 train, 216 validation, 359 test; 10 classes." in text and "7a4f1e94" * 8 in text
    assert "0123456789abcdef0123456789abcdef01234567" in text and "torch 2.14.1" in text
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block)["compress"]["compress"]["groups"] == 2
    assert "97.0 % of the multiply-adds are in int8. In fp32 stayed: conv1." in text
    assert "calibrated" not in card("restart-diet-0", files)
    assert "No evaluation of fairness" in text and "CC BY 4.0" in text and "https://doi.org/10.24432/C50P49" in text


def test_no_place_of_this_machine_is_told(files, tmp_path):
    records = sample_records.grid((0,), ("restart",), ("diet",))
    records[0]["parameters"]["data"]["root"] = "/home/someone/data"
    records[0]["notes"] = ["/home/someone/data/digits/x.png is left out: it is empty"]
    records[1]["parameters"]["train"]["start"] = "/home/someone/start"
    text = card("restart-diet-0", files, records=records)
    assert "/home" not in text and str(tmp_path) not in text and "x.png is left out" in text


def test_other_tasks_have_their_own_words_and_no_interval_of_images(files):
    names = {"accuracy": "iou", "top1_agreement": "mask_agreement"}
    records = sample_records.grid((0,), ("restart",), ("diet",))
    for record in records:
        for old, new in names.items():
            record["metrics"] = {key.replace(old, new): value for key, value in record["metrics"].items()}
        if record["stage"] == "export":
            record["metrics"]["test_dice"] = 0.99
    text = card("restart-diet-0", files, records=records)
    assert "| IoU, test | 96.94 % |" in text and "| Dice, test | 99 % |" in text and "Wilson" not in text
    assert "pipeline_tag: image-segmentation" in text and "softmax" not in text


def test_the_licence_of_the_code_is_found_or_its_absence_said(tmp_path, files):
    assert model_card.code_licence(tmp_path) is None
    (tmp_path / "LICENSE").write_text("terms")
    assert model_card.code_licence(tmp_path) == "see LICENSE"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nlicense = "MIT"\n')
    assert model_card.code_licence(tmp_path) == "MIT"
    stated = model_card.code_licence(Path(model_card.__file__).resolve().parents[1])
    assert f"Code and weights: {stated or 'no licence is stated'}" in card("restart-diet-0", files)


def test_every_data_set_has_its_licence():
    assert LICENCES.keys() == SOURCES.keys()
    for name, licence in LICENCES.items():
        assert licence.terms and (licence.source or "not known" in licence.terms), name

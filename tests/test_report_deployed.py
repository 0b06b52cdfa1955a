"""Precisions, the champion and the ways to use a network, in the report: against the records, and by running what it shows."""

import base64
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_records
from PIL import Image

from pipeline import report
from pipeline.report import page, plots, rows, summary, table, usage

HOSTILE = "<script>alert(1)</script>\"' onload='x' $title"


def grid(seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    return sample_records.grid(seeds, ("finetune", "restart"), ("none", "diet"), ("fp32", "int8"), idle=True)


def chosen(name: str | None, **facts: Any) -> dict[str, Any]:
    seed, rule = 0, {"best": "accuracy", "at_most": {"size_mb": 0.01}, "at_least": {}}
    return {"champion": name, "reason": "for a reason", "nearest": None, "rule": rule, "seed": seed, "candidates": 8} | facts


def row_of(made: rows.Report, name: str) -> rows.Row:
    return next(row for row in [*made.rows, *made.means] if row.name == name)


def test_each_precision_is_a_row_beside_the_fp32_control():
    made = rows.build(grid())
    assert [row.name for row in made.rows][:2] == ["finetune-none-0", "finetune-none-0-int8"] and len(made.rows) == 8
    assert [row.name for row in made.rows if row.control] == ["finetune-none-0"]
    low, full = row_of(made, "restart-diet-0-int8").values, row_of(made, "restart-diet-0").values
    assert low["accuracy_quantized"] == pytest.approx(-0.0028) and full["accuracy_quantized"] == 0
    assert low["accuracy_change"] == pytest.approx(full["accuracy_change"] - 0.0028)
    assert low["macs_ratio"] == full["macs_ratio"] and low["size_ratio"] == pytest.approx(full["size_ratio"] / 0.27)
    assert low["accuracy_compress"] == full["accuracy_compress"]


def test_means_are_of_one_precision_each():
    made = rows.build(grid((0, 1)), chosen("restart-diet-1-int8", seed=1))
    assert [row.name for row in made.means][-2:] == ["restart-diet", "restart-diet-int8"]
    pair = [row_of(made, f"restart-diet-{seed}-int8").values["size_mb"] for seed in (0, 1)]
    assert row_of(made, "restart-diet-int8").values["size_mb"] == pytest.approx(sum(pair) / 2)
    assert [row.name for row in [*made.rows, *made.means] if made.chosen(row)] == ["restart-diet-1-int8", "restart-diet-int8"]
    shown = page.render(made)
    assert "seed 1; figures over all seeds" in shown
    assert len(re.findall(r"<tr class=champion", shown)) == 2
    assert "restart-diet-int8 ★  int8" in report.format_table(made)


def test_other_settings_are_in_the_stories_and_the_csv_alone():
    made = rows.build(grid())
    assert made.settings == ["cpu_b1", "cpu_b32", "cpu_b1_idle"] and made.plain == ["cpu_b1", "cpu_b32"]
    assert not any("idle" in text for text in [*made.costs, *(column.key for column in table.columns(made))])
    assert not any("idle" in key for key in report.flat_metrics(made)["restart-diet-0"])
    lines = list(csv.DictReader(io.StringIO(report.as_csv(made))))
    assert float(lines[0]["latency_cpu_b1_idle_p50_ms"]) == pytest.approx(0.34)
    assert [line["precision"] for line in lines[:2]] == ["fp32", "int8"]
    assert "int8, CPU batch 1, after a pause" in page.render(made)


def test_a_story_tells_how_each_setting_was_timed():
    records = grid()
    event = {"kind": "latency", "provider": "cuda", "batch": 1, "mode": "graph", "stable": False, "pairs": 4321, "attempts": 3}
    event |= {
        "noise": 0.0725,
        "machine": {"cpu": {"mhz": [2900, 3100]}, "load": 0.5, "gpu": {"sm_mhz": 1755.0, "sm_max_mhz": 1980.0}},
    }
    event["elsewhere"] = {"CPUExecutionProvider": {"Gather": 2}}
    profile = next(r for r in records if (r["stage"], r["variant"], r["precision"]) == ("profile", "restart-diet-0", "int8"))
    profile["events"].append(event)
    profile["metrics"] |= {"latency_cuda_b1_graph_p50_ms": 0.02, "speedup_cuda_b1_graph": 3.0}
    made = rows.build(records)
    line = re.search(r"<tr><th scope=row>int8, CUDA batch 1, as a CUDA graph</th><td>4,321.*?</tr>", page.render(made))
    cells = re.findall("<td>(.*?)</td>", line[0] if line else "")
    assert cells[:6] == ["4,321", "3", "7.2 %", "2,900 to 3,100", "0.5", "1755 of 1980 MHz"] and "Gather" in cells[7]
    assert "~0.0200 ms" in page.render(made)


def test_a_champion_heads_the_page_with_its_reason_and_limits():
    made = rows.build(grid(), chosen("restart-diet-0-int8", values={"size_mb": 0.0064}))
    head = summary.champion(made)
    assert "★ Champion" in head and "For a reason." in head and "size (MB): 0.0064 ≤ 0.01" in head and "✗" not in head
    assert (
        f'href="#{re.findall(r"variant[0-9p]+", head)[0]}"' in head
        and f'id="{re.findall(r"variant[0-9p]+", head)[0]}"' in page.render(made)
    )


def test_no_champion_is_said_plainly_with_the_nearest_and_what_it_misses():
    told = chosen(None, nearest="restart-diet-0", values={"size_mb": 0.1}, missed={"size_mb": {"value": 0.1, "limit": 0.01}})
    made = rows.build(grid(), told)
    head = summary.champion(made)
    assert "No champion" in head and "restart-diet-0</a>" in head and "0.1 ≤ 0.01" in head and "✗" in head
    assert "★" not in page.render(made).partition("</style>")[2].partition("<script>")[0]
    assert "no champion: for a reason" in report.format_table(made) and "no champion: for a reason" in table.markdown(made)
    assert summary.champion(rows.build(grid())) == "" and "hampion" not in report.format_table(rows.build(grid()))


def test_the_policy_names_the_style_and_script_that_are_there():
    text = page.render(rows.build(grid()))
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text and "unsafe" not in text and not re.search(r"<[^>]* style=", text)


def test_what_records_and_decisions_hold_is_shown_and_never_run():
    records = json.loads(json.dumps(grid()).replace("int8", json.dumps(HOSTILE)[1:-1]).replace("conv1", json.dumps(HOSTILE)[1:-1]))
    decision = chosen(None, nearest=HOSTILE, reason=HOSTILE, rule={"best": HOSTILE, "at_most": {HOSTILE: 1.0}, "at_least": {}})
    for told in (decision, decision | {"champion": HOSTILE}, decision | {"champion": f"restart-diet-0-{HOSTILE}"}):
        text = page.render(rows.build(records, told))
        assert text.count("<script") == 1 and "onload='x'" not in text and "$title" in text
        assert "<script" not in table.markdown(rows.build(records, told))


def test_the_code_for_pictures_classifies_them_with_an_exported_file(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    for name, content in (("pictures.onnx", sample_records.pictures_bytes()), ("model.onnx", sample_records.onnx_bytes())):
        (tmp_path / name).write_bytes(content)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    seen: dict[str, Any] = {"path": tmp_path / "pictures.onnx", "pictures": pixels}
    exec(usage.PICTURES + usage.SEEN["classify"], seen)  # the text that the page shows
    plain: dict[str, Any] = {"path": tmp_path / "model.onnx", "pixels": pixels.transpose(0, 3, 1, 2)}
    exec(usage.TENSORS + usage.ANSWERS["classify"], plain)
    assert seen["answers"] == plain["answers"] and len(seen["answers"]) == 5
    odds = np.exp(plain["logits"])
    assert np.allclose(seen["probabilities"], odds / odds.sum(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(("server", "channels"), [("triton", "RGB"), ("mlflow", "L")])
def test_the_request_that_the_page_shows_holds_the_picture(tmp_path: Path, server: str, channels: str):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    (tmp_path / "request.py").write_text(usage.REQUEST)
    words = [sys.executable, "request.py", "picture.png", channels, server]
    told = json.loads(subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)["inputs"]
    expected = np.atleast_3d(np.asarray(Image.fromarray(pixels).convert(channels)))[None]
    if server == "triton":
        (given,) = told
        assert (given["name"], given["datatype"], given["shape"]) == ("pictures", "UINT8", [1, 3, 5, 3])
        assert np.array_equal(np.reshape(given["data"], given["shape"]), expected)
    else:
        assert np.array_equal(told["pictures"], expected) and expected.shape[-1] == 1


def test_names_of_files_and_served_models_are_those_of_the_layout():
    text = page.render(rows.build(grid(), chosen("restart-diet-0-int8")))
    for form in ("model", "pictures"):
        assert f'href="../export/restart-diet-0/int8/{form}.onnx"' in text
    assert "/v2/models/restart-diet-0-int8/infer" in text and "/v2/models/restart-diet-0-int8-tensors" in text
    assert "tags variant restart-diet-0, precision int8" in text and "/v2/models/champion/infer" in text


def test_plots_tell_precisions_apart_and_draw_each_training_once(tmp_path: Path):
    made = rows.build(grid(), chosen("restart-diet-0-int8"))
    figure = plots.tradeoff(made, "size_mb")
    markers = [line.get_marker() for line in figure.axes[0].get_lines()]
    assert markers.count("*") == 1
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"ring: int8", *(row.name for row in made.rows)}
    report.write(grid(), tmp_path)
    assert len(re.findall(r">(?:finetune|restart)-\w+-0<", (tmp_path / "curves-0.svg").read_text())) == 4

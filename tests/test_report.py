"""The report: figures against hand calculation, the Pareto front against brute force, the page against its promises."""

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_records
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline import lineage, report
from pipeline.report import chart, page, rows, table, tradeoff, usage

VOID = {"meta", "link", "input", "br", "img", "hr"}
coordinate = st.one_of(st.none(), st.integers(0, 4).map(float))


@pytest.fixture
def records() -> list[dict[str, Any]]:
    return sample_records.grid((0,))


def of_stage(records: list[dict], stage: str, variant: str) -> dict[str, Any]:
    return next(record for record in records if (record["stage"], record["variant"]) == (stage, variant))


def without(records: list[dict], stage: str, variant: str) -> list[dict]:
    return [record for record in records if (record["stage"], record["variant"]) != (stage, variant)]


def row_of(made: rows.Report, name: str) -> rows.Row:
    return next(row for row in [*made.rows, *made.means] if row.name == name)


@given(st.lists(st.tuples(coordinate, coordinate), max_size=12))
def test_pareto_front_is_that_of_brute_force_with_ties_duplicates_and_gaps(points):
    def dominated(point):
        others = [(c, g) for c, g in points if c is not None and g is not None]
        return any(c <= point[0] and g >= point[1] and (c, g) != point for c, g in others)

    expected = [None not in point and not dominated(point) for point in points]
    assert rows.pareto(points) == expected


def test_a_row_holds_the_records_figures_and_ratios_to_the_control(records):
    row = row_of(rows.build(records), "restart-diet-0")
    profile = of_stage(records, "profile", "restart-diet-0")["metrics"]
    control = of_stage(records, "profile", "finetune-none-0")["metrics"]
    assert row.values["accuracy_train"] == 0.975
    assert row.values["accuracy_revive"] == pytest.approx(0.9833)
    assert row.values["accuracy_onnx"] == pytest.approx(0.9833 - 0.0139)
    assert row.values["accuracy_change"] == pytest.approx(0.9833 - 0.0139 - 0.9805)
    assert (row.values["parameters"], row.values["macs"]) == (profile["parameters"], profile["macs"])
    assert row.values["macs_ratio"] == control["macs"] / profile["macs"] > 3
    assert row.values["size_ratio"] == control["size_mb"] / profile["size_mb"] > 3
    assert row.values["speedup_cpu_b1"] == profile["speedup_cpu_b1"]
    assert [row.name for row in rows.build(records).rows if row.control] == ["finetune-none-0"]


def test_means_and_sample_deviations_over_two_seeds_are_those_by_hand():
    made = rows.build(sample_records.grid((0, 1)))
    mean = row_of(made, "restart-diet")
    one, two = (row_of(made, f"restart-diet-{seed}").values for seed in (0, 1))
    assert (len(made.rows), len(made.means), mean.count) == (18, 9, 2)
    for key in ("accuracy_onnx", "latency_cpu_b32_p50_ms", "macs", "speedup_cpu_b1"):
        assert mean.values[key] == pytest.approx((one[key] + two[key]) / 2)
        assert mean.spread[key] == pytest.approx(abs(one[key] - two[key]) / math.sqrt(2), abs=1e-12)  # n - 1 = 1
    assert "latency_cpu_b1_ci_low_ms" not in mean.values
    assert f"{100 * mean.values['accuracy_onnx']:.2f} % ± 0.20" in table.text(made, made.means, table.columns(made))


def test_each_seed_is_compared_with_the_control_of_its_own_seed():
    made = rows.build(sample_records.grid((0, 1)))
    assert row_of(made, "restart-diet-1").values["accuracy_change"] == pytest.approx(0.9833 - 0.0139 - 0.9805)


def test_the_csv_reads_back_as_the_records(records):
    lines = list(csv.DictReader(io.StringIO(report.as_csv(rows.build(records)))))
    assert [line["variant"] for line in lines] == [f"{a}-{b}-0" for a in sample_records.REVIVE for b in sample_records.COMPRESS]
    for line in lines:
        profile = of_stage(records, "profile", line["variant"])["metrics"]
        assert {key: float(line[key]) for key in profile} == profile


def test_metrics_json_has_a_flat_block_a_variant(records):
    block = report.flat_metrics(rows.build(records))["restart-diet-0"]
    assert block["accuracy"] == of_stage(records, "export", "restart-diet-0")["metrics"]["test_accuracy"]
    assert all(isinstance(value, int | float) for value in block.values())
    assert {"macs", "size_mb", "parameters", "latency_cpu_b1_p50_ms", "speedup_cpu_b32"} < block.keys()


def test_what_was_not_measured_is_said_with_its_reason_and_never_zero(records):
    made = rows.build(without(records, "profile", "restart-diet-0"))
    row, text = row_of(made, "restart-diet-0"), report.format_table(made)
    assert "macs" not in row.values and "macs_ratio" not in row.values
    assert made.why_missing(row, "macs") == "not measured: no record of the stage profile for restart-diet-0"
    assert made.why_missing(row, "latency_cuda_b1_p50_ms").startswith("not measured: provider cuda absent")
    line = next(line for line in text.splitlines() if line.startswith("restart-diet-0"))
    assert table.MISSING in line and " 0 " not in line and "0.000" not in line
    assert "provider cuda absent (onnxruntime finds no CUDA device)" in text
    shown = page.render(made)
    assert "no record of the stage profile for restart-diet-0" in shown and "not measured" in shown
    assert "restart-diet-0,restart,diet,0,fp32,1,0,0,0.975," in report.as_csv(made)
    assert ",22140,,0.10056,,0.0,,,," in report.as_csv(made)  # no macs, no latencies


def test_a_mean_lacks_what_any_seed_lacks():
    made = rows.build(without(sample_records.grid((0, 1)), "profile", "restart-diet-1"))
    assert "macs" not in row_of(made, "restart-diet").values
    assert made.why_missing(row_of(made, "restart-diet"), "macs").endswith("for restart-diet-1")


def test_records_of_other_variants_and_seeds_are_left_out_and_the_grid_gives_the_order():
    records = sample_records.grid((0, 1), compress=("none", "diet", "old"))
    chosen = lineage.select(records, ["restart", "finetune"], ["diet", "none"], [0], ["fp32"])
    names = [chain.name for chain in lineage.chains(chosen)]
    assert names == ["restart-diet-0", "restart-none-0", "finetune-diet-0", "finetune-none-0"]
    assert list(lineage.chains(chosen)[0].records) == list(lineage.STAGES)


def test_parameters_are_named_as_in_params_yaml_and_a_conflict_keeps_both(records):
    flat = lineage.flat_parameters(lineage.chains(records)[0].records)
    assert (flat["compress.groups"], flat["train.fit.schedule.every"]) == ("2", "2")
    assert (flat["compress.protect"], flat["data.name"]) == ('["fc1", "fc2"]', "digits")
    a, b = (sample_records.record(s, "x", parameters={"runtime": {"threads": n}}) for s, n in (("train", 1), ("export", 2)))
    assert lineage.flat_parameters({"train": a, "export": b}) == {"runtime.threads": "1", "export.runtime.threads": "2"}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_every_pick_is_on_a_front(figures):
    made = [
        rows.Row(f"r{i}", "c", 0, "fp32", {"accuracy_onnx": a / 10, "size_mb": float(s), "latency_cpu_b1_p50_ms": float(t)}, False)
        for i, (a, s, t) in enumerate(figures)
    ]
    chosen = rows.picks(rows.Report([], made, [], ["cpu_b1"], {}))
    for title, key in (("smallest", "size_mb"), ("fastest", "latency_cpu_b1_p50_ms"), ("most accurate", "size_mb")):
        front = rows.pareto([(row.values[key], row.values["accuracy_onnx"]) for row in made])
        assert front[made.index(chosen[title])]


class Page(HTMLParser):
    """Elements in order, checked to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_page_is_well_formed_and_loads_nothing(seeds):
    made = rows.build(sample_records.grid(seeds))
    text = page.render(made)
    parsed = Page(text)
    assert parsed.open == []
    for tag, attributes in parsed.elements:
        assert tag not in ("img", "iframe", "object", "embed", "video", "audio", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name) or ""
            assert not re.match(r"\s*(\w+:)?//|https?:", value) and (not value or value[0] in "#." or value == "data:,")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    identities = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    links = {attributes["href"] for tag, attributes in parsed.elements if tag == "a"}
    assert {link[1:] for link in links if link and link.startswith("#")} <= set(identities)
    events = [event for chain in made.chains for record in chain.records.values() for event in record["events"] if "epoch" in event]
    narrowed = sum(len(sample_records.LAYERS) for chain in made.chains if chain.compress != "none")  # a pair of bars for each layer
    faster = 2 * sum(not row.control for row in made.rows)  # a bar for each setting
    points = 2 * 9 * 4 + len(events) + narrowed + faster  # MACs, size, two latencies, wide and narrow; triangles at filter norms
    assert sum("point" in (attributes.get("class") or "").split() for _, attributes in parsed.elements) == points


HOSTILE = "<script>alert(1)</script>\"' onload='x' $title"


def test_names_notes_and_parameters_are_shown_and_never_run(records):
    plain = Page(page.render(rows.build(records)))
    named = json.loads(json.dumps(records).replace("restart", json.dumps(HOSTILE)[1:-1]))
    for entry in named:
        entry["notes"] = [HOSTILE]
        entry["parameters"] |= {"extra": {HOSTILE: HOSTILE}}
        entry["layers"] = [layer | {"name": HOSTILE} for layer in entry["layers"]]
    made = rows.build(named)
    hostile = Page(page.render(made))
    scripts = lambda parsed: sum(tag == "script" for tag, _ in parsed.elements)  # noqa: E731
    assert scripts(hostile) == scripts(plain) == 1
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
    assert any(HOSTILE in data for data in hostile.data)
    assert "<script" not in table.markdown(made)
    for drawn in (
        chart.bars([(HOSTILE, 1, 2)]),
        chart.curves([chart.Series(HOSTILE, [1, 2], [1, 2], 0)], [], [(1, HOSTILE)], "y", False),
    ):
        assert "<script" not in chart.standalone(drawn) and ElementTree.fromstring(chart.standalone(drawn)) is not None


def test_equal_records_give_equal_bytes_and_every_file_is_there(tmp_path: Path):
    small = sample_records.grid((0,), ("finetune", "restart"), ("none", "diet"))
    for name in ("one", "two"):
        report.write(json.loads(json.dumps(small)), tmp_path / name)
    found = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    costs = ("macs", "size_mb", "latency_cpu_b1_p50_ms", "latency_cpu_b32_p50_ms")
    plots = {
        f"{stem}.{form}"
        for stem in ("curves-0", "filters-0", "channels-0", "widths-0", *(f"tradeoff-{c}" for c in costs))
        for form in ("svg", "png")
    }
    assert found.keys() == {"index.html", "table.csv", "table.md", "metrics.json", *plots}
    for name in plots:
        assert ElementTree.fromstring(found[name]) is not None if name.endswith("svg") else found[name].startswith(b"\x89PNG")
    assert all(name.encode() in found["tradeoff-macs.svg"] for name in ("finetune-none-0", "restart-diet-0"))


def test_a_grid_whose_last_stages_never_ran_is_still_reported(tmp_path: Path):
    early = [
        entry for entry in sample_records.grid((0,), ("restart",), ("diet",)) if entry["stage"] in ("train", "revive", "compress")
    ]
    made = report.write(early, tmp_path)
    assert [row.name for row in made.rows] == ["restart-diet-0"] and not made.costs
    assert "no record of the stage export for restart-diet-0" in (tmp_path / "index.html").read_text()


def test_the_terminal_table_has_one_aligned_line_a_variant(records):
    made = rows.build(records)
    lines = table.text(made, made.rows, table.columns(made)).splitlines()
    assert len(lines) == 2 + 9 and len({len(line) for line in lines}) == 1
    assert re.match(r"finetune-none-0 \* +fp32 +98.05 %", lines[2])


def test_the_markdown_table_has_as_many_cells_in_every_line():
    text = table.markdown(rows.build(sample_records.grid((0, 1))))
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(block) for block in blocks] == [2 + 9, 2 + 18, 2 + 18, 2 + 18]  # means; all; along the chain; with intervals
    for block in blocks:
        bars = [[place for place, sign in enumerate(line) if sign == "|"] for line in block]
        assert all(places == bars[0] for places in bars), "aligned"


def test_the_code_on_the_page_classifies_pixels_with_an_exported_file(tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_bytes(sample_records.onnx_bytes())
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 4, 4), dtype=np.uint8)
    names: dict[str, Any] = {"path": path, "pixels": pixels}
    exec(usage.TENSORS + usage.ANSWERS["classify"], names)  # the text that the page shows
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"images": ((pixels / 255 - 0.25) / 0.5).astype(np.float32)})[0]
    assert np.allclose(names["logits"], expected, rtol=1e-5)
    assert names["answers"] == [("zero", "one", "two")[index] for index in expected.argmax(1)]


def test_no_marker_hides_another():
    points = [tradeoff.Point(f"p{i}", x, 0.9, 0, i, False, []) for i, x in enumerate((1.0, 1.0, 1.0001, 2.0))]
    for layout in tradeoff.MARGINS:
        drawn = tradeoff.scatter(points, "x", "y", 1.0, layout)
        places = [float(left) for left in re.findall(r'<circle class="reach" cx="([\d.]+)"', drawn)]
        assert len(places) == 4 and min(abs(a - b) for i, a in enumerate(places) for b in places[:i]) > 2 * tradeoff.SIZE


@pytest.mark.parametrize("values", [[0.2, 3.1], [97.0, 97.0], [1e3, 9e6], [0.5], [-2.0, 5.0]])
def test_axes_hold_all_values_and_their_ticks_are_round_and_inside(values):
    scale = chart.axis(values, 10, 500, may_log=True)
    assert all(10 < scale.at(value) < 500 for value in values)
    found = chart.ticks(scale)
    assert len(found) >= 2 and all(scale.low <= tick <= scale.high for tick in found)
    assert all(len(f"{abs(tick):e}".split("e")[0].rstrip("0").rstrip(".")) <= 5 for tick in found)


def test_the_stage_reports_the_present_grid_alone(tmp_path: Path, monkeypatch, capsys):
    from stages import report as stage

    small = sample_records.grid((0, 1), ("finetune", "restart"), ("none", "diet"), ("fp32", "int8"))
    sample_records.write(small, tmp_path / "outputs")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params |= {"seed": [0], "variants": {"revive": ["finetune"], "compress": ["none", "diet"]}}
    params["export"]["precisions"] = ["fp32"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "outputs/champion").mkdir()
    (tmp_path / "outputs/champion/champion.json").write_text(json.dumps({"champion": "finetune-diet-0", "reason": "so"}))
    monkeypatch.chdir(tmp_path)
    stage.main()
    assert list(json.loads(Path("outputs/report/metrics.json").read_text())) == ["finetune-none-0", "finetune-diet-0"]
    told = capsys.readouterr().out
    assert "finetune-diet-0 ★" in told and "restart" not in told and "outputs/report/index.html" in told
    assert "★ the champion: so" in told and "int8" not in told


def test_the_fastest_is_found_by_paired_ratios_and_the_more_accurate_on_a_tie():
    keys = ("accuracy_onnx", "size_mb", "latency_cpu_b1_p50_ms", "speedup_cpu_b1")
    timed = ((0.8, 0.0385, 1.54), (0.86, 0.0400, 1.54), (0.9, 0.0600, 1.0))  # the first's process ran a little faster
    made = [
        rows.Row(f"r{i}", "c", 0, "fp32", dict(zip(keys, (a, 1.0, t, s), strict=True)), False) for i, (a, t, s) in enumerate(timed)
    ]
    assert rows.picks(rows.Report([], made, [], ["cpu_b1"], {}))["fastest"] is made[1]


def test_a_time_that_stayed_noisy_is_marked_in_the_table_and_in_the_mean():
    records = sample_records.grid(seeds=(0, 1))
    noisy = next(r for r in records if (r["stage"], r["variant"]) == ("profile", "finetune-diet-1"))
    noisy["events"].append({"kind": "latency", "provider": "cpu", "batch": 32, "stable": False})
    text = table.markdown(rows.build(records))
    marked = [line for line in text.splitlines() if re.search(r"\| +~", line)]
    assert [line.split("|")[1].strip() for line in marked] == ["finetune-diet", "finetune-diet-1", "finetune-diet-1"]
    assert all(line.count("~") == 2 for line in marked)  # the latency and the speed-up at batch 32, not at batch 1

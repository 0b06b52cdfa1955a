"""Events of methods in the report, layer by layer: maps, tables and lines against sums over the events themselves."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest
import sample_records

from pipeline import lineage
from pipeline.report import chart, edits, heat, page, rows, section, story

HOSTILE = "<script>alert(1)</script>\"' onload='x' $title"
DEEP = sample_records.deep(199, 109)


def chain_of(revive: str, records: list[dict[str, Any]] | None = None) -> lineage.Chain:
    return lineage.chains(records or sample_records.grid((0,), (revive,), ("none",)))[0]


def deep_chain() -> lineage.Chain:
    return lineage.Chain("evolve", "none", 0, "fp32", {"revive": DEEP})


def drawn(svg: str | None) -> ElementTree.Element:
    assert svg is not None
    return ElementTree.fromstring(svg)


def test_an_event_on_one_line_tells_totals_and_in_how_many_layers():
    assert story.describe(sample_records.edits("restart")[0]) == (
        "epoch 2: restart: filters 41, validation accuracy after 31.00 %, in 3 layers, mean norm of filters 0.762 → 2.25"
    )
    line = story.describe(DEEP["events"][0])
    assert line.startswith("epoch 1: weight_evolution: share 0.3, filters ") and len(line) < 160
    layers = [
        {"name": f"c{i}", "weight": 0.4 + i / 1000, "entropy": 1.0, "mean_norm_before": 1, "mean_norm_after": 3} for i in range(100)
    ]
    line = story.describe({"kind": "grafting", "epoch": 3, "round": 1, "layers": layers})
    assert line == "epoch 3: grafting: in 100 layers, mean norm of filters 1 → 3, own share 0.40 to 0.50"
    closed = [{"name": f"c{i}", "open": 3, "inputs": 4} for i in range(100)]
    assert story.describe({"kind": "dealloc", "layers": closed, "open": 300}) == "dealloc: open 300, in 100 layers"
    surgery = story.describe({"kind": "surgery", "removed": {f"c{i}": i % 2 for i in range(100)}})
    assert surgery == "surgery: removed 50 in 50 of 100"
    assert len(story.describe({"kind": "diet", "full_width": [f"layer{i}" for i in range(100)]})) < 120


def test_many_events_are_one_line_with_the_others_folded_behind_it():
    ((line, lines),) = story.happenings(DEEP)
    total = sum(event["filters"] for event in DEEP["events"])
    assert line.startswith(f"weight_evolution: 199 times after epochs 1 to 199, filters {total:,} in all, in 109 layers")
    assert lines == [story.describe(event) for event in DEEP["events"]]
    record = sample_records.record("revive", "x", events=sample_records.edits("reactivate"), notes=["so"])
    assert [inside for _, inside in story.happenings(record)] == [[], [], []]


def cells(svg: str) -> list[tuple[float, str]]:
    (group,) = [e for e in drawn(svg).iter("g") if e.get("class") == "kept"]
    return [(float(e.get("fill-opacity", "nan")), e.findtext("title") or "") for e in group]


def test_the_map_is_the_darker_the_more_of_a_layer_was_touched():
    chain = chain_of("restart")
    (found,) = edits.treated(chain.records["revive"])
    shares = {"conv1": 9 / 32, "conv2": 20 / 32, "conv3": 12 / 64}
    expected = {name: 0.12 + 0.88 * share / (20 / 32) for name, share in shares.items()}
    made = {text.split(",")[0]: opacity for opacity, text in cells(heat.layers(found))}
    assert made == pytest.approx(expected, abs=0.006)
    assert found.layers == ["conv1", "conv2", "conv3"]  # no linear layer
    assert "0 to 62.5 %: share of a layer's filters" in "".join(drawn(heat.layers(found)).itertext())
    assert cells(heat.layers(found))[0][1] == "conv1, after epoch 2, 9 of 32 filters, mean norm 0.004 → 2.25"


def test_a_map_of_very_many_events_stays_small_and_loses_none():
    (found,) = edits.treated(DEEP)
    assert len(found.columns) <= 48 and found.events == DEEP["events"]
    texts = [text for _, text in cells(heat.layers(found))]
    assert sum(int(re.findall(r"(\d[\d,]*)(?: of \d+)? filters", text)[0].replace(",", "")) for text in texts) == sum(
        e["filters"] for e in found.events
    )
    assert len(heat.layers(found)) < 1_000_000
    column = found.columns[0]
    share = sum(row["filters"] / 16 for event in column for row in event["layers"] if row["name"] == "layer1.0.conv1") / len(column)
    assert found.cells["layer1.0.conv1", 0].share == pytest.approx(share)


NORMS = {"mean_norm_before": 2, "mean_norm_after": 1}


@pytest.mark.parametrize(
    ("row", "share", "told"),
    [
        ({"open": 12, "inputs": 16}, 0.25, "4 of 16 closed inputs"),
        ({"weight": 0.7, "entropy": 2.0, **NORMS}, 0.3, "30 % from the other network, mean norm 2 → 1"),
        ({"filters": 4, "kernels": 6, **NORMS}, 0.5, "4 of 8 filters, 6 of 128 kernels, mean norm 2 → 1"),
    ],
)
def test_each_kind_of_event_has_its_share(row, share, told):
    layers = [
        {"name": "a", "type": "Conv2d", "inputs": 16, "outputs": 8},
        {"name": "b", "type": "Conv2d", "inputs": 8, "outputs": 8},
    ]
    event = {"kind": "k", "epoch": 1, "layers": [{"name": "a.layer", **row}]}  # as branches wrap it
    (found,) = edits.treated(sample_records.record("compress", "x", events=[event], layers=layers))
    assert found.cells.keys() == {("a", 0)} and found.layers == ["a", "b"]
    assert found.cells["a", 0].share == pytest.approx(share) and found.cells["a", 0].text == f"a, after epoch 1, {told}"
    assert drawn(heat.layers(found)) is not None


def test_what_no_table_of_layers_holds_is_outlined_and_events_without_layers_leave_empty_columns():
    events = [{"kind": "k", "epoch": 1, "layers": []}, {"kind": "k", "epoch": 2, "layers": [{"name": "gone", "filters": 3}]}]
    (found,) = edits.treated(sample_records.record("train", "0", events=events))
    assert found.layers == ["gone"] and found.cells["gone", 1].share is None and ("gone", 0) not in found.cells
    assert [e.get("class") for e in drawn(heat.layers(found)).iter("rect") if e.find("title") is not None] == ["full"]
    nothing = sample_records.record("train", "0", events=events[:1], layers=[])
    assert [drawn(heat.layers(found)).tag for found in edits.treated(nothing)] == ["svg"]
    text = section.render(lineage.Chain("r", "c", 0, "fp32", {"train": nothing}))
    assert "train, k: layer by layer: no layer was touched." in text and "<svg" not in text


class Cells(HTMLParser):
    """The text of every cell of tables, a list a row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag in ("td", "th")
        self.rows += [[]] if tag == "tr" else []
        if self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def test_the_numbers_of_each_layer_and_event_are_in_a_table():
    head, *lines = [row for row in Cells(section.render(chain_of("reactivate"))).rows if len(row) == 7 and "layer" not in row[0]][
        -4:
    ]
    assert head == ["event", "layer", "filters", "kernels", "mean norm of kernels before", "after", "change"]
    assert lines[0] == ["after epoch 2", "conv2", "6 of 32", "27 of 1,024", "0.006667", "0.125", "× 18.8"]
    assert [line[:2] for line in lines] == [["after epoch 2", "conv2"], ["after epoch 2", "conv3"], ["after epoch 4", "conv2"]]


def test_too_many_numbers_are_summed_by_layer_and_the_record_is_named():
    text = section.render(deep_chain())
    lines = [row for row in Cells(text).rows if len(row) == 6 and row[0].startswith("layer") and row[0] != "layer"]
    assert [row[0] for row in lines] == [row["name"] for row in DEEP["layers"]]
    assert sum(int(row[2].replace(",", "")) for row in lines) == sum(event["filters"] for event in DEEP["events"])
    assert {row[1] for row in lines} <= {"66 of 199", "67 of 199"} and {row[5] for row in lines} == {"× 1.5"}
    assert '<a href="../revive/evolve-0/record.json">' in text
    assert len(text) < 1_500_000


def test_names_of_layers_and_kinds_are_shown_and_never_run():
    records = sample_records.grid((0,), ("reactivate", "restart"), ("none",))
    for record in records:
        for event in record["events"]:
            if "layers" in event:
                event |= {"kind": HOSTILE, "layers": [row | {"name": HOSTILE} for row in event["layers"]]}
        record["layers"] = [row | {"name": HOSTILE} for row in record["layers"]]
    text = page.render(rows.build(records))
    assert text.count("<script") == 1 and "onload='x'" not in text
    for chain in lineage.chains(records):
        maps = [heat.layers(found) for found in edits.treated(chain.records["revive"])]
        for svg in (*maps, story.filters(chain)):
            assert svg and ElementTree.fromstring(chart.standalone(svg)) is not None and HOSTILE in "".join(drawn(svg).itertext())


def test_equal_records_give_equal_charts():
    one, two = (chain_of("restart", json.loads(json.dumps(sample_records.grid((0,), ("restart",), ("none",))))) for _ in range(2))
    assert section.render(one) == section.render(two)

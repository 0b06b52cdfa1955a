"""Widths and sensitivities in the report: bars and dots against the scales that their labels show, and what records leave out."""

import copy
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_records

from pipeline import lineage, report
from pipeline.report import chart, page, plots, rows, section, sensitive, story, widths

HOSTILE = "<script>alert('a')</script>&\"$x_"
BEFORE = {"conv1": (0.01, 0.04, 0.16), "conv2": (0.2, 0.9, 3.6), "conv3": (-0.02, 0.0, 0.1)}
AFTER = {"conv1": (0.02, 0.08, 0.32), "conv3": (0.4, 0.6, 1.2)}


def events(by: str = "measured", **changes: Any) -> list[dict[str, Any]]:
    """What the hooks of `pipeline.sensitivity` log."""
    made = []
    for when, epoch, costs in (("before", 0, BEFORE), ("after", 6, AFTER)):
        found = []
        for name, values in costs.items():
            points = [{"share": share, "cost": cost} for share, cost in zip((0.25, 0.5, 0.75), values, strict=True)]
            points = [p | {"loss": 0.1 + p["cost"], "score": 0.9 - p["cost"] / 10} for p in points] if by == "measured" else points
            found.append({"name": name, "layers": [name], "units": 32, "costs": points})
        made.append(
            {"kind": "sensitivity", "epoch": epoch, "round": 0, "by": by, "when": when, "score": "accuracy", "stretches": found}
        )
    return [event | changes for event in made]


def grid(logged: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    made = sample_records.grid((0,), ("finetune",), ("none", "diet"))
    for entry in made:
        if entry["stage"] == "compress" and entry["compress"] == "diet":
            entry["events"] = [*(logged or []), *entry["events"]]
    return made


def chain_of(compress: str, records: list[dict[str, Any]] | None = None) -> lineage.Chain:
    return next(chain for chain in lineage.chains(records or grid()) if chain.compress == compress)


def drawn(svg: str | None) -> ElementTree.Element:
    assert svg is not None
    return ElementTree.fromstring(svg)


def rows_of(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The rows that a keyboard reaches, by their layer; each says aloud what its tip shows."""
    found = {}
    for group in root.iter("g"):
        assert (group.get("class"), group.get("tabindex"), group.get("role")) == ("point", "0", "img")
        told = (group[0].text or "") if group[0].tag == "title" else ""
        assert told.split() == (group.get("aria-label") or "").split()
        found[re.split(r"[,\n]", told)[0]] = group
    return found


def test_bars_are_as_long_as_the_widths_of_the_records() -> None:
    chain = chain_of("diet")
    root, layers = drawn(widths.picture(chain)), chain.records["collapse"]["layers"]
    found = rows_of(root)
    assert list(found) == [row["name"] for row in layers]
    scales = {"inputs": set(), "outputs": set()}
    for row in layers:
        outlines = [e for e in found[row["name"]].iter("path") if e.get("class") == "full"]
        filled = [e for e in found[row["name"]].iter("rect") if e.get("class") == "kept"]
        for side, outline, bar in zip(("inputs", "outputs"), outlines, filled, strict=True):
            full = float(re.findall(r"h([\d.]+)", outline.get("d", ""))[0])
            assert float(bar.get("width", "")) == pytest.approx(full * row[side] / row[f"full_{side}"], abs=0.11)
            scales[side].add(round(full / row[f"full_{side}"], 1))
    assert {side: len(found) for side, found in scales.items()} == {"inputs": 1, "outputs": 1}
    assert "conv3, inputs 32 → 16, outputs 64 → 32" == found["conv3"].get("aria-label")


def test_a_layer_far_wider_than_the_others_leaves_them_readable_and_is_said_to_be_off_scale() -> None:
    records = grid()
    for record in records:
        for row in record["layers"]:
            if row["name"] == "fc1":
                row |= {"inputs": 6272, "full_inputs": 25088}
    chain = chain_of("diet", records)
    found = rows_of(drawn(widths.picture(chain)))
    wide, usual = (next(e for e in found[name].iter("path") if e.get("class") == "full").get("d", "") for name in ("fc1", "fc2"))
    long, other = (float(re.findall(r"h([\d.]+)", d)[0]) for d in (wide, usual))
    assert long == other and wide.count("l") == 2 and "l" not in usual  # both end where the widest bar to scale does: 64
    bar = next(e for e in found["fc1"].iter("rect") if e.get("class") == "kept")
    assert float(bar.get("width", "")) == pytest.approx(long / 4, abs=0.1)
    assert "too long to be drawn to scale" in widths.section(chain)
    assert "too long" not in widths.section(chain_of("diet"))


def test_a_network_that_kept_its_widths_has_no_such_picture() -> None:
    assert widths.picture(chain_of("none")) is None and widths.section(chain_of("none")) == ""
    assert "channels, kept of full" in section.render(chain_of("none"))
    assert "channels, kept of full" not in section.render(chain_of("diet"))
    assert plots.narrowed([chain_of("none")]) is None


def test_the_numbers_are_in_a_table_too() -> None:
    text = widths.section(chain_of("diet"))
    line = re.search(r"<tr><th scope=row>conv3</th>(.*?)</tr>", text)
    assert line and re.findall(r"<td>(.*?)</td>", line[1]) == ["32", "16", "64", "32", "50 %"]
    text = sensitive.section(chain_of("diet", grid(events())).records["compress"])
    cells = [re.findall(r"<td>(.*?)</td>", line) for line in re.findall(r"<tr><th scope=row>conv1</th>(.*?)</tr>", text)]
    assert cells[1] == ["50 %", "0.04", "89.60 %", "0.08", "89.20 %"] and len(cells) == 3
    only = re.findall(r"<tr><th scope=row>conv2</th>(.*?)</tr>", text)
    assert re.findall(r"<td>(.*?)</td>", only[0]) == ["25 %", "0.2", "88.00 %", "", ""]
    assert "the validation loss" in text and "At the left edge" in text


def test_dots_stand_where_the_labels_of_the_axis_say() -> None:
    root = drawn(sensitive.picture(chain_of("diet", grid(events())).records["compress"]))
    labels = {e.text: float(e.get("x", "nan")) for e in root.iter("text") if e.get("text-anchor") == "middle"}
    one, ten = labels["0.01"], labels["0.1"]
    place = lambda cost: one + (math.log10(cost) + 2) * (ten - one)  # noqa: E731
    found = rows_of(root)
    assert list(found) == ["conv1", "conv2", "conv3"]
    for name, group in found.items():
        for kind, costs in (("was", BEFORE), ("is", AFTER)):
            dots = [e for e in group.iter("circle") if e.get("class") == kind]
            assert len(dots) == len(costs.get(name, ()))
            assert [e.get("r") for e in dots] == sorted((e.get("r") for e in dots), key=lambda r: float(r or 0))
            for dot, cost in zip(dots, costs.get(name, ()), strict=True):
                left = (
                    place(cost)
                    if cost > 0
                    else min(float(e.get("cx", "")) for e in root.iter("circle") if e.get("cy") == dot.get("cy"))
                )
                assert float(dot.get("cx", "")) == pytest.approx(left, abs=0.3), (name, kind, cost)
    assert "before: 25 % removed 0.01, 50 % removed 0.04" in (found["conv1"].get("aria-label") or "")


def test_small_differences_have_an_axis_from_zero() -> None:
    logged = copy.deepcopy(events("ecdm"))
    for event in logged:
        for row in event["stretches"]:
            row["costs"] = [{"share": share, "cost": 0.2 + share} for share in (0.25, 0.5, 0.75)]
    root = drawn(sensitive.picture(chain_of("diet", grid(logged)).records["compress"]))
    labels = {e.text: float(e.get("x", "nan")) for e in root.iter("text") if e.get("text-anchor") == "middle"}
    dots = [float(e.get("cx", "")) for e in rows_of(root)["conv1"].iter("circle")]
    assert dots[1] == pytest.approx(labels["0"] + 0.7 * (labels["1"] - labels["0"]), abs=0.3)
    text = sensitive.section(chain_of("diet", grid(logged)).records["compress"])
    assert "expected activity that is lost" in text and "accuracy before" not in text


def test_the_events_are_a_picture_and_no_mark_line_or_map() -> None:
    chain = chain_of("diet", grid(events()))
    record = chain.records["compress"]
    assert story.happenings(record) == story.happenings(chain_of("diet").records["compress"])
    assert story.curves(chain, "loss") == story.curves(chain_of("diet"), "loss")
    text = section.render(chain)
    assert "compress: sensitivity of the layers" in text and "sensitivity: layer by layer" not in text
    assert "sensitivity of the layers" not in section.render(chain_of("none", grid(events())))


@pytest.mark.parametrize("kept", [["before"], ["after"]])
def test_one_event_alone_is_drawn(kept: list[str]) -> None:
    logged = [event for event in events() if event["when"] in kept]
    root = drawn(sensitive.picture(chain_of("diet", grid(logged)).records["compress"]))
    assert {e.get("class") for e in root.iter("circle")} == {"was" if kept == ["before"] else "is"}


@pytest.mark.parametrize("changed", [[], events(stretches=[])])
def test_records_without_sensitivities_have_no_such_picture(changed: list[Any]) -> None:
    chain = chain_of("diet", grid(changed))
    assert sensitive.picture(chain.records["compress"]) is None and sensitive.section(chain.records["compress"]) == ""
    assert sensitive.last(chain) is None and plots.sensitivity([chain]) is None


def test_names_from_records_are_text() -> None:
    records = grid(events())
    for record in records:
        for row in record["layers"]:
            row["name"] = HOSTILE if row["name"] == "conv1" else row["name"]
        for event in record["events"]:
            for row in event.get("stretches", []):
                row["name"] = HOSTILE if row["name"] == "conv1" else row["name"]
    chain = chain_of("diet", records)
    for svg in (widths.picture(chain), sensitive.picture(chain.records["compress"])):
        assert svg and "<script" not in svg and HOSTILE in rows_of(drawn(svg))
        assert ElementTree.fromstring(chart.standalone(svg)) is not None
    assert "<script>alert" not in page.render(rows.build(records))


def test_the_plots_are_files_with_a_panel_for_each_variant_they_are_about(tmp_path: Path) -> None:
    report.write(grid(events()), tmp_path)
    for name in ("widths-0", "sensitivity-0"):
        svg = (tmp_path / f"{name}.svg").read_text()
        assert ElementTree.fromstring(svg) is not None and "finetune-diet-0" in svg and "finetune-none-0" not in svg
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    chain = chain_of("diet", grid(events()))
    figure = plots.sensitivity([chain])
    assert figure is not None
    (axes,) = figure.axes
    offsets: Any = [spot for drawn in axes.collections for spot in np.asarray(drawn.get_offsets())]
    expected = [v for when in (BEFORE, AFTER) for name in ("conv1", "conv2", "conv3") for v in when.get(name, ())]
    low = axes.get_xlim()[0]
    assert [x for x, _ in offsets] == pytest.approx([max(v, low) for v in expected])
    shown = plots.narrowed([chain])
    assert shown is not None
    patches: Any = shown.axes[0].patches
    bars = [patch.get_width() for patch in patches]
    assert max(bars) == 1.0 and min(bars) == -1.0
    assert [t.get_text() for t in shown.axes[0].get_yticklabels()] == [row["name"] for row in chain.records["collapse"]["layers"]]

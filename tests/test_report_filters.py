"""Filter norms in the report: places in its charts against the scales that their labels show, and what older records leave out."""

import copy
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import sample_records
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import filters, lineage, report
from pipeline.report import chart, plots, section, story, strength


def chain_of(revive: str, records: list[dict[str, Any]] | None = None) -> lineage.Chain:
    return lineage.chains(records or sample_records.grid((0,), (revive,), ("none",)))[0]


def drawn(svg: str | None) -> ElementTree.Element:
    assert svg is not None
    return ElementTree.fromstring(svg)


def texts(root: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where the labels without a turn stand."""
    return {e.text or "": (float(e.get("x", "nan")), float(e.get("y", "nan"))) for e in root.iter("text") if not e.get("transform")}


def corners(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", element.get("d", ""))]


def titled(root: ElementTree.Element, title: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if (found := e.find("title")) is not None and (found.text or "").startswith(title)]


def straight(one: tuple[float, float], two: tuple[float, float], value: float) -> float:
    """On the line through two (value, place)."""
    return one[1] + (value - one[0]) * (two[1] - one[1]) / (two[0] - one[0])


def norm_height(root: ElementTree.Element, value: float) -> float:
    """Where a norm belongs, by the labels 1 and 0.01 of the axis: equal factors are equal distances."""
    return straight((0, texts(root)["1"][1] - 4), (-2, texts(root)["0.01"][1] - 4), math.log10(value))


def epoch_place(root: ElementTree.Element, epoch: float) -> float:
    return straight((0, texts(root)["5"][0] - (texts(root)["10"][0] - texts(root)["5"][0])), (5, texts(root)["5"][0]), epoch)


@pytest.mark.parametrize("percentiles", [(0, 100), (5, 95), (25, 75)])
def test_bands_and_median_stand_where_the_labels_of_the_axes_say(percentiles):
    chain = chain_of("restart")
    root, history = drawn(story.filters(chain)), chain.records["train"]["history"]
    title = "train: weakest to strongest" if percentiles[0] == 0 else f"train: percentiles {percentiles[0]} to {percentiles[1]}"
    (band,), (line,) = titled(root, title), titled(root, "train: median")
    low, high = ([row[f"filter_norm_p{p}"] for row in history] for p in percentiles)
    expected = [norm_height(root, value) for value in (*low, *reversed(high))]
    assert [y for _, y in corners(band)] == pytest.approx(expected, abs=0.15)
    assert [y for _, y in corners(line)] == pytest.approx([norm_height(root, r["filter_norm_p50"]) for r in history], abs=0.15)
    assert [x for x, _ in corners(line)] == pytest.approx([epoch_place(root, row["epoch"]) for row in history], abs=0.15)


def test_stages_follow_each_other_and_the_dead_have_an_axis_of_their_own():
    chain = chain_of("finetune")
    root = drawn(story.filters(chain))
    names = {name: place[0] - 5 for name, place in texts(root).items() if name in lineage.TRAINING}
    assert names == pytest.approx({stage: epoch_place(root, 6 * index) for index, stage in enumerate(lineage.TRAINING)}, abs=0.15)
    (line,), history = titled(root, "compress: dead"), chain.records["compress"]["history"]
    assert [x for x, _ in corners(line)] == pytest.approx([epoch_place(root, 12 + row["epoch"]) for row in history], abs=0.15)
    bottom = max(e.get("d", "") for e in root.iter("path") if e.get("class") == "gone")  # every area begins on the axis
    zero, five = float(bottom.split("L")[0].split()[1]), texts(root)["5 %"][1] - 4
    expected = [straight((0, zero), (5, five), 100 * row["dead_filters"]) for row in history]
    assert [y for _, y in corners(line)] == pytest.approx(expected, abs=0.15)
    (limit,) = [e for e in root.iter("path") if e.get("class") == "dead"]
    assert corners(limit)[0][1] == pytest.approx(texts(root)["0.01"][1] - 4, abs=0.1)
    assert "dead below 0.01" in texts(root)


def test_norms_of_zero_lie_on_the_lower_edge_and_the_page_says_so():
    chain = chain_of("finetune")
    assert chain.records["compress"]["history"][-1]["filter_norm_p0"] == 0
    root = drawn(story.filters(chain))
    (band,) = titled(root, "compress: weakest")
    assert {y for _, y in corners(band)[:6]} == {texts(root)["~0"][1] - 4}
    assert norm_height(root, 1e-4) == pytest.approx(texts(root)["~0"][1] - 4, abs=0.15)
    assert "norms of 0.0001 or less" in section.render(chain)
    assert "~0" not in texts(drawn(story.filters(chain_of("restart"))))
    assert "or less" not in section.render(chain_of("restart"))


def test_constants_are_those_of_the_measurement():
    assert (strength.DEAD, strength.PERCENTILES) == (filters.DEAD, filters.PERCENTILES)


def test_an_arrow_goes_from_the_mean_norm_before_to_that_after_where_filters_were_edited():
    chain = chain_of("restart")
    root = drawn(story.filters(chain))
    (arrow,) = [e for e in root.iter("g") if e.get("class") == "move"]
    x, start, _ = (float(number) for number in re.findall(r"[-\d.]+", arrow.findall("path")[0].get("d", "")))
    (tip,) = corners(arrow.findall("path")[1])
    before = (9 * 0.004 + 20 * 0.9 + 12 * 1.1) / 41
    assert x == pytest.approx(epoch_place(root, 6 + 2), abs=0.15)
    assert (start, tip[1]) == pytest.approx((norm_height(root, before), norm_height(root, 2.25)), abs=0.15)
    assert "0.762 → 2.25" in (arrow.findtext("title") or "")
    assert not [e for e in drawn(story.filters(chain_of("reactivate"))).iter("g") if e.get("class") == "move"]  # kernels


def test_triangles_can_be_reached_and_tell_what_happened():
    chain = chain_of("reactivate")
    root = drawn(story.filters(chain))
    points = [e for e in root.iter("g") if e.get("class") == "point"]
    assert [e.get("tabindex") for e in points] == ["0", "0"]
    told = "revive, epoch 2: reactivation: gamma 0.3, kernels 36, dead filters 2, in 2 layers, mean norm of kernels 0.00667 → 0.125"
    assert points[0].get("aria-label") == points[0].findtext("title") == told
    places = [straight((0, 0), (1, 1), float(re.findall(r"M([\d.]+)", e.findall("path")[-1].get("d", ""))[0]) + 5) for e in points]
    assert places == pytest.approx([epoch_place(root, 8), epoch_place(root, 10)], abs=0.15)


def test_very_many_events_share_triangles_and_none_is_lost():
    root = drawn(story.filters(lineage.Chain("evolve", "none", 0, "fp32", {"revive": sample_records.deep(199, 109)})))
    points = [e for e in root.iter("g") if e.get("class") == "point"]
    told = [(e.findtext("title") or "").split("\n") for e in points]
    counted = sum(len(lines) - 1 + int(lines[-1].split()[1]) if lines[-1].startswith("and ") else len(lines) for lines in told)
    assert counted == 199 and len(points) <= (460 - 76) / 11 + 1
    assert not [e for e in root.iter("path") if e.get("class") == "mark"]  # no wall of dotted lines
    assert max(len(line) for lines in told for line in lines) < 200


def test_a_network_without_events_has_its_norms_and_no_more():
    text, root = section.render(chain_of("finetune")), drawn(story.filters(chain_of("finetune")))
    assert "filter norms" in text and "layer by layer" not in text
    assert not [e for e in root.iter("g") if e.get("class") in ("point", "move")]


def older(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the records were before filters were measured and events told norms."""
    records = copy.deepcopy(records)
    for record in records:
        record["history"] = [{k: v for k, v in row.items() if "filter" not in k} for row in record["history"]]
        for event in record["events"]:
            for row in event.get("layers", []):
                row.pop("mean_norm_before", None), row.pop("mean_norm_after", None)
    return records


def test_older_records_are_drawn_without_what_they_lack(tmp_path: Path):
    records = older(sample_records.grid((0,), ("restart",), ("none",)))
    chain = chain_of("restart", records)
    text = section.render(chain)
    assert (
        story.filters(chain) is None
        and "filter norms" not in text
        and "mean norm of" not in story.happenings(chain.records["revive"])[0][0]
    )
    assert "layer by layer" in text and "9 of 32" in text and "loss by epoch" in text
    report.write(records, tmp_path)
    assert not list(tmp_path.glob("filters-*")) and list(tmp_path.glob("curves-0.*"))


@pytest.mark.parametrize("gone", [None, math.nan])
def test_epochs_without_figures_are_left_out(gone):
    history = [dict(row) for row in chain_of("finetune").records["train"]["history"]]
    history[1] |= {} if gone is None else {"filter_norm_p5": gone}
    if gone is None:
        del history[1]["dead_filters"]
    found = strength.stretch("train", 0, 10, history)
    assert found is not None and found.epochs == [11, 13, 14, 15, 16]


def test_one_epoch_alone_is_visible():
    one = strength.stretch("train", 0, 0, chain_of("finetune").records["train"]["history"][:1])
    assert one is not None
    root = drawn(strength.fan([one], 1, [(0, "train")], []))
    (line,) = titled(root, "train: median")
    assert corners(line)[1][0] - corners(line)[0][0] > 10


@settings(max_examples=200)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=3))
@example([1, 1, 300])
@example([300, 1, 1])
def test_names_of_stages_neither_meet_nor_leave_the_chart(epochs):
    names = ("train", "revive", "compress")[: len(epochs)]
    x = chart.axis([0, sum(epochs)], chart.SIDE, 448, zero=True)
    starts = [sum(epochs[:index]) for index in range(len(epochs))]
    found = [
        float(a)
        for a in re.findall(r'<text[^>]* x="([-\d.]+)"', "".join(chart.stages(list(zip(starts, names, strict=True)), x, 200)))
    ]
    ends = [left + 7.5 * len(name) for left, name in zip(found, names, strict=True)]
    assert found[0] >= chart.SIDE and ends[-1] <= 460 and all(end < left for end, left in zip(ends, found[1:], strict=False))
    if min(epochs) > 0.3 * sum(epochs):
        assert found == pytest.approx([x.at(start) + 5 for start in starts], abs=0.06)


def test_the_plot_has_a_panel_a_variant_with_the_medians_and_the_dead_below():
    chains = lineage.chains(sample_records.grid((0,), ("finetune", "restart"), ("none", "diet")))
    figure = plots.filters(chains)
    assert figure is not None
    places = {(spec.rowspan.start, spec.colspan.start): axes for axes in figure.axes if (spec := axes.get_subplotspec())}
    for number, chain in enumerate(chains):
        fan, strip = (places[2 * (number // 2) + below, number % 2] for below in (0, 1))
        assert (fan.get_title(), fan.get_yscale()) == (chain.name, "log")
        lines = {str(line.get_label()): line for line in fan.get_lines()}
        for index, (start, stage, record) in enumerate(story.trainings(chain)):
            history = record["history"]
            assert list(lines[stage].get_xdata()) == [start + row["epoch"] for row in history]
            assert list(lines[stage].get_ydata()) == [row["filter_norm_p50"] for row in history]
            assert list(strip.get_lines()[index].get_ydata()) == [100 * row["dead_filters"] for row in history]
    assert plots.filters(lineage.chains(older(sample_records.grid((0,), ("finetune",), ("none",))))) is None

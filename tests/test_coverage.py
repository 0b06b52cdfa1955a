"""What coverage promises before any training, against really cutting the network as far as it goes."""

import pytest
import torch
from networks import ZOO, build, shape_of
from test_channels import MIXED, Odd

from pipeline.channels import follow
from pipeline.coverage import coverage
from pipeline.errors import InputError
from pipeline.families import Families
from pipeline.measure import count
from pipeline.structure import structure
from pipeline.surgery import drop, shrink


@pytest.mark.parametrize("name", ZOO)
def test_what_may_go_can_go_and_what_is_left_is_what_was_said(name: str) -> None:
    shape, model = shape_of(name), build(name, expand=False)
    told = coverage(model, shape)
    channels = follow(model, shape)
    families = Families(model, channels, multiple=1)
    gone = families.members(unit for family in families.all for unit in family.units[family.allowed[0] :])
    smallest = shrink(model, shape, drop(channels, gone))
    whole, left = count(model, shape), count(smallest, shape)
    assert told.least["macs"] == pytest.approx(left["macs"] / whole["macs"], rel=1e-6)
    assert told.least["params"] == pytest.approx(left["parameters"] / whole["parameters"], rel=1e-6)
    widths = structure(smallest)["filtering"]
    for row in told.rows:
        assert widths.get(row.name, widths.get(f"{row.name}.layer"))[1] == row.outputs - row.removable
    last = told.rows[-1]
    assert last.removable == 0 and last.stays == "the network's output"


def test_ties_protection_and_multiples_are_told() -> None:
    model = build("resnet", expand=False)
    rows = {row.name: row for row in coverage(model, shape_of("resnet"), protect=("layer3.0.conv1",), multiple=8).rows}
    assert set(rows["conv1"].tied) >= {"layer1.0.conv2", "layer2.0.conv2"} and rows["layer1.0.conv1"].tied == ()
    assert rows["layer1.0.conv1"].removable == 8 and rows["layer3.0.conv1"].removable == 0
    assert rows["layer3.0.conv1"].stays.startswith("protected")
    assert "layer1.0.conv1" in str(coverage(model, shape_of("resnet")))
    with pytest.raises(InputError, match="matches no layer"):
        coverage(model, shape_of("resnet"), protect=("layer9",))


def test_what_is_not_understood_is_named_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Odd(MIXED["softmax"][0])
    told = coverage(model, (3, 8, 8))
    assert any("softmax" in what for what in told.untreated)
    assert {row.name: row.removable for row in told.rows}["first"] == 0

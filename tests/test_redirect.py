"""Redirected channels: the sampler that learns, `grid_sample`, the deployed convolution and its ONNX file are one function."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.export import export
from pipeline.inference import open_session
from pipeline.redirect import Distribute, Redirect, shifted, taps_of


def sampled(x: Tensor, shifts: Tensor) -> Tensor:
    """torch's sampler: every channel as an image of its own batch."""
    height, width = x.shape[2:]
    down, right = ((torch.arange(size) * 2 + 1) / size - 1 for size in (height, width))
    across = (right[None] + 2 * shifts[:, :1] / width)[:, None].expand(-1, height, -1)
    along = (down[None] + 2 * shifts[:, 1:] / height)[..., None].expand(-1, -1, width)
    grid = torch.stack([across, along], -1)
    return F.grid_sample(x.transpose(0, 1), grid, padding_mode="border", align_corners=False).transpose(0, 1)


def rolled(x: Tensor, right: int, down: int) -> Tensor:
    """The pixel `down` rows below and `right` columns to the right, or the nearest in the image."""
    rows = [min(max(y + down, 0), x.shape[2] - 1) for y in range(x.shape[2])]
    columns = [min(max(i + right, 0), x.shape[3] - 1) for i in range(x.shape[3])]
    return x[:, :, rows][:, :, :, columns]


def distribute(channels: int, seed: int, reach: float) -> Distribute:
    generator = torch.Generator().manual_seed(seed)
    module = Distribute(channels)
    module.pointer.copy_(torch.randint(-1, channels, (channels,), generator=generator))
    with torch.no_grad():
        module.shift.copy_((2 * torch.rand(channels, 2, generator=generator) - 1) * reach)
    return module


def test_a_whole_shift_is_a_roll_with_the_border_repeated() -> None:
    x = torch.randn(2, 1, 5, 7)
    for right in range(-8, 9, 2):
        for down in range(-6, 7, 3):
            shift = torch.tensor([[float(right), float(down)]])
            assert torch.equal(shifted(x, shift), rolled(x, right, down))
            reach = max(abs(right), abs(down), 1)
            padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
            torch.testing.assert_close(F.conv2d(padded, taps_of(shift)), rolled(x, right, down))


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9), st.integers(1, 12), st.sampled_from([0.0, 0.4, 1.5, 4.0]))
def test_the_sampler_torchs_and_the_deployed_form_agree(seed: int, channels: int, height: int, width: int, reach: float) -> None:
    module = distribute(channels, seed, reach)
    x = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(seed))
    wanted = x.clone()
    for slot, channel in enumerate(module.pointer.tolist()):
        if channel >= 0:
            wanted[:, slot] = sampled(x[:, [channel]], module.shift.detach()[[slot]])[:, 0]
    found = module(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    order, deployed = module.deployed()
    assert sorted(order.tolist()) == list(range(channels))
    torch.testing.assert_close(deployed(x), found[:, order], rtol=0, atol=1e-5)
    assert torch.equal(deployed.index, module.pointer.where(module.pointer >= 0, torch.arange(channels))[order])


def test_what_is_not_redirected_is_not_touched() -> None:
    x, module = torch.randn(2, 6, 4, 4), Distribute(6)
    assert module(x) is x
    module.pointer[2] = 5
    found = module(x)
    assert torch.equal(found[:, [0, 1, 3, 4, 5]], x[:, [0, 1, 3, 4, 5]]) and torch.equal(found[:, 2], x[:, 5])


def test_gradients_are_those_of_torchs_sampler_and_reach_only_slots_in_use() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6, 8, requires_grad=True)
    module = distribute(5, 3, 1.5)
    module.pointer.copy_(torch.tensor([-1, 4, 0, -1, 4]))
    weight = torch.randn(3, 5, 6, 8)
    gradients = torch.autograd.grad((module(x) * weight).sum(), (x, module.shift))
    slots, channels = [1, 2, 4], [4, 0, 4]
    wanted = x.index_copy(1, torch.tensor(slots), sampled(x[:, channels], module.shift[slots]))
    for found, expected in zip(gradients, torch.autograd.grad((wanted * weight).sum(), (x, module.shift)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (gradients[1][[0, 3]] == 0).all() and (gradients[1][slots] != 0).all()
    module.pointer.fill_(-1)
    assert module.shift.requires_grad and not module(x.detach()).requires_grad


def test_the_memory_order_of_the_images_is_kept() -> None:
    module, x = distribute(6, 4, 1.5), torch.randn(3, 6, 5, 7, requires_grad=True)
    results = []
    for order in (torch.contiguous_format, torch.channels_last):
        found = module(x.contiguous(memory_format=order))
        assert found.is_contiguous(memory_format=order)
        results.append((found, *torch.autograd.grad(found.square().sum(), (x, module.shift))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_pointers_and_shifts_survive_in_the_state_dict() -> None:
    module, other, x = distribute(7, 1, 1.5), Distribute(7), torch.randn(2, 7, 5, 5)
    assert other(x) is x  # it has looked at its pointers
    other.load_state_dict(module.state_dict())
    assert module.pointer.dtype == torch.long and torch.equal(other(x), module(x))
    module.pointer.fill_(-1)
    assert module(x) is x


def test_a_shift_is_computed_in_fp32_whatever_the_network_computes_in() -> None:
    module, x = distribute(6, 2, 1.5), torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), module(x)) and module(x).dtype == torch.float32
        torch.testing.assert_close(module(x.bfloat16()), module(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


def test_keeping_slots_and_channels_keeps_what_they_compute() -> None:
    module, x = distribute(8, 5, 1.5), torch.randn(2, 8, 6, 5)
    order, deployed = module.deployed()
    whole = deployed(x)
    slots = torch.tensor([0, 2, 3, 6, 7])
    there = torch.unique(deployed.index[slots])
    deployed.keep(slots, there)
    torch.testing.assert_close(deployed(x[:, there]), whole[:, slots])
    blank = Redirect.blank(*deployed.described())
    blank.load_state_dict(deployed.state_dict())
    assert torch.equal(blank(x[:, there]), deployed(x[:, there]))


@pytest.mark.parametrize("pointers", [[-1, 0, 2, -1], [3, 3, 0, 1], [-1, -1, -1, -1]], ids=["some", "all", "none"])
def test_its_onnx_file_has_plain_operators_and_computes_the_same(pointers: list[int], tmp_path: Path) -> None:
    module = distribute(4, 0, 1.5)
    module.pointer.copy_(torch.tensor(pointers))
    _, redirect = module.deployed()
    model = nn.Sequential(redirect, nn.AdaptiveAvgPool2d(4), nn.Flatten()).eval()
    card: dict[str, Any] = {"network": {"name": "any", "arguments": {}}, "classes": ["a"], "stages": [], "data": ""}
    card |= {"input": {"shape": [4, 8, 8], "mean": [0.0], "std": [1.0], "crop": None}, "versions": {}, "commit": None}
    export(model, card, path := tmp_path / "model.onnx", 18)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert kinds <= {"Gather", "Pad", "Conv", "Concat", "AveragePool", "Reshape", "Flatten", "Shape", "Constant"}, kinds
    x = torch.randn(3, 4, 8, 8)
    (found,) = open_session(path, "cpu", 1).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=0, atol=1e-5)

"""Following channels: what is not understood costs compression and is named, and never makes a network compute something else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import build, difference, draw_reads, masked, randomise, shape_of
from torch import Tensor, nn

from pipeline.channels import follow
from pipeline.errors import InputError
from pipeline.layers import ChannelPad
from pipeline.surgery import shrink

SHAPE = (3, 8, 8)
CLOSE = 1e-4  # of the largest |output|, as in test_surgery.py


class Odd(nn.Module):
    """A network of convolutions with `middle(self, x)`, (B, 8, 8, 8) -> (B, 8, ...), between them."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again, self.depthwise = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.prelu, self.group_norm, self.up = nn.PReLU(8), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.pad, self.narrow, self.bare = ChannelPad(2, 2), nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.along, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("extra", torch.rand(1, 4, 8, 8))
        self.last, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self, F.relu(self.norm(self.first(x))))
        x = F.adaptive_avg_pool2d(self.last(x).relu(), 1)
        return self.head(x.flatten(1))


def attention(net: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(net.excite(net.squeeze(x.mean((2, 3), keepdim=True))))


# What mixes channels, or names them by number, in ways that `follow` does not know; and what it calls them.
MIXED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "parameter per channel": (lambda net, x: x * net.scale, "mul"),
    "added parameter": (lambda net, x: x + net.scale, "add"),
    "added on the left": (lambda net, x: net.scale + x, "add"),
    "one channel added to all": (lambda net, x: x + x[:, :1], "add"),
    "features on the last axis": (lambda net, x: x + x.mean((2, 3)), "add"),
    "prelu": (lambda net, x: net.prelu(x), "PReLU"),
    "group norm": (lambda net, x: net.group_norm(x), "GroupNorm"),
    "softmax": (lambda net, x: torch.softmax(x, 1), "softmax"),
    "reshape": (lambda net, x: x.reshape(x.shape[0], 8, 16, 4), "reshape"),
    "shuffle": (lambda net, x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), "unflatten"),
    "width as a number": (
        lambda net, x: net.excite(net.squeeze(F.adaptive_avg_pool2d(x, 1).view(x.size(0), 8)[:, :, None, None])),
        "view",
    ),
    "slice": (lambda net, x: torch.cat([x[:, 4:], x[:, :4]], 1), "getitem"),
    "chunk": (lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk"),
    "rows joined": (lambda net, x: torch.cat([x, x], 2), "cat"),
    "buffer joined": (lambda net, x: torch.cat([x[:, :4], net.extra], 1), "cat"),
    "roll": (lambda net, x: x.roll(1, 1), "roll"),
    "mean of channels": (lambda net, x: x - x.mean(1, keepdim=True), "mean"),
    "linear along the rows": (lambda net, x: net.along(x), "Linear"),
    "functional weights": (lambda net, x: F.conv2d(x, net.again.weight, padding=1), "conv2d"),
    "convolution twice": (lambda net, x: net.again(net.again(x).relu()), "Conv2d"),
    "depthwise twice": (lambda net, x: net.depthwise(net.depthwise(x).relu()), "Conv2d"),
    "norm twice": (lambda net, x: net.norm(net.again(x)), "BatchNorm2d"),
    "norm without parameters twice": (lambda net, x: net.bare(net.again(net.bare(x))), "BatchNorm2d"),
    "zero channels twice": (lambda net, x: net.pad(net.squeeze(x)) + net.pad(net.narrow(x)), "ChannelPad"),
    "convolution on two maps": (lambda net, x: net.again(x) + net.again(F.max_pool2d(x, 3, 1, 1)), "Conv2d"),
}
KNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "functions": lambda net, x: F.leaky_relu(F.silu(net.again(F.gelu(x)))).sigmoid().clone(),
    "in place": lambda net, x: net.again(x).relu_().add_(x),
    "number added": lambda net, x: net.again(x + 1),
    "concatenation": lambda net, x: torch.cat((s := net.squeeze(x), s.relu()), dim=1),
    "average as a map": lambda net, x: x + net.excite(net.squeeze(x.mean((2, 3), keepdim=True))),
    "attention": attention,
    "product of maps": lambda net, x: net.again(x) * x,
    "transposed convolution": lambda net, x: net.up(x),
    "features on the last axis": lambda net, x: net.along(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2),
    "rows and columns of zeros": lambda net, x: net.again(F.pad(x, (1, 0, 2, 0))),
    "view": lambda net, x: net.excite(net.squeeze(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)[:, :, None, None])),
    "interpolation": lambda net, x: F.interpolate(net.again(F.avg_pool2d(x, 2)), scale_factor=2.0),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_not_understood_is_pinned_and_named(name: str) -> None:
    middle, kind = MIXED[name]
    model = randomise(Odd(middle)).eval()
    channels = follow(model, SHAPE)
    assert any(kind in what for what in channels.untreated), channels.untreated
    assert kind in " ".join(channels.pins().values())
    for seed in range(4):
        reads = draw_reads(model, SHAPE, seed)
        assert difference(masked(model, reads), shrink(model, SHAPE, reads), SHAPE, images=1) < CLOSE  # some suit one image alone


@pytest.mark.parametrize("name", KNOWN)
def test_functions_and_methods_are_followed_like_modules(name: str) -> None:
    model = randomise(Odd(KNOWN[name])).eval()
    channels = follow(model, SHAPE)
    assert channels.untreated == [] and set(channels.pins().values()) == {"the network's input", "the network's output"}
    for seed in range(4):
        reads = draw_reads(model, SHAPE, seed)
        assert difference(masked(model, reads), shrink(model, SHAPE, reads), SHAPE) < CLOSE


@pytest.mark.parametrize("twice", ["convolution twice", "convolution on two maps", "depthwise twice", "norm twice"])
def test_a_layer_used_twice_offers_no_channels(twice: str) -> None:
    channels = follow(Odd(MIXED[twice][0]), SHAPE)
    name = {"depthwise twice": "depthwise", "norm twice": "norm"}.get(twice, "again")
    for of in (channels.inputs, channels.outputs, channels.channelwise, channels.norm_after, channels.relu_source):
        assert name not in of
    assert name not in channels.norm_after.values() and name not in channels.relu_source.values()


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda net, x: x if x.sum() > 0 else -x, "TraceError: "),
        (lambda net, x: net.head(x), "RuntimeError: mat1 and mat2 shapes"),
        (lambda net, x: x[:, :, :, : int(x.mean())], "TypeError"),
    ],
)
def test_a_forward_pass_that_cannot_be_traced_is_refused(forward: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"(?s)the channels of Odd cannot be followed: torch.fx says {says}.*may not branch"):
        follow(Odd(forward), SHAPE)


def test_following_leaves_the_modes_of_all_modules_as_they_were() -> None:
    model = build("resnet", expand=False).train()
    frozen: Any = model.get_submodule("layer1.0.bn1")
    frozen.eval()
    follow(model, shape_of("resnet"))
    assert model.training and not frozen.training
    assert [name for name, module in model.named_modules() if not module.training] == ["layer1.0.bn1"]


def test_equal_channels_have_one_id() -> None:
    """ResNet-8: the channels of the stem are those of the first stage's adds, and the middle of the later ones."""
    channels = follow(build("resnet", expand=False), shape_of("resnet"))
    find = lambda ids: [channels.find(channel) for channel in ids]  # noqa: E731
    stem = find(channels.outputs["conv1"])
    assert stem == find(channels.outputs["layer1.0.conv2"]) == find(channels.inputs["layer2.0.conv1"])
    assert find(channels.outputs["layer2.0.conv2"])[8:24] == stem
    assert find(channels.outputs["layer3.0.conv2"])[24:40] == stem == find(channels.inputs["fc"])[24:40]
    assert not set(find(channels.outputs["layer1.0.conv1"])) & set(stem)
    joins = {name for name in channels.outputs if channels.joins(name)}
    assert joins == {"conv1", *(f"layer{stage}.0.conv2" for stage in (1, 2, 3))}
    assert set(channels.pins().values()) == {"the network's input", "the network's output"}

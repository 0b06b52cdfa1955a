"""Surgery's law on networks not written for it, torchvision's, and on our U-Net; and the optimiser that goes through the cut."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision.models as tv
from networks import build, difference, draw_reads, masked, plain, randomise, shape_of
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from pipeline import models
from pipeline.overparameterize import overparameterize
from pipeline.surgery import shrink

SHAPE = (3, 64, 64)
CLOSE = 1e-5  # of the largest |output|: fp32 sums in another order; what is wrong differs by more than 1e-2
BLOCKS = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 1), CNBlockConfig(32, None, 1)]
# torchvision's own classes, narrow where they let us, and U-Net.
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "resnext": lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=4),
    "vgg": lambda: tv.VGG(tv.vgg.make_layers([8, "M", 16, "M", 24, 24, "M", 32, "M"], batch_norm=True), init_weights=False),
    "densenet": lambda: tv.DenseNet(8, (2, 3, 2), 16, bn_size=2, num_classes=10),
    "mobilenet": lambda: tv.mobilenet_v3_small(num_classes=10),
    "efficientnet": lambda: tv.efficientnet_b0(num_classes=10),
    "regnet": lambda: tv.regnet_y_400mf(num_classes=10),
    "convnext": lambda: tv.ConvNeXt(BLOCKS, num_classes=10),
    "our unet": lambda: models.build("unet", input_shape=SHAPE, classes=1, width=4, up="transposed"),
    "our bilinear unet": lambda: models.build("unet", input_shape=SHAPE, classes=1, width=4, up="bilinear"),
}


def network(name: str, expand: bool) -> nn.Module:
    """With every number drawn."""
    torch.manual_seed(0)
    model: Any = FAMILIES[name]()
    if name == "vgg":  # 120 million weights would say no more
        model.classifier = nn.Sequential(nn.Linear(32 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    if expand:
        overparameterize(model, "kflo", depth=2, width=1.25)
    return randomise(model).eval()


@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("name", FAMILIES)
def test_law_on_torchvisions_networks(name: str, expand: bool) -> None:
    model = network(name, expand)
    reads = draw_reads(model, SHAPE, seed=3)
    smaller = shrink(model, SHAPE, reads)
    assert difference(masked(model, reads), smaller, SHAPE, images=2) < CLOSE
    assert difference(model, smaller, SHAPE, images=2) > 0.01
    if expand:
        merged = shrink(plain(model), SHAPE, reads)
        assert difference(plain(smaller), merged, SHAPE, images=2) < CLOSE


@pytest.mark.parametrize("name", ["resnext", "densenet"])
def test_law_after_onnx_export(name: str, tmp_path: Path) -> None:
    model = network(name, expand=False)
    reads = draw_reads(model, SHAPE, seed=5)
    smaller = shrink(model, SHAPE, reads)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    torch.onnx.export(smaller, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = masked(model, reads)(x)
    assert (wanted - torch.from_numpy(found)).abs().max() < CLOSE * wanted.abs().max()


def optimiser(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "two groups":
        chosen: list[dict[str, Any]] = [
            {"params": [p for name, p in model.named_parameters() if "bn" not in name], "weight_decay": 0.01}
        ]
        chosen += [{"params": [p for name, p in model.named_parameters() if "bn" in name], "lr": 0.02}]
        return torch.optim.SGD(chosen, lr=0.05, momentum=0.9, nesterov=True, fused=True)
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01, amsgrad=True)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, fused=True)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, int, int], seed: int, count: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(count):
        x, y = torch.randn(6, *shape, generator=generator), torch.randint(10, (6,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "two groups"])
def test_an_optimiser_goes_on_as_if_the_unread_channels_had_been_zero(kind: str, expand: bool) -> None:
    """Cut in the middle of a training: the smaller network trains on as the whole one with its unread channels at zero."""
    shape, model = shape_of("resnet"), build("resnet", expand)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # fused optimisers walk memory
    optimizer = optimiser(kind, model)
    steps(model, optimizer, shape, seed=1)
    reads = draw_reads(model, shape, seed=3)
    frozen = optimiser(kind, model)
    frozen.load_state_dict(deepcopy(optimizer.state_dict()))
    smaller = shrink(model, shape, reads, optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in smaller.parameters()}
    whole = masked(model, reads)
    mirror = optimiser(kind, whole)
    mirror.load_state_dict(deepcopy(frozen.state_dict()))
    before = difference(whole, smaller, shape)
    steps(smaller, optimizer, shape, seed=2)
    steps(whole, mirror, shape, seed=2)
    assert before < CLOSE and difference(whole, smaller, shape) < 1e-4
    assert difference(model, smaller, shape) > 0.01

"""Single layers drawn at random, and the methods that over-parameterise them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.overparameterize import overparameterize

# Method and arguments by the names that tests have.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kflo 2": ("kflo", {"depth": 2, "width": 4}),
    "kflo 3": ("kflo", {"depth": 3, "width": 1.5}),
    "do_conv": ("do_conv", {}),
    "expandnet": ("expandnet", {"ratio": 2}),
    "expandnet drawn": ("expandnet", {"ratio": 3, "linear": True, "exact": False}),
    "acnet": ("acnet", {}),
    "acnet drawn": ("acnet", {"gamma": 1 / 3}),
    "acnet added": ("acnet", {"norms": "add"}),
    "dbb": ("dbb", {}),
    "dbb drawn": ("dbb", {"gamma": 1 / 3}),
    "dbb added": ("dbb", {"norms": "add"}),
}
EXACT = [label for label in METHODS if "drawn" not in label]  # start as the layer was
DIMENSIONS = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3, "ConvTranspose1d": 1, "ConvTranspose2d": 2, "ConvTranspose3d": 3, "Linear": 0}


def branching(label: str) -> bool:
    """Whether the method makes branches with batch norms."""
    return METHODS[label][0] in ("acnet", "dbb")


def expand(model: nn.Module, label: str, **arguments: Any) -> Any:
    """Over-parameterise `model` in place."""
    method, usual = METHODS[label]
    return overparameterize(model, method, **usual | arguments)


def treats(label: str, layer: Any) -> bool:
    """What the methods' documentation says they cover."""
    if METHODS[label][0] == "kflo":
        return True
    if isinstance(layer, nn.Linear):
        return bool(METHODS[label][1].get("linear"))
    if not branching(label):
        return math.prod(layer.kernel_size) > 1
    odd = type(layer) is nn.Conv2d and set(layer.kernel_size) <= {3, 5}
    return odd and (METHODS[label][0] == "acnet" or (set(layer.dilation) == {1} and layer.padding_mode == "zeros"))


@st.composite
def layers(draw: Callable[..., Any], suits: str = "", planar: bool = False) -> dict[str, Any]:
    """What `build` builds: any layer, or one that suits a method; `planar`: an `nn.Conv2d` or `nn.Linear`."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    branches = bool(suits) and branching(suits)
    kind = "Conv2d" if branches else pick("Conv2d", "Conv2d", "Linear") if planar else pick(*DIMENSIONS)
    if kind == "Linear" and suits and METHODS[suits][0] != "kflo" and not METHODS[suits][1].get("linear"):
        kind = "Conv2d"
    norm, seed, bias, training = pick("none", "affine", "fixed"), draw(st.integers(0, 999)), pick(True, False), pick(True, False)
    common = {"kind": kind, "norm": norm, "seed": seed, "training": training}
    if kind == "Linear":
        return common | {"arguments": {"in_features": pick(1, 5), "out_features": pick(1, 6), "bias": bias}}
    groups, each = pick(1, 1, 2, 3), lambda *values: tuple(pick(*values) for _ in range(DIMENSIONS[kind]))
    arguments: dict[str, Any] = {"groups": groups, "bias": bias, "stride": each(1, 2, 3), "dilation": each(1, 1, 2)}
    arguments |= {"in_channels": groups * pick(1, 2, 3), "out_channels": groups * pick(1, 2, 3)}
    arguments["kernel_size"] = each(3, 5) if branches else each(1, 2, 3, 4, 5)
    if suits and math.prod(arguments["kernel_size"]) == 1:
        arguments["kernel_size"] = each(2, 3)
    if "Transpose" in kind:
        arguments |= {"padding": each(0, 1, 2), "output_padding": tuple(pick(0, side - 1) for side in arguments["stride"])}
        return common | {"arguments": arguments}
    arguments["padding"] = pick("same", "valid", 0, 1, each(0, 1, 2, 3))
    if suits and METHODS[suits][0] == "dbb":
        arguments["dilation"] = 1
    else:
        arguments["padding_mode"] = pick("zeros", "zeros", "reflect", "replicate", "circular")
    return common | {"arguments": arguments | ({"stride": 1} if arguments["padding"] == "same" else {})}


def build(drawn: dict[str, Any]) -> Any:
    """The layer and what follows it, in training or evaluation."""
    torch.manual_seed(drawn["seed"])
    layer: Any = getattr(nn, drawn["kind"])(**drawn["arguments"])
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[max(DIMENSIONS[drawn["kind"]], 1)]
    model = nn.Sequential(layer, nn.Identity() if drawn["norm"] == "none" else norms(outputs, affine=drawn["norm"] == "affine"))
    return randomise(model, drawn["seed"]).train(drawn["training"])


def images(drawn: dict[str, Any], layer: Any) -> Tensor:
    """Something the layer can read: (4, I) or (4, I, 9, ...)."""
    generator = torch.Generator().manual_seed(drawn["seed"])
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return torch.randn(4, channels, *[9] * DIMENSIONS[drawn["kind"]], generator=generator, dtype=torch.float64).to(layer.weight)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every number, so that no factor is an identity and no batch norm a fresh one; scales stay above 0.1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += (torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 0.4 - 0.2).to(parameter)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            drawn = torch.rand(2, module.num_features, generator=generator)
            module.running_mean.copy_(drawn[0] - 0.5)
            module.running_var.copy_(drawn[1] + 0.5)
            module.num_batches_tracked += 7
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a network that could change: modules, their attributes' names, modes, tensors and their identity."""
    facts = {name: (type(module), set(vars(module)), module.training) for name, module in model.named_modules()}
    tensors = {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()}
    values = {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}
    return {"modules": facts, "parameters": tensors, "values": values}

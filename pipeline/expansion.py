"""What every over-parameterisation is made of: a layer whose kernel, and perhaps bias, are computed from other tensors.

It is a parametrisation of `torch.nn.utils.parametrize`: `layer.weight` reads the computed kernel and may be assigned, and the
merged layer is one of the class it had before. Kernels are seen as filters, one row an output: (O, I/groups, *kernel), whatever
the layer (convolution, transposed convolution, linear).

An expanded layer also answers to `fuse()`, `reparameterize()` and `switch_to_deploy()`: the walks by which timm, RepVGG's code and
others merge their own layers merge these too, into the same network as `collapse`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.errors import InputError
from pipeline.layers import turn

Expandable = nn.modules.conv._ConvNd | nn.Linear
Chosen = Callable[[str, nn.Module], bool] | Sequence[str]  # a predicate on (qualified name, layer), or patterns of names
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MERGES = ("fuse", "reparameterize", "switch_to_deploy")


class Computed(nn.Module):
    """A parametrisation: the layer's tensor is `compose(original)`, in fp32 also under autocast."""

    owner: tuple[parametrize.ParametrizationList, ...] = ()  # a tuple, so that it is no submodule

    def compose(self, original: Tensor) -> Tensor:
        """What the layer computes with."""
        raise AssertionError("a subclass says what is computed")

    def invert(self, original: Tensor, target: Tensor) -> Tensor:
        """The tensor nearest to `original` that composes into `target` (least squares where none does)."""
        raise AssertionError("a subclass says how")

    def start(self, tensor: Tensor) -> Tensor:
        """The original of a layer that had `tensor`."""
        return tensor.detach().clone()

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """Keep only some outputs of the layer and some inputs of each of its groups, as indices."""
        raise AssertionError("a subclass says how")

    def solve(self, original: Tensor, target: Tensor) -> Tensor:
        """`invert`, of the tensor as the layer holds it."""
        return self.invert(original, target)

    def forward(self, original: Tensor) -> Tensor:
        """What `layer.weight` (or `layer.bias`) reads."""
        device = original.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():  # not on "meta"
            return self.compose(original)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """What `layer.weight = tensor` stores."""
        return self.solve(self.original, tensor) if self.owner else self.start(tensor)

    def renew(self, filters: Tensor) -> None:
        """Forget what training measured of these filters, by index: they are about to be drawn anew."""

    def settle(self, layer: Any) -> None:
        """Anything to put right in a layer that was just merged."""

    def carry(self, moment: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """A running average of the gradient of `trained`, after an edit `change` of the layer's tensor: `change` acts on what the
        average composes into, without the constant part of the composition."""
        constant = self(torch.zeros_like(moment))
        return self.solve(moment, constant + change(self(moment) - constant))

    @property
    def trained(self) -> Tensor:
        """The parameter that an edit of the layer's tensor moves."""
        return self.original

    @property
    def original(self) -> Tensor:
        """The tensor that the layer's own one became."""
        tensor: Any = self.owner[0].original
        return tensor

    def replace(self, original: Tensor) -> None:
        """Another original, of another shape."""
        old, owner = self.original, self.owner[0]
        if isinstance(old, nn.Parameter):
            owner.original = nn.Parameter(original.detach().clone(), requires_grad=old.requires_grad)
        else:
            owner.original = original.detach().clone()


class Kernel(Computed):
    """A computed kernel. `compose`, `invert`, `start` see filters (O, I/groups, *kernel)."""

    def __init__(self, layer: Expandable) -> None:
        super().__init__()
        self.groups: int = getattr(layer, "groups", 1)
        self.transposed = isinstance(layer, TRANSPOSED)

    def forward(self, original: Tensor) -> Tensor:
        return self.turn(super().forward(original)).contiguous()

    def solve(self, original: Tensor, target: Tensor) -> Tensor:
        return self.invert(original, self.turn(target))

    def right_inverse(self, tensor: Tensor) -> Tensor:
        return self.solve(self.original, tensor) if self.owner else self.start(self.turn(tensor))

    def turn(self, kernel: Tensor) -> Tensor:
        """A transposed convolution keeps (I, O/groups, ...) where filters are (O, I/groups, ...); the way back is the same."""
        return turn(kernel, self.groups) if self.transposed else kernel


def filters_of(layer: Expandable) -> tuple[int, int, tuple[int, ...]]:
    """Outputs, inputs of a group, and the size of the kernel (empty for a linear layer)."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features, ()
    return layer.out_channels, layer.in_channels // layer.groups, tuple(layer.kernel_size)


def plain_class(layer: nn.Module) -> type:
    """The class of a layer, or of what it becomes when it is merged."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def default_bound(layer: Expandable) -> float:
    """torch draws kernels and biases from U(-b, b), b = 1 / sqrt(inputs of a filter)."""
    return layer.weight[0].numel() ** -0.5


def attach(layer: Any, **computed: Computed) -> None:
    """Let `layer.weight` (and `layer.bias`) be computed, and give the layer the usual ways to be merged."""
    for name, parametrisation in computed.items():
        parametrisation.requires_grad_(getattr(layer, name).requires_grad)
        parametrize.register_parametrization(layer, name, parametrisation)
        parametrisation.owner = (layer.parametrizations[name],)
    for merge in MERGES:
        setattr(type(layer), merge, merge_layer)


def merge_layer(layer: Any) -> nn.Module:
    """Make an expanded layer the plain layer that it computes, in place, and return it."""
    # A deep copy shares the class that torch made for the original, and removing a parametrisation edits that class: the
    # layer gets a class of its own first.
    shared = type(layer)
    layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    # The bias first: removing the kernel's parametrisation overwrites its original, from which a bias may be computed.
    computed = {name: layer.parametrizations[name][0] for name in reversed(list(layer.parametrizations))}
    for name in computed:
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    for parametrisation in computed.values():
        if isinstance(parametrisation, Computed):
            parametrisation.settle(layer)
    if "bias" in layer._parameters:  # after the kernel, as ever
        layer._parameters["bias"] = layer._parameters.pop("bias")
    return layer


def collapse(model: nn.Module) -> nn.Module:
    """Merge every over-parameterised layer of `model` into the plain layer it computes, in place, and return it."""
    for module in list(model.modules()):
        if is_expanded(module):
            merge_layer(module)
    return model


def is_expanded(layer: nn.Module) -> bool:
    """Whether this library computes the layer's kernel (and no other's parametrisation, as weight norm)."""
    found: Any = layer
    return parametrize.is_parametrized(layer, "weight") and isinstance(found.parametrizations.weight[0], Computed)


def choose(model: nn.Module, method: str, layers: Chosen, treats: Callable[[Any], bool]) -> dict[str, Any]:
    """The layers of `model` that `layers` chooses and the method treats, by qualified name.

    `InputError` for a pattern that fits no layer, a choice without any such layer, and a layer that is expanded already or
    shares its weight with another.
    """
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, Expandable)}
    chosen = {name: layer for name, layer in candidates.items() if _is_chosen(name, layer, layers) and treats(layer)}
    if not callable(layers):
        for pattern in layers:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise InputError(f"{method}: no layer fits {pattern!r}; there are {', '.join(candidates) or 'none'}")
    if not chosen:
        raise InputError(f"{method}: among the chosen layers there is none that it treats; there are {', '.join(candidates)}")
    users = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    for name, layer in chosen.items():
        if is_expanded(layer):
            raise InputError(f"{method}: layer {name} is over-parameterised already; collapse it first")
        if parametrize.is_parametrized(layer):
            raise InputError(f"{method}: layer {name} has a parametrisation of another kind; remove it first")
        if isinstance(layer.weight, nn.UninitializedParameter):
            raise InputError(f"{method}: layer {name} has no shape yet; pass one batch through the network first")
        if any(users[id(tensor)] > 1 for tensor in (layer.weight, layer.bias) if tensor is not None):
            raise InputError(f"{method}: layer {name} shares its weight or bias with another layer; leave it out of `layers`")
    return chosen


def _is_chosen(name: str, layer: nn.Module, layers: Chosen) -> bool:
    return layers(name, layer) if callable(layers) else any(fnmatchcase(name, pattern) for pattern in layers)

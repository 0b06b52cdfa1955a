"""KFLO, kernel filtering linear overparameterization: kernels as linear combinations of more filters.

Source: "Utilizing Excess Resources in Training Neural Networks", and its code, github.com/AmitHenig/KFLO at b9eecdc.
The paper's "KFLO BxR" is depth B, width R.

A layer with O filters trains h = round(width * O) filters W1 and depth - 1 mixing matrices, and convolves with

    W' = W_depth ... W_2 W1        W1: (h, I/groups, *kernel) as a matrix with h rows, W_i: (h_{i+1}, h_i)

A bias lives at width h and is mixed by the same product. The first O filters of W1 start as those the layer had, the others as
random ones, the mixers as identities: at the start W' is exactly the old kernel. In a grouped convolution the mixing runs
across groups in kernel space, as in the authors' code; no feature-space cascade computes that.

The authors' other filters are those of a default layer: of the same distribution as the first O, because their networks have no
initial weights of their own. Where a network has (residual networks) or is trained, they are drawn with the standard deviation
of the layer's own filters.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from pipeline import hooks
from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.expansion import Chosen, Computed, Expandable, Kernel, attach, choose, filters_of


class Options(Section):
    """Options under `train.overparameterize`."""

    method: Literal["kflo"]
    layers: list[str] = Field(min_length=1)  # patterns of names; ["*"]: every convolution and linear layer
    depth: int = Field(ge=2)  # B: matrices in the product, W1 included
    width: float = Field(gt=0)  # rho: filters of W1 for each filter of the layer
    narrow: bool  # allow a width below 1, where some outputs start at zero
    l2_factor: float = Field(ge=0)  # of weight_decay * |W'|^2 in the loss: 1.0 as the authors ran it, 0.5 equals SGD's decay
    mixer_decay: float = Field(ge=0)  # weight decay of the mixers; 1e-9 as published

    @model_validator(mode="after")
    def _narrow_only_on_purpose(self) -> Self:
        if self.width < 1 and not self.narrow:
            raise PydanticCustomError("width", "width must be at least 1, or narrow true: below 1 some outputs start at zero")
        return self


class Product(torch.autograd.Function):
    """M W: (O, h) and (h, K) to (O, K). The gradient of M, a sum over K, is taken in one part for each CPU thread: the library's
    product leaves all but one idle where O and h are small (5 times slower for the 64 filters of a ResNet-32 on two cores)."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, filters)
        return matrix @ filters

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        matrix, filters = ctx.saved_tensors
        parts = torch.get_num_threads() if gradient.device.type == "cpu" else 1
        if parts == 1 or gradient.shape[1] % parts:
            return gradient @ filters.T, matrix.T @ gradient
        left = gradient.unflatten(1, (parts, -1)).transpose(0, 1)  # (parts, O, K / parts)
        right = filters.unflatten(1, (parts, -1)).permute(1, 2, 0)  # (parts, K / parts, h)
        return torch.bmm(left, right).sum(0), matrix.T @ gradient


class Mixing(Computed):
    """Mixes an original (h, ...) along its first axis into (O, ...)."""

    def matrix(self) -> Tensor:
        """The mixing matrix: (O, h)."""
        raise AssertionError("a subclass says what mixes")

    def compose(self, original: Tensor) -> Tensor:
        mixed: Tensor = Product.apply(self.matrix(), original.reshape(len(original), -1))
        return mixed.reshape(-1, *original.shape[1:])

    def invert(self, original: Tensor, target: Tensor) -> Tensor:
        """Exact where the matrix has full row rank."""
        change = (target - self.compose(original)).reshape(len(target), -1)
        step = torch.linalg.pinv(self.matrix().double()) @ change.double()
        return original + step.reshape(original.shape).to(original.dtype)

    def start(self, tensor: Tensor) -> Tensor:
        """The layer's own rows, and uniform draws of the same standard deviation about 0."""
        hidden, own = self.matrix().shape[1], tensor.detach()
        more = own.new_empty(max(hidden - len(own), 0), *own.shape[1:]).uniform_(-(3**0.5), 3**0.5)
        return torch.cat([own[:hidden], more * own.square().mean().sqrt()])


class KernelMixing(Mixing, Kernel):
    """Mixes the kernels of a layer. `mixers` are W_2 ... W_depth, in the order in which they act."""

    def __init__(self, layer: Expandable, depth: int, width: float) -> None:
        super().__init__(layer)
        outputs, _, _ = filters_of(layer)
        widths = [round(width * outputs)] * (depth - 1) + [outputs]
        eyes = [torch.eye(o, i).to(layer.weight) for i, o in zip(widths, widths[1:], strict=False)]
        self.mixers = nn.ParameterList(map(nn.Parameter, eyes))

    def matrix(self) -> Tensor:
        product = self.mixers[0]
        for mixer in self.mixers[1:]:
            product = mixer @ product
        return product

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """W1 keeps all its filters: the kernel is exactly the slice."""
        last = len(self.mixers) - 1
        self.mixers[last] = nn.Parameter(self.mixers[last].detach()[outputs].clone())
        self.replace(self.original[:, inputs])


class BiasMixing(Mixing):
    """Mixes the bias of a layer as its kernels are mixed."""

    def __init__(self, kernels: KernelMixing) -> None:
        super().__init__()
        self.kernels = (kernels,)

    def matrix(self) -> Tensor:
        return self.kernels[0].matrix()

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """The kernels' mixers were sliced already; a bias has nothing of its own to drop."""


def expand_layer(layer: Expandable, *, depth: int, width: float) -> None:
    """Over-parameterise one layer in place."""
    kernels = KernelMixing(layer, depth, width)
    attach(layer, weight=kernels, **({} if layer.bias is None else {"bias": BiasMixing(kernels)}))


def expand(
    model: nn.Module,
    *,
    layers: Chosen = ("*",),
    depth: int = 2,
    width: float = 4,
    narrow: bool = False,
    l2_factor: float = 1.0,
    mixer_decay: float = 1e-9,
) -> None:
    """Over-parameterise convolutions of any dimension, transposed ones too, and linear layers of `model`, in place
    (`l2_factor` and `mixer_decay` only matter to the `Hook`, `narrow` to the check of the options)."""
    for layer in choose(model, "kflo", layers, lambda layer: round(width * filters_of(layer)[0]) > 0).values():
        expand_layer(layer, depth=depth, width=width)


def stack(model: nn.Module, networks: Sequence[nn.Module]) -> list[str]:
    """Transfer learning by stacking: give the expanded `model` the filters of several trained plain networks.

    Of every expanded layer, the k-th O rows of W1 become the filters (and biases) of the k-th network; everything that is not
    expanded comes from the first. With mixers at their start the model then computes what the first network computes. A tensor
    whose shape differs (the classifier of other classes) keeps its fresh values: their names are returned. `InputError` where
    the networks differ from each other, or are more than the width holds.
    """
    states = [network.state_dict() for network in networks]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError("kflo: only networks of one architecture can be stacked; these differ in the names or shapes of tensors")
    expanded = dict(_expanded(model))
    left = []
    with torch.no_grad():
        for layer, module in expanded.items():
            for name in module.parametrizations:
                left += _fill(f"{layer}.{name}", module.parametrizations[name][0], states)
        for name, tensor in model.state_dict().items():
            if name.rpartition(".parametrizations.")[0] in expanded:
                continue
            if name in states[0] and states[0][name].shape == tensor.shape:
                tensor.copy_(states[0][name])
            else:
                left.append(name)
    return left


def _fill(name: str, mixing: Any, states: Sequence[dict[str, Tensor]]) -> list[str]:
    """Put the networks' filters into the rows of one W1; [name] where they do not have its shape."""
    seen = mixing.turn if isinstance(mixing, KernelMixing) else nn.Identity()
    blocks = [seen(state[name]) for state in states if name in state]
    outputs, hidden = mixing.matrix().shape
    if not blocks or blocks[0].shape != (outputs, *mixing.original.shape[1:]):
        return [name]
    if len(blocks) * outputs > hidden:
        raise InputError(f"kflo: {len(blocks)} networks do not fit into {name}, whose width is {hidden / outputs:g}")
    mixing.original[: len(blocks) * outputs] = torch.cat(blocks)
    return []


class SumOfSquares(torch.autograd.Function):
    """sum |K|^2 over all kernels; one pass over them each way."""

    @staticmethod
    def forward(ctx: Any, *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(*kernels)
        return torch.stack([kernel.flatten().dot(kernel.flatten()) for kernel in kernels]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch._foreach_mul(ctx.saved_tensors, 2 * gradient))  # type: ignore[attr-defined]


def penalty(model: nn.Module) -> Tensor | None:
    """sum |W'|^2 over the layers that KFLO expanded; None where there is none. Inside `parametrize.cached()` no kernel is
    composed again that the forward pass has composed. `InputError` where it was composed there without gradients, as by a pass
    under `no_grad`: W1 and the mixers would not train."""
    return _squares([layer for _, layer in _expanded(model)])


def parameter_groups(model: nn.Module, weight_decay: float, mixer_decay: float = 1e-9) -> list[dict[str, Any]]:
    """Groups for an optimiser of your own: no decay for W1, `mixer_decay` for the mixers, `weight_decay` for the rest. The decay
    of the composed kernels is the loss term weight_decay * penalty(model)."""
    decays = _decays([layer for _, layer in _expanded(model)], mixer_decay)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(decays.get(parameter, weight_decay), []).append(parameter)
    return [{"params": members, "weight_decay": decay} for decay, members in groups.items()]


def _decays(layers: Sequence[Any], mixer_decay: float) -> dict[nn.Parameter, float]:
    decays: dict[nn.Parameter, float] = {}
    for layer in layers:
        for parametrization in layer.parametrizations.values():
            decays[parametrization.original] = 0.0
            for mixer in parametrization.parameters():
                decays.setdefault(mixer, mixer_decay)
    return decays


def _squares(layers: Sequence[Any]) -> Tensor | None:
    kernels = [layer.weight for layer in layers]
    for layer, kernel in zip(layers, kernels, strict=True):
        if torch.is_grad_enabled() and kernel.requires_grad is not layer.parametrizations.weight.original.requires_grad:
            raise InputError("kflo: a kernel was composed without gradients inside parametrize.cached(); leave no_grad out of it")
    return SumOfSquares.apply(*kernels) if kernels else None


def _expanded(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        layer: Any = module
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], KernelMixing):
            yield name, layer


class Hook(hooks.Hook):
    """Regularisation as in the authors' code: W1 has no weight decay, the mixers `mixer_decay`, and the composed kernels pay
    l2_factor * weight_decay * sum |W'|^2 in the loss."""

    def __init__(self, *, l2_factor: float = 1.0, mixer_decay: float = 1e-9, **_: Any) -> None:
        self.l2_factor, self.mixer_decay = l2_factor, mixer_decay
        self.layers: list[Any] | None = None  # found once for each optimiser: a walk over the network costs more than the penalty

    def parameter_rules(self, run: hooks.Run) -> dict[nn.Parameter, hooks.ParameterRule]:
        self.layers = [layer for _, layer in _expanded(run.model)]
        decays = _decays(self.layers, self.mixer_decay)
        return {parameter: hooks.ParameterRule(weight_decay=decay) for parameter, decay in decays.items()}

    def penalty(self, run: hooks.Run, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        strength = self.l2_factor * run.fit.weight_decay
        if self.layers is None:
            self.layers = [layer for _, layer in _expanded(run.model)]
        squares = _squares(self.layers) if strength else None
        return None if squares is None else strength * squares

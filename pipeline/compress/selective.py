"""Selective convolution, compression mode: close input channels that no output would miss, while training goes on, and cut them out
at the end.

Source: Jeong and Shin 2019, "Training CNNs with Selective Allocation of Channels" (ICML), and its code,
github.com/jh-jeong/selective-convolution at 8aafd93.

    ECDM      D[o, i] = m_i * g_i * sum over the kernel of W[o, i]        g: the gate, 0 for a closed channel
    m_i       mean activity of input channel i; behind a batch norm (shift b, scale s) and ReLU, with input ~ N(0, 1):
              E[ReLU(s x + b)] = |s| phi(b / |s|) + b Phi(b / |s|)
    dealloc   normalise |D| so that each output's row sums to 1, sort channels by their largest entry, and close the longest prefix
              whose summed entries stay within `gamma` for every output

Where a layer reads something else than a batch norm's ReLU (a residual add, max pooling), m_i is the channel's measured mean over
training images. Applied to every ungrouped convolution but those that read the network's input or what a grouped one makes.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import hooks
from pipeline.channels import Channels, follow
from pipeline.config import CompressBlock
from pipeline.errors import InputError
from pipeline.evaluation import evaluate, reestimate_batchnorm
from pipeline.layers import convolutions
from pipeline.surgery import shrink


class Options(CompressBlock):
    """A block under `compress:`."""

    method: Literal["selective"]
    gamma: float = Field(gt=0, lt=1)  # share of any output's activity that one deallocation may close; 0.001 as published
    multiple: int = Field(ge=1)  # close only so many channels that those left are a multiple; 1 as published
    until: float = Field(gt=0, le=1)  # deallocate after each epoch of this first share of the training; 0.5 as published
    mean_batches: int = Field(ge=1)  # training batches behind a measured mean


def activity(scale: Tensor, shift: Tensor) -> Tensor:
    """E[ReLU(y)] for y ~ N(shift, scale^2), elementwise, in fp32; at scale 0 it is ReLU(shift)."""
    spread, shift = scale.detach().float().abs(), shift.detach().float()
    normal = torch.distributions.Normal(0.0, 1.0)
    ratio = shift / (spread + 1e-8)
    return spread * normal.log_prob(ratio).exp() + shift * normal.cdf(ratio)


def ecdm(weight: Tensor, mean: Tensor, gate: Tensor) -> Tensor:
    """The expected channel damage matrix (O, I) of kernels (O, I, kh, kw), activities (I,) and gates (I,)."""
    return weight.detach().float().sum((2, 3)) * (mean * gate)


def deallocate(matrix: Tensor, gamma: float, multiple: int = 1) -> Tensor:
    """The channels to close: a mask (I,) for a damage matrix (O, I). Where all of it could go, nothing is closed.

    With `multiple`, the prefix ends where the channels left open are a multiple of it: odd widths cost more time than they save.
    """
    shares = matrix.abs() / (matrix.abs().sum(1, keepdim=True) + 1e-8)
    order = shares.amax(0).argsort(stable=True)
    lost = shares[:, order].cumsum(1).amax(0)  # of any output, when this channel and those before it are closed
    exceeded = (lost > gamma).nonzero()
    prefix, channels = int(exceeded[0]) if len(exceeded) else 0, matrix.shape[1]
    prefix = max(channels - math.ceil((channels - prefix) / multiple) * multiple, 0)
    return torch.zeros(channels, dtype=torch.bool, device=matrix.device).index_fill(0, order[:prefix], True)


def eligible(model: nn.Module, channels: Channels) -> dict[str, nn.Conv2d]:
    """Ungrouped convolutions that read neither the network's input nor what a grouped convolution makes: the groups of that one
    could not be cut to equal widths."""
    layers = {name: layer for name, layer in convolutions(model) if name in channels.inputs}
    whole = {channel for channel, why in channels.pins().items() if why == "the network's input"}
    whole |= {channels.find(c) for name, layer in layers.items() if layer.groups > 1 for c in channels.outputs[name]}
    readable = {name: layer for name, layer in layers.items() if layer.groups == 1}
    return {name: layer for name, layer in readable.items() if not whole & {channels.find(c) for c in channels.inputs[name]}}


@torch.no_grad()
def measured_means(model: nn.Module, names: list[str], batches: Any, limit: int) -> dict[str, Tensor]:
    """Mean over images and pixels of every input channel of the named layers, in evaluation mode."""
    sums: dict[str, Tensor] = {}
    count = 0

    def watch(name: str) -> Any:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mean = inputs[0].float().mean((2, 3)).sum(0)
            sums[name] = sums[name] + mean if name in sums else mean

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    model.eval()
    for images, _ in (batch for batch, _ in zip(batches, range(limit), strict=False)):
        model(images)
        count += len(images)
    for handle in handles:
        handle.remove()
    return {name: total / count for name, total in sums.items()}


def _apply_gate(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs[0] * module.gate[:, None, None]  # type: ignore[operator,index]


class Selective(hooks.Hook):
    """Gates in front of every eligible layer while it trains; the closed channels go at the end."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        self.channels = follow(model, input_shape)
        layers = eligible(model, self.channels)
        if not layers:
            raise InputError("selective: the network has no ungrouped convolution behind its first; choose another method")
        self.measured = [name for name in layers if name not in self.channels.relu_source]
        self.names = list(layers)
        others = [name for name in self.channels.inputs if name not in layers]
        notes = [f"selective leaves the inputs of {', '.join(others)} whole"]
        if self.measured:
            notes.append(f"selective measures the activity that enters {', '.join(self.measured)}: no batch norm and ReLU")
        return notes + [f"selective: {what}" for what in self.channels.untreated]

    def prepare(self, run: hooks.Run) -> None:
        self.handles = []
        for name in self.names:
            layer: Any = run.model.get_submodule(name)
            layer.register_buffer("gate", torch.ones(layer.in_channels))
            self.handles.append(layer.register_forward_pre_hook(_apply_gate))

    def after_epoch(self, run: hooks.Run) -> bool:
        if run.epoch - 1 < round(self.options.until * run.epochs, 9):
            self.close(run)
        return False

    @torch.no_grad()
    def close(self, run: hooks.Run) -> None:
        """Deallocate in every gated layer."""
        batches = run.train.epoch(run.epoch)
        means = measured_means(run.model, self.measured, batches, self.options.mean_batches) if self.measured else {}
        rows = []
        for name in self.names:
            layer: Any = run.model.get_submodule(name)
            if name in means:
                mean = means[name]
            else:
                norm: Any = run.model.get_submodule(self.channels.relu_source[name])
                mean = activity(norm.weight, norm.bias)
            layer.gate[deallocate(ecdm(layer.weight, mean, layer.gate), self.options.gamma, self.options.multiple)] = 0.0
            rows.append({"name": name, "open": int(layer.gate.sum()), "inputs": layer.in_channels})
        run.log("dealloc", layers=rows, open=sum(row["open"] for row in rows))

    def finish(self, run: hooks.Run) -> None:
        reads = {}
        for name, handle in zip(self.names, self.handles, strict=True):
            layer: Any = run.model.get_submodule(name)
            reads[name] = layer.gate > 0
            del layer.gate
            handle.remove()
        run.model = shrink(run.model, run.input_shape, reads)
        before = evaluate(run.model, run.validation).accuracy
        batches = reestimate_batchnorm(run.model, run.train, run.epoch)
        after = evaluate(run.model, run.validation).accuracy
        run.log("surgery", removed={name: int((~mask).sum()) for name, mask in reads.items()})
        run.log("batchnorm", batches=batches, validation_accuracy_before=before, validation_accuracy_after=after)


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Selective(options)

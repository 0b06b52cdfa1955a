"""What a cut would cost and save, by counting channels: no network is built, nothing is traced again."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from pipeline import measure
from pipeline.channels import Channels
from pipeline.surgery import Widths, widths

Counted = Literal["keep", "macs", "params"]


class Costs:
    """MACs, parameters and channels of the networks that `shrink` would make of `model`, as they are deployed: an
    over-parameterised layer counts as the layer it collapses to. MAC: one multiply-add counts one."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self.channels = channels
        modules: dict[str, Any] = dict(model.named_modules())
        self.taps, self.biases, self.numbers = {}, {}, {}  # numbers: trained ones of a channel, of what treats each alone
        for name in (*channels.inputs, *channels.channelwise):
            layer = modules[name]
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                self.taps[name] = layer.kernel_size[0] * layer.kernel_size[1]
            elif isinstance(layer, nn.Linear):
                self.taps[name] = 1
            if name in self.taps:
                self.biases[name] = layer.bias is not None
            if name in channels.channelwise:
                self.numbers[name] = self.taps[name] + self.biases[name] if name in self.taps else 2 * bool(layer.affine)
        for name in channels.involved:  # kernels that are made elsewhere
            self.taps[name], self.numbers[name] = modules[name].kernel_size ** 2, 0
        known = {*channels.inputs, *channels.channelwise}
        others = [module for name, module in modules.items() if name not in known and not _inside(name, known)]
        self.constant = sum(parameter.numel() for module in others for parameter in module.parameters(recurse=False))
        self.constant_macs = 0
        full = widths(channels, {})
        if channels.untreated:  # layers that were not understood multiply too
            meta = any(parameter.is_meta for parameter in model.parameters())
            real = copy.deepcopy(model).to_empty(device="cpu") if meta else model
            self.constant_macs = max(measure.count(real, channels.shape)["macs"] - self._count("macs", full), 0)
        self.whole = {kind: self._count(kind, full) for kind in ("keep", "macs", "params")}

    def macs(self, reads: Mapping[str, Tensor]) -> int:
        """Multiply-adds for one image, where layers read what `reads` says."""
        return self._count("macs", widths(self.channels, reads))

    def parameters(self, reads: Mapping[str, Tensor]) -> int:
        """Trained numbers of the deployed network."""
        return self._count("params", widths(self.channels, reads))

    def keep(self, reads: Mapping[str, Tensor]) -> int:
        """Outputs of all filtering layers."""
        return self._count("keep", widths(self.channels, reads))

    def share(self, kind: Counted, reads: Mapping[str, Tensor]) -> float:
        """One of the three as a share of that of the whole network."""
        return self._count(kind, widths(self.channels, reads)) / self.whole[kind]

    def _count(self, kind: str, found: Widths) -> int:
        """`kind` of the layers of `found`."""
        if kind == "keep":
            return sum(outputs for _, outputs, _ in found.filtering.values())
        total = self.constant_macs if kind == "macs" else self.constant
        for name, (inputs, outputs, groups) in found.filtering.items():
            weights = inputs * outputs // groups * self.taps[name]
            total += weights * self.channels.pixels[name] if kind == "macs" else weights + self.biases[name] * outputs
        for name, count in found.channelwise.items():
            taps = self.taps.get(name, 0)  # batch norms have none
            total += count * taps * self.channels.pixels.get(name, 0) if kind == "macs" else count * self.numbers[name]
        return total


def _inside(name: str, known: set[str]) -> bool:
    """Whether a module is part of a known layer, as a parametrisation is."""
    return any(name.startswith(f"{layer}.") for layer in known)

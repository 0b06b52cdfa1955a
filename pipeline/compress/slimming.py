"""Network slimming: an L1 penalty on batch norms' scales during training, and channels with small scales removed.

Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming" (ICCV), and its code,
github.com/Eric-mingjie/network-slimming at b395dc0.

    loss      + sparsity * sum of |gamma| over all batch norms behind convolutions
    removed   by |gamma|, ranked over the whole network: those not above the one at int(n * share) in ascending order
    after it  fine-tuning, without the penalty

The authors' 1e-4 (VGG) and 1e-5 (ResNet, DenseNet) belong to 160 epochs from fresh weights and a share of 0.4 to 0.7. Such a sparse
training is the first one with this method in `train.compress` and `cut_after: null`; then `cut_after: 0` cuts what enters the
compress stage. With a share of the epochs between, the stage is a round of sparse training, the cut, and a round of fine-tuning,
each with its learning-rate schedule from the start.

Channels that can only go together have the mean |gamma| over all batch norms that act on them. The authors have residual networks
and DenseNets in pre-activation form and let each batch norm select inputs of its own convolution; here what several batch norms
read goes for all of them or for none. Channels without a batch norm stay.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import hooks, removal
from pipeline.budget import Scores
from pipeline.channels import Channels
from pipeline.errors import InputError
from pipeline.surgery import Shape, shrink


class Options(removal.RemovalBlock):
    """A block under `compress:`."""

    method: Literal["slimming"]
    sparsity: float = Field(ge=0)  # 1e-4 for VGG, 1e-5 for ResNet and DenseNet as published
    cut_after: float | None = Field(ge=0, le=1)  # share of the epochs trained with the penalty before the cut; null: no cut


def penalised(model: nn.Module) -> list[nn.Parameter]:
    """The scales of all batch norms behind convolutions."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [norm.weight for norm in norms if norm.affine]


def _scaled(model: nn.Module, channels: Channels) -> dict[str, nn.BatchNorm2d]:
    found = {name: model.get_submodule(name) for name in channels.channelwise}
    return {name: norm for name, norm in found.items() if isinstance(norm, nn.BatchNorm2d) and norm.affine}


def scores(model: nn.Module, channels: Channels) -> Scores:
    """Of each unit that has a batch norm: the mean of |gamma|."""
    scales = {name: norm.weight.detach().double().abs().tolist() for name, norm in _scaled(model, channels).items()}
    found = {}
    for unit, places in removal.filters_of(channels).items():
        values = [scales[name][position] for name, position in places if name in scales]
        if values:
            found[unit] = sum(values) / len(values)
    return found


def prune(model: nn.Module, input_shape: Shape, **how: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A smaller copy of `model`, and what was removed. `how`: see `removal.choose`."""
    return removal.prune(model, input_shape, scores, **how)


class Slimming(removal.Removal):
    """Sparse training, the cut, fine-tuning."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.cutting: dict[str, Tensor] = {}  # what layers read of the whole network, once it is cut
        self.is_cut = False

    def scores(self, run: hooks.Run, channels: Channels) -> Scores:
        return scores(run.model, channels)

    def rounds(self, epochs: int) -> list[int]:
        sparse = self._sparse(epochs)
        return [part for part in (sparse, epochs - sparse) if part]

    def _sparse(self, epochs: int) -> int:
        """Epochs with the penalty."""
        share = self.options.cut_after
        return epochs if share is None else round(share * epochs)

    def treated(self, model: nn.Module, channels: Channels) -> set[int]:
        scales = _scaled(model, channels)
        filters = removal.filters_of(channels).items()
        found = {unit for unit, places in filters if any(name in scales for name, _ in places)}
        if not found:
            raise InputError("slimming ranks channels by their batch norms, and the network has none; choose another method")
        return found

    def prepare(self, run: hooks.Run) -> None:
        self.run = run
        if self.options.cut_after is not None and not self._sparse(run.fit.epochs):
            self.slim(run)

    def begin_round(self, run: hooks.Run) -> bool:
        if run.round == 2:
            self.slim(run)
        return True

    def slim(self, run: hooks.Run) -> None:
        """Cut; what was best before is another network."""
        self.cutting, self.is_cut = self.cut(run), True
        run.best, run.best_accuracy = None, -1.0

    def penalty(self, run: hooks.Run, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        if self.is_cut or not self.options.sparsity:
            return None
        return self.options.sparsity * torch.stack([scale.abs().sum() for scale in penalised(run.network)]).sum()

    def penalty_reads(self, run: hooks.Run) -> bool:
        return self.is_cut

    def finish(self, run: hooks.Run) -> None:
        if self.options.cut_after is not None and not self.is_cut:
            self.slim(run)

    def state(self) -> dict[str, Any]:
        return {"is_cut": self.is_cut}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.cutting)

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if state["is_cut"] and not self.is_cut:
            self.run.model = shrink(self.run.model, self.run.input_shape, tensors)
        self.cutting, self.is_cut = tensors, state["is_cut"]


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Slimming(options)

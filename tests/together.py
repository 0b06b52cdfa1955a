"""Trainings with every method, in one process or as one of several: `RANK=0 WORLD_SIZE=2 ... python tests/together.py DATA OUT`.

Writes the tensors that each training ends with to OUT/METHOD-RANK.safetensors. Batch norms keep the statistics they have: then a
step does not depend on how a batch is divided.
"""

import os
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from conftest import FIT
from networks import randomise
from test_laws import COMPRESS, REVIVE, hook
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import distributed, models
from pipeline.averaging import Averaging
from pipeline.config import Distill, Fit
from pipeline.data.batches import Batches, Prepared, load
from pipeline.distillation import Distillation
from pipeline.evaluation import pick_device
from pipeline.hooks import Hook, Run
from pipeline.overparameterize import kflo, overparameterize
from pipeline.training import train

ELSEWHERE = ("lgc", "torch_pruning")  # these refuse the over-parameterised network
BATCH = 192


def methods() -> list[tuple[str, str]]:
    """Every method that takes the network."""
    both = [("revive", name) for name in REVIVE] + [("compress", name) for name in COMPRESS]
    return [(family, name) for family, name in both if name not in ELSEWHERE]


def fixed(model: nn.Module) -> nn.Module:
    """Its batch norms stay in evaluation."""
    for norm in [module for module in model.modules() if isinstance(module, _BatchNorm)]:
        norm.eval()
        norm.train = lambda mode=True: None  # type: ignore[method-assign, assignment, return-value]
    return model


def trained(data: Prepared, family: str, name: str) -> nn.Module:
    """A small residual network, expanded, after two epochs with the method, a moving average and (to compress) a teacher."""

    def draw(number: int) -> nn.Module:
        torch.manual_seed(number)
        model = models.build("resnet", input_shape=data.shape, classes=len(data.classes), depth=8)
        return fixed(randomise(overparameterize(model, "kflo", depth=2, width=2), number))

    hooks: list[Hook] = [kflo.Hook(), Averaging(0.9)]
    hooks += [Distillation(Distill(loss="kl", weight=0.5, temperature=2.0))] if family == "compress" else []
    fit = Fit.model_validate(FIT | {"epochs": 2, "batch_size": BATCH, "lr": 0.02})
    batches = [Batches(data, split, BATCH, "cpu", None, split == "train", 0) for split in ("train", "validation")]
    run = Run(draw(0), fit, *batches, seed=0, device=torch.device("cpu"), fresh=draw if name == "grafting" else None)
    return train(run, [*hooks, hook(family, name)])


def main(data: Path, out: Path) -> None:
    """All of them, one after another."""
    pick_device("cpu", 1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for family, name in methods():
        state = {key: tensor.contiguous() for key, tensor in trained(load(data), family, name).state_dict().items()}
        safetensors.torch.save_file(state, out / f"{family}-{name}-{distributed.rank()}.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

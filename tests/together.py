"""Trainings with every method, alone and as one of two processes: `RANK=0 WORLD_SIZE=2 ... python tests/together.py DATA OUT`.

Writes the tensors that each training ends with to OUT/METHOD-alone.safetensors and OUT/METHOD-RANK.safetensors. Batch norms keep
the statistics they have: then a step does not depend on how a batch is divided. Only `killed` lets them learn.
"""

import math
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from conftest import FIT
from networks import randomise
from test_laws import COMPRESS, REVIVE, hook
from test_resume_batch import AT_ONCE, Killer
from test_resume_batch import network as with_dropout
from test_training import Killed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import models
from pipeline.averaging import Averaging
from pipeline.config import Distill, Fit
from pipeline.data.batches import Batches, Prepared, load
from pipeline.distillation import Distillation
from pipeline.evaluation import pick_device
from pipeline.hooks import Hook, Run
from pipeline.overparameterize import kflo, overparameterize
from pipeline.resume import Resume
from pipeline.training import train

ELSEWHERE = ("lgc", "torch_pruning")  # these refuse the over-parameterised network
BATCH = 96
KILLS = (4, 1, 2, 3)  # steps of each attempt; of two epochs of 6


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


def run_of(data: Prepared, model: nn.Module, batch: int) -> Run:
    fit = Fit.model_validate(FIT | {"epochs": 2, "batch_size": batch, "lr": 0.02})
    batches = [Batches(data, split, batch, "cpu", None, split == "train", 0) for split in ("train", "validation")]
    return Run(model, fit, *batches, seed=0, device=torch.device("cpu"))


def trained(data: Prepared, family: str, name: str) -> nn.Module:
    """A small residual network, expanded, after two epochs with the method, a moving average and (to compress) a teacher."""

    def draw(number: int) -> nn.Module:
        torch.manual_seed(number)
        model = models.build("resnet", input_shape=data.shape, classes=len(data.classes), depth=8)
        return fixed(randomise(overparameterize(model, "kflo", depth=2, width=2), number))

    hooks: list[Hook] = [kflo.Hook(), Averaging(0.9)]
    hooks += [Distillation(Distill(loss="kl", weight=0.5, temperature=2.0))] if family == "compress" else []
    run = run_of(data, draw(0), BATCH)
    run.fresh = draw if name == "grafting" else None
    return train(run, [*hooks, hook(family, name)])


def killed(data: Prepared, out: Path, rank: int) -> None:
    """The same training undisturbed and with deaths of both processes within its epochs; the first state that was kept."""
    resume = Resume(out, "train-0", "0" * 16, AT_ONCE)

    def attempt(steps: float, resume: Resume | None) -> nn.Module:
        return train(run_of(data, with_dropout(expand=True), 32), [kflo.Hook(), Killer([], steps)], resume)

    write(attempt(math.inf, None), out / f"undisturbed-{rank}")
    for steps in KILLS:
        with suppress(Killed):
            attempt(steps, resume)
        dist.barrier()
        shutil.copy(resume.path, out / f"kept-{rank}.safetensors")
    write(attempt(math.inf, resume), out / f"resumed-{rank}")


def write(model: nn.Module, path: Path) -> None:
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, path.with_name(f"{path.name}.safetensors"))


def main(data: Path, out: Path) -> None:
    """All of them, one after another; those alone are shared out."""
    pick_device("cpu", 1)
    rank, prepared = int(os.environ["RANK"]), load(data)
    for family, name in methods()[rank :: int(os.environ["WORLD_SIZE"])]:
        write(trained(prepared, family, name), out / f"{family}-{name}-alone")
    dist.init_process_group("gloo")
    for family, name in methods():
        write(trained(prepared, family, name), out / f"{family}-{name}-{rank}")
    killed(prepared, out, rank)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

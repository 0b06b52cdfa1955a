"""What a network achieves, and batch-norm statistics that fit its weights. Everything here runs in fp32."""

import ctypes
import os
import sys
from itertools import islice

import torch
from torch import nn
from torch.nn.utils import parametrize

from pipeline import distributed
from pipeline.data.batches import Batches
from pipeline.errors import InputError
from pipeline.hooks import Run
from pipeline.tasks import TASKS, Score, Tally


def pick_device(wanted: str, threads: int) -> torch.device:
    """The device for "auto", "cpu" or "cuda", with deterministic kernels and `threads` CPU threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order each time
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms does the same and imports the compiler: a second
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # NaN into every new tensor
    _keep_freed_memory()
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("params.yaml: runtime.device = 'cuda', but torch finds no CUDA device here; use auto or cpu")
    cuda = wanted != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free. It would give it back, and a training step would wait for the same pages to
    be mapped and zeroed again: a fifth of a step of Cifar-quick on one core."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back at the end of the heap
        mallopt(-2, 64 << 20)  # M_TOP_PAD: grow the heap by 64 MiB


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> Score:
    """The scores of the data's task over all images of `batches`. Leaves the model in evaluation mode."""
    model.eval()
    tally = Tally(TASKS[batches.prepared.task])
    with parametrize.cached():
        for images, targets in batches.epoch(0, distributed.part):
            tally.add(model(images), targets)
    return tally.score(distributed.total(tally.sums()))


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Batches, epoch: int, limit: int = 50) -> int:
    """Replace the running statistics of every batch norm by the mean over at most `limit` batches of the weights as they are.

    Returns the number of batches used; 0 where there is no batch norm. Dropout is off and no weight changes. Surgery leaves
    statistics of channels that no longer exist in every later layer's input, so this belongs to every surgery.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    count = min(limit, len(batches))
    if not norms or not count:
        return 0
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    with parametrize.cached():
        for images, _ in islice(batches.epoch(epoch), count):
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    return count


def settle_batchnorm(run: Run) -> None:
    """After surgery in a training: batch norms that fit the smaller network, and an event with the score before and after."""
    before = evaluate(run.network, run.validation).accuracy
    batches = reestimate_batchnorm(run.network, run.train, run.epoch)
    after = evaluate(run.network, run.validation).accuracy
    run.log("batchnorm", batches=batches, validation_accuracy_before=before, validation_accuracy_after=after)

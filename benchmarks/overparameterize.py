"""What over-parameterised training costs: one training step of KFLO 2x4 in four forms, same network, batch and device, one run.

    python -m benchmarks.overparameterize [--networks resnet wide_resnet vgg16] [--batch 128] [--rounds 5] [--steps 4]

    plain    the network without over-parameterisation
    ours     pipeline.overparameterize.kflo: kernels composed once a step by one matrix product, in fp32, with its penalty
    authors  the released scheme, written anew: each layer composes its kernel by a 1-D convolution in each forward pass and sums
             its squares; the penalty adds up all layers
    cascade  in feature space: the wide convolution, then 1 x 1 convolutions (no penalty: the kernel is never computed)

Every form trains with the fused optimiser and, where the hardware has it, bf16 (kernels are composed in fp32 in `ours` and
`authors`). A round is some steps of each form in turn, after one that is not timed: the last form's numbers still fill the caches.
Prints medians over rounds of a round's median step and of its ratio to plain, and the peak memory of three steps, in a process of
its own, beyond that of a process without a network (CUDA: of the allocator).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline import models
from pipeline.evaluation import pick_device
from pipeline.overparameterize import kflo, overparameterize
from pipeline.precision import autocast

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_quick": {},
    "resnet": {"depth": 32},
    "wide_resnet": {"depth": 16, "width": 8, "dropout": 0.3},
    "vgg16": {},
}
WIDTH, DECAY = 4, 1e-4


class Authors(nn.Module):
    """One layer of the released scheme."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, outputs = layer, len(layer.weight)
        more = layer.weight.new_empty(outputs * (WIDTH - 1), *layer.weight.shape[1:]).normal_(0, 0.01)
        self.first = nn.Parameter(torch.cat([layer.weight.detach(), more]))
        self.mixer = nn.Parameter(torch.eye(outputs, outputs * WIDTH)[:, :, None])
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().repeat(WIDTH))
        del layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            kernel = F.conv1d(self.first.reshape(1, len(self.first), -1), self.mixer).view(-1, *self.first.shape[1:])
            self.squares = torch.sum(kernel**2)
            bias = None if self.bias is None else F.conv1d(self.bias.view(1, -1, 1), self.mixer).view(-1)
        return F.linear(x, kernel, bias) if isinstance(self.layer, nn.Linear) else self.layer._conv_forward(x, kernel, bias)


def cascade(layer: Any) -> nn.Module:
    """The wide layer, then the mixing."""
    wide = len(layer.weight) * WIDTH
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(layer.in_features, wide, layer.bias is not None), nn.Linear(wide, layer.out_features, False))
    shape = (layer.kernel_size, layer.stride, layer.padding)
    first = nn.Conv2d(layer.in_channels, wide, *shape, bias=layer.bias is not None)
    return nn.Sequential(first, nn.Conv2d(wide, layer.out_channels, 1, bias=False))


def replace(model: nn.Module, make: Callable[[Any], nn.Module]) -> nn.Module:
    """`model` with every layer replaced, in place."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Conv2d | nn.Linear):
            setattr(model, name, make(child))
        else:
            replace(child, make)
    return model


def authors_penalty(model: nn.Module) -> Tensor:
    """Over all layers, as the released code adds them up."""
    return sum((layer.squares for layer in model.modules() if isinstance(layer, Authors)), torch.zeros(()))


FORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], Tensor | None]]] = {
    "plain": (lambda model: model, lambda model: None),
    "ours": (lambda model: overparameterize(model, "kflo", depth=2, width=WIDTH), kflo.penalty),
    "authors": (lambda model: replace(model, Authors), authors_penalty),
    "cascade": (lambda model: replace(model, cascade), lambda model: None),
}


class Step:
    """One training step of one form of a network."""

    def __init__(self, network: str, form: str, batch: int, device: torch.device) -> None:
        make, self.penalty = FORMS[form]
        model = models.build(network, input_shape=(3, 32, 32), classes=10, **NETWORKS[network])
        self.model = make(model.to(memory_format=torch.channels_last)).to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, fused=True)
        self.images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,), device=device)
        self.device = device

    def __call__(self) -> float:
        """Seconds of one step."""
        _wait(self.device)
        started = time.perf_counter()
        with parametrize.cached():
            with autocast(self.device, "auto"):
                logits = self.model(self.images)
            loss = F.cross_entropy(logits.float(), self.labels)
            penalty = self.penalty(self.model)
            loss = loss if penalty is None else loss + DECAY * penalty
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        _wait(self.device)
        return time.perf_counter() - started


def peak_mb(network: str, form: str, batch: int, threads: int) -> float:
    """Peak memory of three steps, in 10^6 bytes; in this process."""
    device = pick_device("auto", threads)
    before = _peak_rss()
    step = Step(network, form, batch, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return (_peak_rss() - before) / 1e6


def _peak_rss() -> float:
    """Bytes; Linux tells it by process, unlike getrusage, which counts the parent's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * float(line.split()[1])


def measure(network: str, asked: argparse.Namespace) -> None:
    """Print the table of one network and one line of JSON."""
    device = pick_device("auto", asked.threads)
    steps = {form: Step(network, form, asked.batch, device) for form in FORMS}
    for step in steps.values():
        step()
    rounds = [{form: _median_of(step, asked.steps) for form, step in steps.items()} for _ in range(asked.rounds)]
    del steps
    result: dict[str, Any] = {"network": network, "batch": asked.batch, "device": str(device), "threads": asked.threads}
    print(f"\n{network} {NETWORKS[network]}, batch {asked.batch}, {device}, {asked.threads} threads, {asked.rounds} rounds")
    for form in FORMS:
        ratios = sorted(times[form] / times["plain"] for times in rounds)
        command = [sys.executable, "-m", "benchmarks.overparameterize", "--peak", network, form]
        command += ["--batch", str(asked.batch), "--threads", str(asked.threads)]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds = statistics.median(times[form] for times in rounds)
        result[form] = {"ms": 1e3 * seconds, "ratio": statistics.median(ratios), "peak_mb": memory}
        spread = f"{ratios[len(ratios) // 4]:.2f}-{ratios[-1 - len(ratios) // 4]:.2f}"
        print(f"{form:>8}: {1e3 * seconds:9.1f} ms   {statistics.median(ratios):5.2f} x plain ({spread})   peak {memory:7,.0f} MB")
    print(json.dumps(result))


def _median_of(step: Step, count: int) -> float:
    step()
    return statistics.median(step() for _ in range(count))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--networks", nargs="+", default=["resnet", "wide_resnet", "vgg16"], choices=NETWORKS)
    parser.add_argument("--peak", nargs=2, metavar=("NETWORK", "FORM"), help="print only the peak memory of one form")
    for name, default in (("batch", 128), ("rounds", 5), ("steps", 4), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    if asked.peak:
        print(peak_mb(*asked.peak, asked.batch, asked.threads))
        return
    for network in asked.networks:
        measure(network, asked)


if __name__ == "__main__":
    main()

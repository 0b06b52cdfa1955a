"""What reviving costs beside training: a pass of kernel reactivation and a batch of Taylor ranking, as shares of an epoch.

    python -m benchmarks.revive [--depth 110] [--batch 128] [--images 50000] [--threads 1] [--rounds 5]

    step           one training step, by the training loop of pipeline/training.py
    ours           one pass of reactivation over the whole network, with the published options of ResNet-110
    kernel loop    the same pass, written as the paper tells it: a Python loop over filters and kernels
    ranking        Taylor scores of all filters from one batch

A round is three steps, then the others in turn; both passes start from the same weights each time, and must leave the same. Prints
medians over rounds, the pass's speed-up (a median of ratios within a round), and each as a share of an epoch of `images` images.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import models
from pipeline.channels import follow
from pipeline.evaluation import pick_device
from pipeline.layers import convolutions
from pipeline.precision import autocast
from pipeline.revive.reactivation import reactivate
from pipeline.revive.restart import taylor_scores

SHARES = {"alpha": 0.2, "beta": 0.3, "gamma": 0.1}


@torch.no_grad()
def kernel_loop(model: nn.Module, alpha: float, beta: float, gamma: float) -> None:
    """One pass, kernel by kernel; in place."""
    layers = [layer for _, layer in convolutions(model) if layer.weight[0, 0].numel() > 1 and layer.in_channels > 1]
    norms = [[[float(kernel.abs().sum()) for kernel in kernels] for kernels in layer.weight] for layer in layers]
    places = [(number, filter) for number, layer in enumerate(norms) for filter in range(len(layer))]
    mean = {(n, f): sum(norms[n][f]) / layers[n].weight[f].numel() for n, f in places}
    in_network = set(sorted(places, key=mean.__getitem__)[: int(alpha * len(places))])
    for number, layer in enumerate(layers):
        total = [sum(kernels) for kernels in norms[number]]
        weakest = sorted(range(len(total)), key=total.__getitem__)[: int(beta * len(total))]
        for filter in (filter for filter in weakest if (number, filter) in in_network):
            own = norms[number][filter]
            for kernel in sorted(range(len(own)), key=own.__getitem__)[: int(gamma * len(own))]:
                layer.weight[filter, kernel] *= max(own) / own[kernel]


class Bench:
    """The four pieces of work on one network and one batch."""

    def __init__(self, depth: int, batch: int, device: torch.device) -> None:
        self.device = device
        model = models.build("resnet", input_shape=(3, 32, 32), classes=10, depth=depth).to(device)
        self.model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.watched = follow(model, (3, 32, 32)).norm_after
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        self.images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,), device=device)

    def step(self) -> None:
        """One step of training."""
        with autocast(self.device, "auto"):
            logits = self.model(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def rank(self) -> dict[str, Tensor]:
        """Scores of all filters."""
        return taylor_scores(self.model, self.watched, [(self.images.clone(), self.labels)], criterion="per_example")

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds."""
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def round(self) -> dict[str, float]:
        """Seconds of each piece of work."""
        seconds = {"step": statistics.median(self.timed(self.step) for _ in range(3))}
        ours, loop = copy.deepcopy(self.model), copy.deepcopy(self.model)
        seconds["ours"] = self.timed(lambda: reactivate(ours, **SHARES))
        seconds["kernel loop"] = self.timed(lambda: kernel_loop(loop, **SHARES))
        for (name, layer), (_, other) in zip(convolutions(ours), convolutions(loop), strict=True):
            torch.testing.assert_close(layer.weight, other.weight, msg=lambda text, name=name: f"{name}: {text}")
        return seconds | {"ranking": self.timed(self.rank)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, default in (("depth", 110), ("batch", 128), ("images", 50_000), ("threads", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    device = pick_device("auto", asked.threads)
    bench = Bench(asked.depth, asked.batch, device)
    bench.round()  # not counted: it warms up
    rounds = [bench.round() for _ in range(asked.rounds)]
    median = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    epoch = median["step"] * asked.images / asked.batch
    print(f"ResNet-{asked.depth}, batch {asked.batch}, {device}, {asked.threads} threads, {asked.rounds} rounds")
    for key, seconds in median.items():
        print(f"{key:>12}: {1e3 * seconds:9.2f} ms   {seconds / epoch:10.5%} of an epoch of {epoch:,.0f} s")
    speedup = statistics.median(row["kernel loop"] / row["ours"] for row in rounds)
    print(f"{'speed-up':>12}: {speedup:.1f} x the kernel loop")
    print(json.dumps(vars(asked) | {"device": str(device), "epoch_s": epoch, "speedup": speedup, **median}))


if __name__ == "__main__":
    main()

"""Compress methods side by side on one trained network, over a range of sizes: accuracy, measured time, and the time they take.

    python -m benchmarks.compress MODEL [--data DATA] [--ratios 1.2 1.5 2 2.5 3] [--methods ...] [--multiple 8] [--images 2000]
                                  [--tune 0] [--tuned 1.5 2 3] [--repeats 60]

MODEL is the folder `model` of a training of the chain or of a recipe (recipes/compress_cifar10.yaml), DATA the folder of its
prepared data, by default the one under outputs/ that the model was trained on. Each method is asked for a network with 1/ratio of
the multiply-adds, once, without training:

    takeover          channels closed for each reader, after the others took over what they can (ours); 4 training batches
    dealloc           selective convolution's expected channel damage, one threshold for all layers; means over 8 training batches
    dealloc raw       the same without its compensation
    diet              the contiguous window with the largest sum
    l1, bn_scale, random       filter norms, batch norms' scales (network slimming without its sparse training), drawn
    tp_*              Torch-Pruning's importances with our budget; tp_*_own: its own progressive pruner, which rounds as it does

and then measured: the multiply-adds left, accuracy on `images` test images right after removal, the same after batch norms were
estimated again on 30 training batches, for the ratios of `tuned` after `tune` epochs on `train` images with equal settings, ONNX
Runtime latency at batch 1 and 32, paired with the whole network's, on one thread. A method that cannot treat the network is named
with its reason. Prints a table a ratio, and all figures as JSON.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import checkpoint, latency
from pipeline.channels import follow
from pipeline.compress import diet, l1, random, slimming, torch_pruning
from pipeline.compress.selective import dealloc, make_up
from pipeline.compress.takeover import take_over
from pipeline.config import Fit, Target
from pipeline.data.batches import Batches, Prepared, load
from pipeline.errors import InputError
from pipeline.evaluation import evaluate, pick_device, reestimate_batchnorm
from pipeline.expansion import collapse
from pipeline.export import export
from pipeline.hooks import Run
from pipeline.measure import count
from pipeline.selection import measured_means, units
from pipeline.surgery import shrink
from pipeline.training import train

TP = ("l1", "l2", "fpgm", "lamp", "bn_scale")
METHODS = ("takeover", "dealloc", "dealloc raw", "diet", "l1", "bn_scale", "random", *(f"tp_{name}" for name in TP), "tp_l2_own")
REESTIMATED = 30  # training batches
FIT = {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "schedule": "cosine"}
FIT |= {"label_smoothing": 0.0, "select": "last", "precision": "auto", "batch_size": 128}


class Bench:
    """One trained network and its data."""

    def __init__(self, model: Path, asked: argparse.Namespace) -> None:
        self.data: Prepared = load(asked.data or prepared_for(model))
        trained, self.card = checkpoint.load(model, self.data)
        self.whole, self.shape, self.asked = collapse(trained), self.data.shape, asked
        self.training = Batches(self.data, "train", 128, "cpu", None, True, 0)
        self.test = Part(self.data, "test", 256, "cpu", None, False, 0, limit=asked.images)
        self.macs = count(self.whole, self.shape)["macs"]
        self.folder = Path(tempfile.mkdtemp())
        export(self.whole, self.card, self.folder / "whole.onnx", 20)

    def cut(self, method: str, ratio: float) -> nn.Module:
        """What the method leaves."""
        model, target, multiple = copy.deepcopy(self.whole), Target(of="macs", fraction=1 / ratio), self.asked.multiple
        how: dict[str, Any] = {"share": None, "target": target, "multiple": multiple, "scope": "global"}
        if method.startswith("dealloc"):
            found = units(model, follow(model, self.shape))
            measured = [name for name, unit in found.items() if unit.norm is None]
            means = measured_means(model, measured, self.training.epoch(0), 8)
            reads, _ = dealloc(model, self.shape, target=target, multiple=multiple, means=means)
            if method == "dealloc":
                make_up(model, self.shape, reads, means)
            return shrink(model, self.shape, reads)
        if method == "takeover":
            return take_over(model, self.shape, self.training.epoch(0), limit=4, target=target, multiple=multiple)[0]
        if method == "diet":
            return diet.diet(model, self.shape, groups=None, target=target, multiple=multiple)[0]
        if method.startswith("tp_"):
            name, own = method.removeprefix("tp_").removesuffix("_own"), method.endswith("_own")
            search = "progressive" if own else "budget"
            return torch_pruning.prune(model, self.shape, importance=name, search=search, **how)[0]
        rivals: dict[str, Callable[..., Any]] = {"l1": l1.prune, "bn_scale": slimming.prune, "random": random.prune}
        drawn = {"generator": torch.Generator().manual_seed(0)} if method == "random" else {}
        return rivals[method](model, self.shape, **drawn, **how)[0]

    def measure(self, method: str, ratio: float) -> dict[str, Any]:
        """All figures of one method at one size."""
        started = time.perf_counter()
        smaller = self.cut(method, ratio)
        row: dict[str, Any] = {"method": method, "asked": ratio, "seconds": time.perf_counter() - started}
        row["ratio"] = self.macs / count(smaller, self.shape)["macs"]
        row["parameters"] = sum(parameter.numel() for parameter in smaller.parameters())
        row["accuracy"] = evaluate(smaller, self.test).accuracy
        reestimate_batchnorm(smaller, self.training, 0, REESTIMATED)
        row["reestimated"] = evaluate(smaller, self.test).accuracy
        row |= self.timed(smaller)
        if self.asked.tune and ratio in self.asked.tuned:
            row["tuned"] = self.tune(smaller)
        return row

    def timed(self, smaller: nn.Module) -> dict[str, float]:
        """Speed-ups over the whole network."""
        path = self.folder / "smaller.onnx"
        export(smaller, self.card, path, 20)
        timing = {"threads": 1, "warmup_s": 0.3, "repeats": self.asked.repeats, "stability": 0.05, "attempts": 3}
        found = {}
        for batch in (1, 32):
            ratio = latency.compare(path, self.folder / "whole.onnx", "cpu", batch, **timing)["speedup"]
            found |= {f"b{batch}": ratio["ratio"], f"b{batch}_low": ratio["ci_low"], f"b{batch}_high": ratio["ci_high"]}
        return found

    def tune(self, smaller: nn.Module) -> float:
        """Accuracy after the same fine-tuning for all."""
        part = Part(self.data, "train", 128, "cpu", None, True, 0, limit=self.asked.train)
        run = Run(smaller, Fit.model_validate(FIT | {"epochs": self.asked.tune}), part, self.test, 0, torch.device("cpu"))
        return evaluate(train(run, []), self.test).accuracy


def prepared_for(model: Path) -> Path:
    """The folder under outputs/ with the data that a model was trained on."""
    wanted = checkpoint.read_card(model)["data"]
    for path in sorted(Path("outputs").glob("**/data.json")):
        if json.loads(path.read_text()).get("fingerprint") == wanted:
            return path.parent
    raise InputError(f"no data under outputs/ is what {model} was trained on: give --data")


class Part(Batches):
    """The first images of a split."""

    def __init__(self, *arguments: Any, limit: int) -> None:
        super().__init__(*arguments)
        self.count = min(self.count, limit)
        self.images = len(self) * self.batch_size if self.shuffle and self.count >= self.batch_size else self.count


def table(rows: list[dict[str, Any]], whole: float) -> str:
    """Rows of one ratio, for people."""
    head = "| method | MACs ratio | params | right after | + BN | tuned | speed-up b1 | b32 | measured/nominal b1 | b32 | seconds |"
    lines = [head, "|---|" + "---|" * 10]
    for row in rows:
        if "reason" in row:
            lines.append(f"| {row['method']} | {row['reason']} |" + " |" * 9)
            continue
        tuned = f"{100 * row['tuned']:.2f}" if "tuned" in row else ""
        gains = [1 + (row[key] - 1) for key in ("b1", "b32")]
        shares = [gain / row["ratio"] for gain in gains]
        figures = [
            f"{row['ratio']:.2f}",
            f"{row['parameters']:,}",
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['reestimated']:.2f}",
        ]
        figures += [tuned, *(f"{gain:.2f}" for gain in gains), *(f"{share:.2f}" for share in shares), f"{row['seconds']:.2f}"]
        lines.append("| " + " | ".join([row["method"], *figures]) + " |")
    return "\n".join([f"whole network {100 * whole:.2f}", "", *lines])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.2, 1.5, 2.0, 2.5, 3.0])
    parser.add_argument("--tuned", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    for name, default in (("multiple", 8), ("images", 2000), ("train", 10_000), ("tune", 0), ("repeats", 60), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    pick_device("cpu", asked.threads)
    bench = Bench(asked.model, asked)
    whole = evaluate(bench.whole, bench.test).accuracy
    everything = []
    for ratio in asked.ratios:
        rows = []
        for method in asked.methods:
            try:
                rows.append(bench.measure(method, ratio))
            except InputError as error:
                rows.append({"method": method, "asked": ratio, "reason": str(error).split(";")[0]})
        everything += rows
        print(f"\n## 1/{ratio:g} of the multiply-adds, {table(rows, whole)}", flush=True)
    print(json.dumps({**{key: str(value) for key, value in vars(asked).items()}, "whole": whole, "rows": everything}))


if __name__ == "__main__":
    main()

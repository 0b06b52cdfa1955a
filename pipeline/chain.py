"""What the training stages of the chain share: from prepared data and a model to a trained model, its card and its record."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import checkpoint, distributed, methods
from pipeline.config import Augment, Fit, Runtime, lookup, parse
from pipeline.data.batches import Batches, Prepared, SplitName, load
from pipeline.errors import InputError
from pipeline.evaluation import evaluate, pick_device
from pipeline.hooks import Hook, Run
from pipeline.records import Record
from pipeline.resume import Resume, fingerprint
from pipeline.training import train

# Images that are evaluated at once; results do not depend on it but for rounding.
BATCH = 256
LARGE_BATCH = 1024  # on CUDA, of images of at most so many pixels: of larger ones 256 fill a GPU, and 1024 its memory
SMALL_IMAGE = 64 * 64
HARMLESS = ("workers", "save_s")  # of `runtime`: an unfinished training goes on where they were changed


@dataclass(frozen=True)
class Setting:
    """Where and on what a stage trains."""

    prepared: Prepared
    augment: Augment
    runtime: Runtime
    device: torch.device
    resume: Path  # folder of the states of unfinished trainings

    def batches(self, split: SplitName, batch_size: int, seed: int = 0) -> Batches:
        """A split's images; only those of the training split are shuffled and augmented."""
        training = split == "train"
        augment = self.augment if training else None
        return Batches(self.prepared, split, batch_size, self.device, augment, training, seed, self.runtime.workers)

    def evaluated(self, split: SplitName) -> Batches:
        """A split's images, to be evaluated."""
        large = self.device.type == "cuda" and math.prod(self.prepared.shape[1:]) <= SMALL_IMAGE
        return self.batches(split, LARGE_BATCH if large else BATCH)


def setting(params: dict[str, Any], prepared: Path, resume: Path) -> tuple[Setting, dict[str, Any]]:
    """The setting of the sections `augment` and `runtime` and the data in `prepared`; and the sections for the record."""
    augment = parse("augment", lookup(params, "augment"), Augment)
    runtime = parse("runtime", lookup(params, "runtime"), Runtime)
    device = pick_device(runtime.device, runtime.threads)
    if runtime.launch == "graph" and device.type != "cuda":
        raise InputError("params.yaml: runtime.launch = 'graph' needs a CUDA device, and there is none here; use eager or compile")
    where = Setting(load(prepared), augment, runtime, device, resume)
    return where, {"augment": augment.model_dump(), "runtime": runtime.model_dump()}


def train_stage(
    where: Setting,
    record: Record,
    model: nn.Module,
    card: dict[str, Any],
    *,
    fit: Fit,
    hooks: Sequence[Hook] = (),
    inputs: Sequence[Path] = (),
    fresh: Callable[[int], nn.Module] | None = None,
    blank: Callable[[], nn.Module] | None = None,
    out: Path,
) -> None:
    """Train `model` with `hooks` and write `out`/model and `out`/record.json.

    `inputs` are the files that the model came from; `fresh` and `blank` are as in `Run`; by default the card says what is
    drawn. The hooks of the card's over-parameterisation join by
    themselves. The test split is touched once, after the last epoch.
    """
    stage, seed = record.identity["stage"], record.identity["seed"]
    assert isinstance(seed, int)
    runtime = {key: value for key, value in where.runtime.model_dump().items() if key not in HARMLESS}
    decisive = [record.identity, record.parameters | {"runtime": runtime}, where.prepared.fingerprint, str(where.device)]
    resume = Resume(where.resume, f"{stage}-{record.identity['variant']}", fingerprint(decisive, inputs), where.runtime.save_s)
    train_batches = where.batches("train", fit.batch_size, seed)
    validation = where.evaluated("validation")
    blank = blank or (lambda: checkpoint.blank(card))
    run = Run(model, fit, train_batches, validation, seed, where.device, stage=stage, fresh=fresh, blank=blank)
    trained = train(run, [*expansion_hooks(card), *hooks], resume, where.runtime.launch)
    finish(where, record, run, trained, card, out)
    resume.settle()
    distributed.wait()


def expansion_hooks(card: dict[str, Any]) -> list[Hook]:
    """What the over-parameterisation of a model adds to its training."""
    expansion = card["expansion"]
    hook = getattr(methods.load("overparameterize", expansion["method"]), "Hook", None) if expansion else None
    return [hook(**expansion["arguments"])] if hook else []


def finish(where: Setting, record: Record, run: Run, model: nn.Module, card: dict[str, Any], out: Path) -> None:
    """Evaluate on the test split, and write the model and the record."""
    test = evaluate(model, where.evaluated("test"))
    validation = evaluate(model, run.validation)
    _refuse_infinite(model, test.loss, run)
    names = run.task.names
    record.metrics |= {f"test_{names.headline}": test.accuracy, "test_loss": test.loss}
    record.metrics |= {f"validation_{names.headline}": validation.accuracy}
    record.metrics |= {f"test_{name}": test.others[name] for name in names.beside}
    if len(where.prepared.classes) > 10:  # of few classes, five say nothing
        record.metrics["test_top5_accuracy"] = test.others["top5_accuracy"]
    record.metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    record.metrics["epochs"] = run.epoch
    record.history, record.events = run.history, run.events
    record.notes += run.notes
    if distributed.rank() == 0:
        write(record, model, card, out)


def _refuse_infinite(model: nn.Module, loss: float, run: Run) -> None:
    """Before anything is overwritten: a network that computes no numbers is no result."""
    wrong = next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), "")
    if wrong or not math.isfinite(loss):
        raise InputError(
            f"{run.stage}: after epoch {run.epoch} {f'{wrong} has' if wrong else 'the test loss has'} values that are not finite, "
            f"last learning rate {run.lr:.3g}; lower fit.lr, or train in fp32 (fit.precision)"
        )


def write(record: Record, model: nn.Module, card: dict[str, Any], out: Path) -> None:
    """Write `out`/model, with this stage in the card's lineage, and `out`/record.json."""
    identity = {key: record.identity[key] for key in ("stage", "variant", "seed")}
    checkpoint.save(out / "model", model, checkpoint.continued(card, **identity, parameters=record.parameters))
    record.layers = checkpoint.layer_table(model, card)
    record.artifacts = ["model/model.safetensors", "model/model.json"]
    record.data = card["data"]
    record.write(out)

"""What a network is trained to answer: the class of an image, a mask, or the depth of every pixel.

A task is its loss, how many channels the network has, and its scores. The data set decides it (`task` in data.json and in a
model's card). B: images, K: classes, H, W: pixels. A network answers (B, K) for classes and (B, 1, H, W) for the other two.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import Distill, Fit
from pipeline.errors import InputError
from pipeline.scores import NAMES, Names

NEAR = 1.25  # a depth counts as right where it is less than this factor off, either way
SAME = 1.01  # two networks agree on a depth that is within this factor


Reduction = Literal["mean", "sum"]


class Score(NamedTuple):
    """The headline score in [0, 1] (for classification the accuracy), the loss, and the task's other scores by name."""

    accuracy: float
    loss: float
    others: dict[str, float]


class Task(ABC):
    """What all tasks have in common."""

    names: ClassVar[Names]
    output: ClassVar[str]  # what an ONNX file calls the answers

    @abstractmethod
    def answer(self, shape: tuple[int, int, int], classes: int) -> tuple[int, ...]:
        """Shape of what a network says of one image of `shape` (C, H, W)."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> Tensor:
        """What training minimises: the mean of the images' losses, or with `reduction` "sum" their sum."""

    @abstractmethod
    def hits(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        """Two counts whose quotient is the headline score; counts of several batches may be added."""

    @abstractmethod
    def agreement(self, first: Tensor, second: Tensor) -> tuple[Tensor, int]:
        """In how many answers two networks agree, and how many there are."""

    @abstractmethod
    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor | float]:
        """What is added up over batches for `others`, and for the loss: `loss` and what to divide it by, `losses`."""

    @abstractmethod
    def others(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The scores beside the headline, of all that was added up."""


class Classify(Task):
    """One of K classes an image: logits (B, K), labels int64 (B,). Cross-entropy in nats; accuracy, and beside it the share of
    images whose class is among the five likeliest."""

    names = NAMES["classify"]
    output = "logits"

    def answer(self, shape: tuple[int, int, int], classes: int) -> tuple[int, ...]:
        return (classes,)

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing, reduction=reduction)

    def hits(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        return (outputs.argmax(1) == targets).sum(), len(targets)

    def agreement(self, first: Tensor, second: Tensor) -> tuple[Tensor, int]:
        return (first.argmax(1) == second.argmax(1)).sum(), len(first)

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor | float]:
        five = outputs.topk(min(5, outputs.shape[1])).indices
        return {
            "loss": self.loss(outputs, targets, reduction="sum"),
            "losses": len(targets),
            "five": (five == targets[:, None]).sum(),
        }

    def others(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"top5_accuracy": sums["five"] / sums["of"]}


class Segment(Task):
    """Foreground or not, pixel by pixel: logits (B, 1, H, W), masks (B, H, W) of 0 and 1. Binary cross-entropy, mean over pixels;
    IoU and Dice of the foreground, over the pixels of all images together, 1 where there is no foreground and none is found."""

    names = NAMES["segment"]
    output = "logits"

    def answer(self, shape: tuple[int, int, int], classes: int) -> tuple[int, ...]:
        return (1, *shape[1:])

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> Tensor:
        assert not label_smoothing, "refused by `check_options`"
        mean = F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets)
        return mean * len(targets) if reduction == "sum" else mean

    def hits(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        found, there = outputs.squeeze(1) > 0, targets > 0.5
        return (found & there).sum(), (found | there).sum()

    def agreement(self, first: Tensor, second: Tensor) -> tuple[Tensor, int]:
        return ((first > 0) == (second > 0)).sum(), first.numel()

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor | float]:
        areas = (outputs > 0).sum() + (targets > 0.5).sum()
        return {"loss": self.loss(outputs, targets, reduction="sum"), "losses": len(targets), "areas": areas}

    def others(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"dice": 2 * sums["hits"] / sums["areas"] if sums["areas"] else 1.0}


class Depth(Task):
    """Metres to every pixel: outputs (B, 1, H, W), depths (B, H, W); 0 is an unknown depth, which counts nowhere. Mean squared
    error; delta1, the share of pixels with max(p / t, t / p) < 1.25, RMSE in metres and the mean of |p - t| / t, each over the
    pixels of all images together (Eigen et al. 2014, section 3.1). A depth of 0 or less is never right."""

    names = NAMES["depth"]
    output = "depth"

    def answer(self, shape: tuple[int, int, int], classes: int) -> tuple[int, ...]:
        return (1, *shape[1:])

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> Tensor:
        assert not label_smoothing, "refused by `check_options`"
        known = targets > 0  # sums, not a selection, whose size a GPU would have to tell
        mean = ((outputs.squeeze(1) - targets).square() * known).sum() / known.sum().clamp(min=1)
        return mean * len(targets) if reduction == "sum" else mean

    def hits(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        known = targets > 0
        return (_within(outputs.squeeze(1), targets, NEAR) & known).sum(), known.sum()

    def agreement(self, first: Tensor, second: Tensor) -> tuple[Tensor, int]:
        return (_within(first, second, SAME) | (first == second)).sum(), first.numel()

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor | float]:
        known = targets > 0
        error, true = (outputs.squeeze(1) - targets)[known].double(), targets[known].double()
        return {"loss": error.square().sum(), "losses": known.sum(), "relative": (error.abs() / true).sum()}

    def others(self, sums: Mapping[str, float]) -> dict[str, float]:
        count = max(sums["losses"], 1)
        return {"rmse_m": (sums["loss"] / count) ** 0.5, "abs_rel": sums["relative"] / count}


def _within(first: Tensor, second: Tensor, factor: float) -> Tensor:
    """Where two positive numbers are less than `factor` apart; of numbers that are not positive, nowhere."""
    return (first < factor * second) & (second < factor * first)


TASKS: dict[str, Task] = {"classify": Classify(), "segment": Segment(), "depth": Depth()}


class Tally:
    """Outputs beside targets, batch after batch, and the score of them all together. In fp32, sums in double precision."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.total: dict[str, Tensor | float] = {}  # tensors stay on the device, which nobody waits for

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """One batch more."""
        outputs = outputs.float()
        hits, of = self.task.hits(outputs, targets)
        for name, value in {"hits": hits, "of": of, **self.task.sums(outputs, targets)}.items():
            self.total[name] = self.total.get(name, 0.0) + (value.double() if isinstance(value, Tensor) else value)

    def sums(self) -> dict[str, float]:
        """What was added up."""
        return {name: float(value) for name, value in self.total.items()}

    def score(self, sums: Mapping[str, float] | None = None) -> Score:
        """Of all that was added, or of `sums` of several tallies."""
        total = self.sums() if sums is None else sums
        return Score(share(total["hits"], total["of"]), total["loss"] / max(total["losses"], 1), self.task.others(total))

    def metrics(self, prefix: str = "test_") -> dict[str, float]:
        """The headline score and the named ones beside it, as a record's metrics hold them."""
        names, score = self.task.names, self.score()
        return {f"{prefix}{names.headline}": score.accuracy} | {f"{prefix}{name}": score.others[name] for name in names.beside}


def share(hits: float, of: float) -> float:
    """`hits` / `of`; 1 where there was nothing to hit."""
    return hits / of if of else 1.0


def check_output(task: Task, network: str, model: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    """`InputError` where `model`, in params.yaml called `network`, does not give what the task asks for. On the meta device it
    costs no time."""
    was_training = model.training
    device = next(model.parameters()).device
    with torch.no_grad():
        outputs = model.eval()(torch.zeros(2, *shape, device=device))
    model.train(was_training)
    wanted = (2, *task.answer(shape, classes))
    if tuple(outputs.shape) != wanted:
        dense = task.names.task != "classify"
        choose = "one that answers for every pixel, as unet" if dense else "one that classifies"
        raise InputError(
            f"params.yaml: model.name = {network!r} gives {_sizes(outputs.shape)} for images {_sizes((2, *shape))}, but the data's "
            f"task {task.names.task!r} needs {_sizes(wanted)}: choose {choose}"
        )


def check_options(task: Task, key: str, fit: Fit, distill: Distill | None = None) -> None:
    """`InputError` where the fit or the distillation of the block `key` of params.yaml says what only classes allow."""
    name = task.names.task
    if name != "classify" and fit.label_smoothing:
        raise InputError(
            f"params.yaml: {key}.fit.label_smoothing = {fit.label_smoothing}: must be 0 where the task of the data is {name!r}: "
            "it is a smoothing between classes"
        )
    if name == "depth" and distill and distill.loss != "logit_mse":
        raise InputError(
            f"params.yaml: {key}.distill.loss = {distill.loss!r}: must be logit_mse where the task of the data is 'depth': "
            "depths are no classes"
        )


def _sizes(shape: tuple[int, ...]) -> str:
    return f"(N, {', '.join(map(str, shape[1:]))})"

"""What a method that trains may do. Every default does nothing; the training loop calls hooks in order and names none.

One stage trains in one or more rounds, each with a fresh optimiser and its learning-rate schedule from the start:

    coverage                before anything: say what the method cannot treat
    prepare                 once, before any optimiser exists: change the model
    begin_round             before each round's optimiser exists: edit weights, or end the training
      penalty               every step: a term added to the loss
      after_step            after every step of the optimiser
      after_epoch           after the epoch's validation: edit weights in place, or end the round; never after the last epoch
    finish                  once, after the last epoch: change the model
"""

import copy
import hashlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.config import Fit
from pipeline.data.batches import Batches
from pipeline.tasks import TASKS, Task


class ParameterRule(NamedTuple):
    """How the optimiser treats one parameter: its weight decay (None: the fit's), and its learning rate as a multiple of the
    schedule's. Where several hooks have a rule for it, the last weight decay holds and the multiples multiply."""

    weight_decay: float | None = None
    lr_scale: float = 1.0

    def then(self, other: "ParameterRule") -> "ParameterRule":
        """This rule with another hook's on top."""
        decay = self.weight_decay if other.weight_decay is None else other.weight_decay
        return ParameterRule(decay, self.lr_scale * other.lr_scale)


@dataclass
class Run:
    """The state of one training: hooks read it, and may replace `model` in `prepare` and `finish`."""

    model: nn.Module
    fit: Fit
    train: Batches
    validation: Batches
    seed: int
    device: torch.device
    stage: str = "train"
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None  # of the loss, for gradients in fp16
    rounds: list[int] = field(default_factory=list)  # planned epochs of each round
    round: int = 0  # counted from 1; 0 before the first
    round_epoch: int = 0  # epochs finished in this round
    epoch: int = 0  # epochs finished in all rounds
    step: int = 0  # steps done in this epoch
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)  # over these steps, as `Step.read` gives them; own to a process
    lr: float = 0.0  # of the last step
    history: list[dict[str, Any]] = field(default_factory=list)  # one row an epoch, as in record.json
    events: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a method cannot treat, and why
    best: dict[str, Tensor] | None = None  # the state dict with the best validation score, where fit.select asks for it
    best_accuracy: float = -1.0
    fresh: Callable[[int], nn.Module] | None = None  # where this is the network's first training: draws the n-th other one
    blank: Callable[[], nn.Module] | None = None  # draws the network that entered the stage with fresh weights
    own: nn.Module | None = None  # the network that is validated, where a hook keeps it in `model` among others that it trains

    @property
    def network(self) -> nn.Module:
        """The network that is validated."""
        return self.model if self.own is None else self.own

    def another(self, number: int) -> nn.Module:
        """A further network to train beside `model`, on the CPU: with other initial weights for each `number` from 1 up where
        this is the first training, a copy of the trained one where it is not."""
        return self.fresh(number) if self.fresh else copy.deepcopy(self.model)

    def redrawn(self) -> nn.Module:
        """The network as it entered the stage, with fresh weights, for a control."""
        assert self.blank is not None, "this run has no way to draw its network anew"
        torch.manual_seed(stable_seed(self.seed, self.stage, "drawn anew"))
        return self.blank()

    @property
    def epochs(self) -> int:
        """Planned epochs of all rounds."""
        return sum(self.rounds)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.prepared.shape
        return channels, height, width

    @property
    def task(self) -> Task:
        """What the data asks for: its loss and scores."""
        return TASKS[self.train.prepared.task]

    def steps(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """What the steps of this epoch that are left see of `batches`: where several processes train together, this one's part of
        each."""
        return batches.epoch(self.epoch, distributed.part, self.step)

    def log(self, kind: str, **facts: Any) -> None:
        """Keep an event for the record, with the epoch after which it happened. A fact about an accuracy goes by the name that the
        task's headline score has: validation_accuracy_after is kept as validation_iou_after where masks are learnt."""
        named = {self.task.names.rename(key): fact for key, fact in facts.items()}
        self.events.append({"kind": kind, "epoch": self.epoch, "round": self.round, **named})

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers that depend only on the seed, the stage, the epoch and the purpose, so that a resumed run draws
        the same ones."""
        return torch.Generator().manual_seed(stable_seed(self.seed, self.stage, self.round, self.epoch, purpose))


def stable_seed(*parts: str | int) -> int:
    """A 63-bit seed from a hash of `parts`: the same on every machine, unrelated for neighbouring parts."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Hook:
    """The method that does nothing: equal training, no edits."""

    def rounds(self, epochs: int) -> list[int]:
        """Epochs of each round."""
        return [epochs] if epochs else []

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        """What the method leaves untreated in `model`, and why; `InputError` where it cannot work on it at all."""
        return []

    def prepare(self, run: Run) -> None:
        """Change `run.model` before an optimiser exists."""

    def parameter_rules(self, run: Run) -> dict[nn.Parameter, ParameterRule]:
        """Parameters that the optimiser shall not treat alike (the rest: the fit's weight decay, the schedule's rate)."""
        return {}

    def begin_round(self, run: Run) -> bool:
        """Edit weights before a round, or shorten `run.rounds`; False ends the training."""
        return True

    def penalty(self, run: Run, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """A scalar added to the loss of one step."""
        return None

    def penalty_reads(self, run: Run) -> Hashable | None:
        """What `penalty` reads beside tensors that stay in their place: where it changes, a captured step is captured anew. None
        where the penalty cannot be captured."""
        return ()

    def after_step(self, run: Run) -> None:
        """Look at the weights, or change them in place, after a step of the optimiser."""

    def after_epoch(self, run: Run) -> bool:
        """Edit weights in place after an epoch and its validation; True ends the round."""
        return False

    def finish(self, run: Run) -> None:
        """Change `run.model` after the last epoch."""

    def state(self) -> dict[str, Any]:
        """What must survive an interruption beside the model's own tensors, as JSON."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that must survive it too."""
        return {}

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up what `state` and `tensors` gave."""


class BiasRate(Hook):
    """Every bias, batch norm's included, learns at `scale` times the rate: ACNet's trainer, and KFLO's after it, double it."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def parameter_rules(self, run: Run) -> dict[nn.Parameter, ParameterRule]:
        biases = {parameter for name, parameter in run.model.named_parameters() if "bias" in name}
        return {parameter: ParameterRule(lr_scale=self.scale) for parameter in biases}

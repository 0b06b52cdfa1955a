"""Torch-Pruning as a rival on the same data: its criteria with our budgets, or its pruner as it comes.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (CVPR), and the package torch-pruning (VainF/Torch-Pruning at
e80127d, 1.6.1), which must be installed: `pip install torch-pruning`.

    search: budget        its importance of every channel, once, on the merged network; `pipeline.budget` removes the lowest
    search: progressive   its own loop (reproduce/main.py): at most `steps` steps, each of which scores all channels anew and
                          removes the lowest (one ranking, or the same share of each layer), until the target is reached

Its importances are those of its own comparison: `l1`, `l2` and `fpgm` over all tensors that a channel touches, `bn_scale`, `lamp`,
and `taylor` (|weight * gradient| of the loss on `batches` training batches). Its pruner rounds widths with `multiple`, reaches no
target exactly, and cannot follow every network (zero-padded shortcuts): that is refused. What it keeps is translated into what our
layers read, so that the smaller network is cut, stored and loaded as every other.
"""

import copy
import importlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline import hooks, removal
from pipeline.budget import Scores
from pipeline.channels import Channels, follow
from pipeline.config import Target
from pipeline.costs import Costs
from pipeline.errors import InputError
from pipeline.expansion import collapse
from pipeline.layers import filtering_layers
from pipeline.structure import widths_of
from pipeline.surgery import Shape, shrink, widths

Batch = tuple[Tensor, Tensor]
Loss = Any  # a function of outputs and targets


class Options(removal.RemovalBlock):
    """A block under `compress:`."""

    method: Literal["torch_pruning"]
    importance: Literal["l1", "l2", "fpgm", "lamp", "bn_scale", "taylor"]
    search: Literal["budget", "progressive"]
    steps: int = Field(ge=1)  # of its own pruner, from the whole network to none; 400 in its CIFAR comparison
    batches: int = Field(ge=1)  # training batches behind taylor's gradients

    @model_validator(mode="after")
    def _its_pruner_has_limits(self) -> Self:
        if self.search == "progressive" and self.scope == "sensitivity":
            raise PydanticCustomError("scope", "scope must be global or layer with search: progressive")
        if self.search == "progressive" and self.target is not None and self.target.of == "latency":
            raise PydanticCustomError("target", "target.of must be keep, macs or params with search: progressive")
        return self


def package() -> Any:
    """The installed package. `InputError` where there is none."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        raise InputError(
            "torch_pruning needs the package torch-pruning, which is not installed: `pip install torch-pruning`, or choose another "
            "method"
        ) from None


def importance_of(name: str) -> Any:
    """One of its importances, as in its reproduce/main.py."""
    made = package().importance
    return {
        "l1": lambda: made.MagnitudeImportance(p=1),
        "l2": lambda: made.MagnitudeImportance(p=2),
        "fpgm": lambda: made.FPGMImportance(p=2),
        "lamp": lambda: made.LAMPImportance(p=2),
        "bn_scale": lambda: made.BNScaleImportance(),
        "taylor": lambda: made.TaylorImportance(),
    }[name]()


@contextmanager
def _its_errors() -> Iterator[None]:
    """What goes wrong inside the package as an `InputError`; its warnings are of its own code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # its errors share no class: IndexError, AssertionError, RuntimeError
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"torch_pruning: Torch-Pruning cannot follow this network ({told}); choose another method") from error


def _merged(model: nn.Module, importance: str, batches: Iterable[Batch], loss: Loss) -> nn.Module:
    """A merged copy on the CPU, in evaluation mode; for taylor with the gradients of the loss on `batches`."""
    merged = collapse(copy.deepcopy(model)).cpu().eval().requires_grad_(True)
    for images, labels in batches if importance == "taylor" else ():
        loss(merged(images), labels).backward()
    return merged


def _groups(model: nn.Module, input_shape: Shape) -> Iterator[Any]:
    """Its groups of channels that go together, each with all of its channels."""
    example = next(model.parameters()).new_zeros(1, *input_shape)
    return package().DependencyGraph().build_dependency(model, example_inputs=example).get_all_groups()


def scores(
    model: nn.Module,
    input_shape: Shape,
    channels: Channels,
    importance: str,
    batches: Iterable[Batch] = (),
    loss: Loss = F.cross_entropy,
) -> Scores:
    """Its importance of each unit: the mean over the unit's channels in all groups that it finds."""
    found: dict[int, list[float]] = {}
    label, merged = channels.units(), _merged(model, importance, batches, loss)
    names = {module: name for name, module in merged.named_modules()}
    with _its_errors():
        measure = importance_of(importance)
        for group in _groups(merged, input_shape):
            name, values = names[group[0].dep.target.module], measure(group)
            ids = channels.outputs.get(name)
            if values is not None and ids is not None:
                for position, value in zip(group[0].root_idxs, values.tolist(), strict=True):
                    found.setdefault(label[ids[position]], []).append(value)
    return {unit: sum(values) / len(values) for unit, values in found.items()}


def progressive(
    model: nn.Module,
    input_shape: Shape,
    *,
    importance: str,
    share: float | None,
    target: Target | None,
    multiple: int,
    scope: str,
    steps: int,
    protect: Sequence[str] = (),
    batches: Iterable[Batch] = (),
    loss: Loss = F.cross_entropy,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What layers read after its own pruner has worked on a merged copy, and the facts. `InputError` where it fails on the
    network, never gets to the target, or makes another network of it than the same cut does here."""
    channels = follow(model, input_shape)
    costs, merged = Costs(model, channels), _merged(model, importance, batches, loss)
    kept = _Kept(merged, channels)
    with _its_errors():
        pruner = package().pruner.BasePruner(
            merged,
            torch.zeros(1, *input_shape),
            importance=importance_of(importance),
            global_pruning=scope == "global",
            pruning_ratio=1.0 if share is None else share,
            iterative_steps=steps,
            ignored_layers=[merged.get_submodule(name) for name in _whole(channels, protect)],
            round_to=multiple if multiple > 1 else None,
        )
        reads, done = kept.reads(), 0
        while done < steps and not (target and costs.share(target.of, reads) <= target.fraction):  # type: ignore[arg-type]
            for group in pruner.step(interactive=True):
                kept.take(group)
                group.prune()
            reads, done = kept.reads(), done + 1
    shares = {kind: costs.share(kind, reads) for kind in ("keep", "macs", "params")}
    if target and shares[target.of] > target.fraction:
        raise InputError(
            f"torch_pruning: after {steps} steps {target.of} is {shares[target.of]:.4f}, above target.fraction = "
            f"{target.fraction:g}; allow a smaller `multiple`, or take search: budget"
        )
    _refuse_other_widths(channels, reads, merged)
    return reads, {"removed": kept.removed(), **shares, "steps": done}


class _Kept:
    """Which inputs and outputs of every layer its pruner has left, by their positions in the whole network."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.whole = {name: len(ids) for name, ids in channels.inputs.items()}
        self.made = {name: len(ids) for name, ids in channels.outputs.items()}
        self.inputs = {name: [*range(len(ids))] for name, ids in channels.inputs.items()}
        self.outputs = {name: [*range(len(ids))] for name, ids in channels.outputs.items()}

    def take(self, group: Any) -> None:
        """Remember what pruning a group takes away."""
        for dep, positions in group:
            name, gone = self.names.get(dep.target.module), set(positions)
            left = self.outputs if dep.handler.__name__ == "prune_out_channels" else self.inputs
            if name in left:
                left[name] = [old for position, old in enumerate(left[name]) if position not in gone]

    def reads(self) -> dict[str, Tensor]:
        """As `surgery.shrink` takes it."""
        none = {name: torch.zeros(width, dtype=torch.bool) for name, width in self.whole.items()}
        return {name: mask.index_fill(0, torch.tensor(self.inputs[name]), True) for name, mask in none.items()}

    def removed(self) -> dict[str, int]:
        """Outputs that are gone, by layer."""
        return {name: self.made[name] - len(left) for name, left in self.outputs.items() if len(left) < self.made[name]}


def _whole(channels: Channels, protect: Sequence[str]) -> list[str]:
    """The layers that keep their outputs."""
    pins = channels.pins()
    return [
        name
        for name, ids in channels.outputs.items()
        if any(channel in pins for channel in ids) or any(fnmatch(name, pattern) for pattern in protect)
    ]


def _refuse_other_widths(channels: Channels, reads: dict[str, Tensor], theirs: nn.Module) -> None:
    found = {name: widths_of(layer) for name, layer in filtering_layers(theirs)}
    for name, here in widths(channels, reads).filtering.items():
        if found[name] != [*here]:
            raise InputError(
                f"torch_pruning: layer {name} has {[*here]} inputs, outputs and groups here, but {found[name]} in what "
                "Torch-Pruning left: it does not follow this network's channels as they are; choose another method"
            )


def prune(
    model: nn.Module,
    input_shape: Shape,
    *,
    importance: str,
    search: str = "budget",
    steps: int = 400,
    batches: Sequence[Batch] = (),
    loss: Loss = F.cross_entropy,
    **how: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A smaller copy of `model`, and what was removed. `how`: see `removal.choose`; `batches` and `loss` are for taylor."""
    if search == "progressive":
        reads, facts = progressive(model, input_shape, importance=importance, steps=steps, batches=batches, loss=loss, **how)
        return shrink(model, input_shape, reads), facts
    score: removal.Score = lambda model, channels: scores(model, input_shape, channels, importance, batches, loss)  # noqa: E731
    return removal.prune(model, input_shape, score, **how)


class TorchPruning(removal.Removal):
    """Asks the package, and cuts the network before training."""

    def coverage(self, model: nn.Module, input_shape: Shape) -> list[str]:
        merged = collapse(copy.deepcopy(model)).to_empty(device="cpu").eval().requires_grad_(True)
        for parameter in merged.parameters():
            parameter.grad, parameter.data = torch.ones_like(parameter), torch.ones_like(parameter)
        with _its_errors():
            measure = importance_of(self.options.importance)
            for group in _groups(merged, input_shape):
                measure(group)
        return super().coverage(model, input_shape)

    def scores(self, run: hooks.Run, channels: Channels) -> Scores:
        batches, loss = self._evidence(run)
        return scores(run.model, run.input_shape, channels, self.options.importance, batches, loss)

    def cut(self, run: hooks.Run) -> dict[str, Tensor]:
        options = self.options
        if options.search == "budget":
            return super().cut(run)
        batches, loss = self._evidence(run)
        reads, facts = progressive(
            run.model,
            run.input_shape,
            importance=options.importance,
            share=options.share,
            target=options.target,
            multiple=options.multiple,
            scope=options.scope,
            steps=options.steps,
            protect=options.protect,
            batches=batches,
            loss=loss,
        )
        return self.apply(run, reads, facts)

    def _evidence(self, run: hooks.Run) -> tuple[list[Batch], Loss]:
        """Training batches and the task's loss, where gradients are asked for."""
        if self.options.importance != "taylor":
            return [], F.cross_entropy
        loss = lambda outputs, targets: run.task.loss(outputs.float(), targets, 0.0)  # noqa: E731
        return removal.first_batches(run.train, run.epoch, self.options.batches), loss


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return TorchPruning(options)

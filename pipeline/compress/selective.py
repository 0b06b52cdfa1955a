"""Selective convolution: close input channels that no output would miss while training goes on; cut them out at the end, or let
their slots read better channels.

Source: Jeong and Shin 2019, "Training CNNs with Selective Allocation of Channels" (ICML), and its code,
github.com/jh-jeong/selective-convolution at 8aafd93. What is computed is in pipeline/ecdm.py, where it is put in
pipeline/selection.py.

    dealloc    after each epoch of the first `until` of the training, in every unit: close the channels whose expected damage is
               at most `gamma` in all
    realloc    in units whose kernels have a size in `realloc`: let every closed slot read one of the K most useful channels, moved
               by a shift that is learnt from then on. The new slot's column is zero, so that no output changes, and its batch norm
               is a copy. Such a unit never gets smaller: it uses its parameters better
    in the end closed channels are cut out, and redirected slots become a part of the network (pipeline/redirect.py)

With a `target` instead of `gamma`, the events close step by step, by one gamma for all layers each, so much that the last one
brings the network to it. Where a layer reads something else than a batch norm's ReLU (a residual add, max pooling), its channels'
activity is measured on training images. Units are ungrouped convolutions that do not read the network's input.
"""

import copy
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline import hooks
from pipeline.allocation import CLOSE, allocate, measuring, smallest, unit_of
from pipeline.channels import follow
from pipeline.config import CompressBlock, Target
from pipeline.ecdm import deallocate, rank, reallocate
from pipeline.errors import InputError
from pipeline.evaluation import settle_batchnorm
from pipeline.selection import Unit, activities, bare, close, compensate, damage, gate, measured_means, reopen, settle, units
from pipeline.surgery import Shape, shrink

SHIFT_DECAY = 1e-5  # weight decay of shifts, as published


class Options(CompressBlock):
    """A block under `compress:`."""

    method: Literal["selective"]
    gamma: float | None = Field(gt=0, lt=1)  # share of any output's activity that one deallocation may close; 0.001 as published
    target: Target | None  # how small the network becomes; either this or gamma, the other null
    multiple: int = Field(ge=1)  # those left are a multiple, in narrow layers of a half or quarter of it; 1 as published
    until: float = Field(gt=0, le=1)  # deallocate after each epoch of this first share of the training; 0.5 as published
    mean_batches: int = Field(ge=1)  # training batches behind a measured mean
    realloc: dict[str, Annotated[int, Field(ge=0)]]  # K by kernel size: {1x1: 3} as published for accuracy; {}: only close
    max_pointers: int | None = Field(ge=1)  # a channel with more slots than this is no source any more; null: no limit
    reset_momentum: bool  # whether the optimiser forgets what it had averaged of opened slots; false as published
    compensate: bool  # put what closed channels gave on average into the next batch norm or the bias; false as published

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.gamma is None) is (self.target is None):
            raise PydanticCustomError("gamma", "give either gamma or target, and null for the other")
        if any(not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) for size in self.realloc):
            raise PydanticCustomError("realloc", "realloc must give a number of sources for sizes of kernels, as {1x1: 3}")
        if self.target is not None and any(self.realloc.values()):
            raise PydanticCustomError(
                "realloc", "realloc needs gamma: with a target, channels are closed for good, and it must be {}"
            )
        return self


def dealloc(
    model: nn.Module,
    input_shape: Shape,
    *,
    gamma: float | None = None,
    target: Target | None = None,
    multiple: int = 1,
    means: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What every unit of a trained network reads, (I,) by name, when it is deallocated once: as `shrink` takes it. And the facts:
    the gamma, the share of the target's cost that is left, and the units left whole.

    Either `gamma`, for each layer, or `target`. `means` are those of `measured_means` for units without a batch norm and ReLU in
    front; without them these units are left whole. `InputError` where the target is out of reach.
    """
    if (gamma is None) is (target is None):
        raise InputError("selective: give either gamma or target")
    channels = follow(model, input_shape)
    found = units(model, channels)
    sizes = {name: both[1] for name, both in activities(model, found.values(), means or {}).items()}
    whole = [name for name in found if name not in sizes]
    rankings = {name: rank(damage(model, name, size)) for name, size in sizes.items()}
    if target is None:
        reads = {}
        for name, size in sizes.items():
            reads[name] = ~deallocate(damage(model, name, size), gamma or 0.0, unit_of(multiple, len(size)))
        return reads, {"gamma": gamma, "whole": whole}
    with measuring(target, model, channels, input_shape) as share:
        _refuse_unreachable(target, smallest({name: len(size) for name, size in sizes.items()}, share, multiple))
        reads, reached, left = allocate(rankings, share, target.fraction, multiple)
    return reads, {"gamma": reached, "share": left, "whole": whole}


def make_up(
    model: nn.Module, input_shape: Shape, reads: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Compensate what a trained network loses on average when its units read what `reads` says, in place and without data: before
    it is shrunk. The names of units that have no batch norm behind them and no bias to put it into."""
    found = units(model, follow(model, input_shape))
    known = activities(model, found.values(), means or {})
    closed = {name: ~mask for name, mask in reads.items() if name in known and not mask.all()}
    return [name for name, mask in closed.items() if not compensate(model, found[name], known[name][0], mask)]


def _refuse_unreachable(target: Target, least: float) -> None:
    if least > target.fraction:
        raise InputError(
            f"selective: target: {target.of} = {target.fraction:g} is out of reach: {least:.4f} is left when all is "
            "closed that may be; ask for more than that, or allow a smaller multiple"
        )


class Selective(hooks.Hook):
    """Gates in front of every unit while it trains, and pointers in front of those that re-allocate."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        self.channels = follow(model, input_shape)
        self.units = units(model, self.channels)
        if not self.units:
            raise InputError("selective: the network has no ungrouped convolution behind its first; choose another method")
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in self.units}
        self.names = list(self.units)
        self.measured = [name for name, unit in self.units.items() if unit.norm is None]
        asked = {name: self.options.realloc.get("x".join(map(str, layer.kernel_size)), 0) for name, layer in layers.items()}
        self.sources = {name: count for name, count in asked.items() if count and self.units[name].own}
        if (target := self.options.target) and target.of != "latency":
            widths = {name: layer.in_channels for name, layer in layers.items()}
            with measuring(target, model, self.channels, input_shape) as share:
                _refuse_unreachable(target, smallest(widths, share, self.options.multiple))
        return self._notes(model, [name for name, count in asked.items() if count and name not in self.sources])

    def _notes(self, model: nn.Module, refused: list[str]) -> list[str]:
        if any(self.options.realloc.values()) and not self.sources:
            raise InputError(
                f"selective: realloc = {self.options.realloc}: no convolution of such a size has a batch norm and ReLU of its own "
                "in front; give other sizes, or {} to close channels alone"
            )
        others = [name for name in self.channels.inputs if name not in self.units]
        notes = [f"selective leaves the inputs of {', '.join(others)} whole"] if others else []
        if self.measured:
            notes.append(f"selective measures the activity that enters {', '.join(self.measured)}: no batch norm and ReLU")
        if refused:
            notes.append(
                f"selective closes channels of {', '.join(refused)} for good: no batch norm and ReLU of their own to redirect"
            )
        lost = [name for name, unit in self.units.items() if not unit.behind and model.get_submodule(name).bias is None]
        if self.options.compensate and lost:
            notes.append(
                f"selective cannot compensate what {', '.join(lost)} loses: neither a batch norm alone behind it nor a bias"
            )
        return notes + [f"selective: {what}" for what in self.channels.untreated]

    def prepare(self, run: hooks.Run) -> None:
        if run.own is not None:
            raise InputError("selective: a method that trains several networks at once has other gates in each: choose another one")
        gate(run.model, self.units.values(), self.sources)

    def parameter_rules(self, run: hooks.Run) -> dict[nn.Parameter, hooks.ParameterRule]:
        norms: list[Any] = [run.model.get_submodule(self.units[name].norm or "") for name in self.sources]
        return {norm.distribute.shift: hooks.ParameterRule(weight_decay=SHIFT_DECAY) for norm in norms}

    def planned(self, run: hooks.Run) -> int:
        """After so many epochs, from the first on, there is an event."""
        return min(math.ceil(round(self.options.until * run.epochs, 9)), run.epochs - 1)

    def after_epoch(self, run: hooks.Run) -> bool:
        if run.epoch <= self.planned(run):
            self.rewire(run, run.epoch / self.planned(run))
        return False

    def rewire(self, run: hooks.Run, progress: float) -> None:
        """Deallocate in every unit, for a target as far as `progress` asks, and re-allocate where that is wanted."""
        model: Any = run.model
        batches = run.train.epoch(run.epoch) if self.measured else ()
        means = measured_means(model, self.measured, batches, self.options.mean_batches) if self.measured else {}
        known = activities(model, self.units.values(), means)
        closed, facts = self._closing(run, known, progress)
        rows = []
        for name, unit in self.units.items():
            opened = model.get_submodule(name).gate.open
            if self.options.compensate:
                compensate(model, unit, known[name][0], closed[name])
            close(model, unit, closed[name])
            rows.append({"name": name, "open": int(opened.sum()), "inputs": len(opened)})
            if name in self.sources:
                rows[-1] |= self._reopen(run, unit, known[name][1])
        self._log(run, rows, facts)

    def _closing(self, run: hooks.Run, known: Mapping[str, Tensor], progress: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The channels to be closed, those that are it already among them; the facts of a target."""
        options = self.options
        model: Any = run.model
        matrices = {name: damage(model, name, both[1]) for name, both in known.items()}
        shut = {name: model.get_submodule(name).gate.open == 0 for name in self.names}
        if options.target is None:
            multiples = {n: 1 if n in self.sources else unit_of(options.multiple, len(shut[n])) for n in self.names}
            return {n: deallocate(matrices[n], options.gamma or 0.0, multiples[n], shut[n]) for n in self.names}, {}
        rankings = {name: rank(matrices[name], shut[name]) for name in self.names}
        # On the way to a latency multiply-adds are good enough: it is measured once.
        kind = "macs" if options.target.of == "latency" and progress < 1 else options.target.of
        goal = Target(of=kind, fraction=1 - (1 - options.target.fraction) * progress)
        plain = bare(copy.deepcopy(model)) if kind == "latency" else model
        with measuring(goal, plain, self.channels, run.input_shape) as share:
            reads, gamma, left = allocate(rankings, share, goal.fraction, options.multiple)
        if progress == 1 and not goal.fraction * (1 - CLOSE) <= left <= goal.fraction:
            told = f"{kind} comes to {left:.4f} of the whole instead of {goal.fraction:g}: no widths allowed are nearer"
            run.notes.append(f"selective: {told}")
        facts = {"gamma": gamma, "wanted": goal.fraction, "share": left}
        return {name: ~mask.to(shut[name].device) | shut[name] for name, mask in reads.items()}, facts

    def _reopen(self, run: hooks.Run, unit: Unit, size: Tensor) -> dict[str, int]:
        """Let the unit's closed slots read other channels; how many that are, and how many read others in all."""
        model: Any = run.model
        pointer = model.get_submodule(unit.norm or "").distribute.pointer
        opened, draw = model.get_submodule(unit.name).gate.open, run.generator(f"realloc {unit.name}")
        matrix = damage(model, unit.name, size)
        refill = reallocate(matrix, opened, pointer, self.sources[unit.name], self.options.max_pointers, draw)
        reopen(model, unit, refill, run.optimizer if self.options.reset_momentum else None)
        return {"open": len(opened), "reopened": len(refill.slots), "redirected": int((pointer >= 0).sum())}

    def _log(self, run: hooks.Run, rows: list[dict[str, Any]], facts: dict[str, float]) -> None:
        before = next((event["open"] for event in reversed(run.events) if event["kind"] == "dealloc"), None)
        now = sum(row["open"] for row in rows)
        if now < (sum(row["inputs"] for row in rows) if before is None else before):
            run.best, run.best_accuracy = None, -1.0  # the best of networks that are less compressed is no result
        run.log("dealloc", layers=rows, open=now, **facts)

    def finish(self, run: hooks.Run) -> None:
        done = sum(event["kind"] == "dealloc" for event in run.events)
        short = done < max(self.planned(run), 1)  # the training was too short, or ended before its time
        if short and self.options.target or not done and run.epoch:
            self.rewire(run, 1.0)
        model: Any = run.model
        reads = {name: model.get_submodule(name).gate.open > 0 for name in self.names}
        redirected = {name: settle(model, self.units[name]) for name in self.sources}
        bare(model)
        removed = {name: int((~mask).sum()) for name, mask in reads.items() if name not in self.sources}
        run.log("surgery", removed=removed, **({"redirected": redirected} if redirected else {}))
        if any(removed.values()):
            run.model = shrink(model, run.input_shape, {name: reads[name] for name in removed})
            settle_batchnorm(run)


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Selective(options)

"""A budget in measured time: the ONNX Runtime latency of the smaller network, merged and exported, beside the whole one's.

Multiply-adds say little about time, so candidates are made and timed. A candidate is what a budget of multiply-adds leaves; which
one, is searched between the nearest that was too slow and the nearest that was fast enough, as if time between them were a straight
line. Each candidate and the whole network are called in turn, at batch 1 on one thread of the CPU (`pipeline.latency`).
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pipeline import distributed, latency
from pipeline.budget import TOLERANCE, Budget, Choice
from pipeline.errors import InputError
from pipeline.expansion import collapse
from pipeline.export import export
from pipeline.surgery import Shape, drop, shrink

OPSET = 20
CANDIDATES = 10  # at most, beside the smallest
TIMING = {"threads": 1, "warmup_s": 0.3, "repeats": 100, "stability": TOLERANCE, "attempts": 3}
EDGE = 0.1  # how near to an end of what is left the next candidate may lie, as a share of it

Ratio = tuple[float, float, float]  # candidate / whole: median, and the ends of its 95 % interval
Timer = Callable[[nn.Module], Ratio]


def fit_latency(model: nn.Module, input_shape: Shape, budget: Budget, fraction: float, timer: Timer | None = None) -> Choice:
    """Remove so much that the network takes this share of the whole one's time, within 2 % or what the timer can tell apart.

    Where no candidate is so near, the one nearest to it that is fast enough; a note gives the interval of what is not within
    2 %. `InputError` where even the smallest network takes longer. `timer` measures a merged candidate on the CPU; by default ONNX
    Runtime.
    """
    merged = collapse(copy.deepcopy(model)).cpu().eval()
    with tempfile.TemporaryDirectory() as folder:
        timed = timer or timer_of(merged, input_shape, Path(folder))
        cut: Callable[[Choice], nn.Module] = lambda choice: shrink(  # noqa: E731
            merged, input_shape, drop(budget.families.channels, choice.channels)
        )
        choice, ratio = _search(budget, fraction, lambda choice: timed(cut(choice)))
    time, low, high = ratio
    choice.latency = {"latency": time, "latency_low": low, "latency_high": high}
    choice.note = None
    if abs(time - fraction) > TOLERANCE * fraction:
        interval = f"(95 % interval {low:.3f} to {high:.3f})"
        choice.note = f"latency comes to {time:.3f} {interval} of the whole network's instead of {fraction:g}"
    return choice


def _search(budget: Budget, fraction: float, timed: Callable[[Choice], Ratio]) -> tuple[Choice, Ratio]:
    """The best candidate and its time."""
    near: Callable[[Ratio], bool] = lambda it: abs(it[0] - fraction) <= TOLERANCE * fraction or it[1] <= fraction <= it[2]  # noqa: E731
    smallest = budget.smallest("macs")
    least = budget.target("macs", smallest)
    found = [(least, timed(least))]
    slow, fast = (1.0, 1.0), (smallest, found[0][1][0])  # multiply-adds and time, as shares of the whole network's
    if fast[1] > fraction and not near(found[0][1]):
        raise InputError(
            f"target: latency = {fraction:g} cannot be reached: {fast[1]:.3f} of the time is left when as much as possible goes; "
            "ask for more than that, allow a smaller `multiple` or protect less"
        )
    for _ in range(CANDIDATES):
        gap = slow[0] - fast[0]
        between = (fraction - fast[1]) / (slow[1] - fast[1]) if slow[1] > fast[1] else 0.5
        share = fast[0] + gap * min(max(between, EDGE), 1 - EDGE)
        choice = budget.target("macs", share)
        if choice.shares["macs"] <= fast[0]:  # of the widths allowed none lie between it and the candidate that is fast enough
            fast = (share, fast[1])
            if gap < TOLERANCE / 4:
                break
            continue
        ratio = timed(choice)
        found.append((choice, ratio))
        if near(ratio):
            break
        here = (choice.shares["macs"], ratio[0])
        slow, fast = (here, fast) if ratio[0] > fraction else (slow, here)
    enough = [pair for pair in found if near(pair[1]) or pair[1][0] <= fraction]
    return min(enough, key=lambda pair: (abs(pair[1][0] - fraction), pair[0].shares["macs"]))


def timer_of(whole: nn.Module, input_shape: Shape, folder: Path) -> Timer:
    """Times a network beside `whole`."""
    network, image = {"name": "candidate", "arguments": {}}, {"shape": list(input_shape), "mean": [], "std": [], "crop": None}
    card = {"network": network, "classes": [], "input": image}
    control = folder / "whole.onnx"
    export(whole, card, control, OPSET)

    def measure(candidate: nn.Module) -> Ratio:
        path = folder / "candidate.onnx"
        with torch.no_grad():
            export(candidate, card, path, OPSET)
        speed = latency.compare(path, control, "cpu", 1, **TIMING)["speedup"]
        return 1 / speed["ratio"], 1 / speed["ci_high"], 1 / speed["ci_low"]

    def shared(candidate: nn.Module) -> Ratio:
        ratio, low, high = distributed.of_first(lambda: measure(candidate))
        return ratio, low, high

    return shared

"""Which channels each layer closes so that the whole network comes down to a target: one threshold for all layers.

Every layer has a `Ranking` (pipeline/ecdm.py). A layer's step leaves it the next smaller multiple of channels, and is due at the
threshold gamma that it takes. Steps are taken in the order of their gammas until the network is as small as it shall be; where the
last one would overshoot, the next ones of other layers are taken in its place.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, arange, nn, zeros

from pipeline import latency_budget
from pipeline.channels import Channels
from pipeline.config import Target
from pipeline.costs import Costs
from pipeline.ecdm import Ranking
from pipeline.expansion import collapse
from pipeline.surgery import Shape, shrink

CLOSE = 0.02  # of the target: so near counts as reached
TRIES = 50  # at most, to come nearer to the target than one layer's step
Share = Callable[[Mapping[str, Tensor]], float]  # of what the network is, when its layers read what the argument says


class Allocation(NamedTuple):
    """What is decided."""

    reads: dict[str, Tensor]  # (I,) of every layer: the channels that it reads
    gamma: float  # the largest of the steps taken
    share: float  # what the network then costs


class Step(NamedTuple):
    """From this gamma on, the layer closes so many channels."""

    gamma: float
    layer: str
    closed: int


@contextmanager
def measuring(target: Target, model: nn.Module, channels: Channels, input_shape: Shape) -> Iterator[Share]:
    """How the target's cost is told: counted, or for `latency` timed in ONNX Runtime, which takes seconds each time."""
    if target.of != "latency":
        costs, kind = Costs(model, channels), target.of
        yield lambda reads: costs.share(kind, reads)
        return
    merged = collapse(copy.deepcopy(model)).cpu().eval()
    with tempfile.TemporaryDirectory() as folder:
        timed = latency_budget.timer_of(merged, input_shape, Path(folder))
        yield lambda reads: timed(shrink(merged, input_shape, reads))[0]


def unit_of(multiple: int, channels: int) -> int:
    """The multiple that a layer of so many channels keeps: `multiple`, halved until it fits twice."""
    while multiple > 1 and channels < 2 * multiple:
        multiple //= 2
    return multiple


def allocate(rankings: Mapping[str, Ranking], share: Share, fraction: float, multiple: int) -> Allocation:
    """Close channels, from the front of each ranking, until `share` of what is read is at most `fraction`, and no less than CLOSE
    of it below where the layers allow that. A layer keeps a multiple of channels, and at least one."""
    steps = _steps(rankings, multiple)
    cost = lambda counts: share(_reads(rankings, counts))  # noqa: E731
    low, high = 0, len(steps)
    while low < high:  # the fewest steps that are enough
        middle = (low + high) // 2
        low, high = (low, middle) if cost(_after(steps[:middle])) <= fraction else (middle + 1, high)
    counts, gamma = _after(steps[:low]), steps[low - 1][0] if low else 0.0
    reached = cost(counts)
    if reached < fraction * (1 - CLOSE) and low:
        finer = _finer(steps[: low - 1], steps[low - 1 :], cost, fraction)
        counts, gamma, reached = finer or (counts, gamma, reached)
    return Allocation(_reads(rankings, counts), gamma, reached)


def _finer(
    taken: list[Step], others: list[Step], cost: Callable[[dict[str, int]], float], fraction: float
) -> tuple[dict[str, int], float, float] | None:
    """Go on from the steps taken, past layers whose next step would overshoot; None where that leads nowhere."""
    counts, stopped, tries = _after(taken), set(), TRIES
    for step in others:
        if step.layer not in stopped and tries:
            tries -= 1
            further = {**counts, step.layer: step.closed}
            if (there := cost(further)) < fraction * (1 - CLOSE):
                stopped.add(step.layer)
                continue
            counts = further
            if there <= fraction:
                return counts, step.gamma, there
    return None


def smallest(widths: Mapping[str, int], share: Share, multiple: int) -> float:
    """The least share that `allocate` can reach in layers that read so many channels."""
    return share({name: arange(width) < unit_of(multiple, width) for name, width in widths.items()})


def _steps(rankings: Mapping[str, Ranking], multiple: int) -> list[Step]:
    """All steps, in the order of gamma."""
    found = []
    for name, (order, lost) in rankings.items():
        unit, channels = unit_of(multiple, len(order)), len(order)
        thresholds = lost.tolist()
        largest = (channels - 1) // unit * unit
        found += [Step(thresholds[channels - left - 1], name, channels - left) for left in range(largest, 0, -unit)]
    return sorted(found, key=lambda step: step.gamma)


def _after(steps: list[Step]) -> dict[str, int]:
    return {step.layer: step.closed for step in steps}


def _reads(rankings: Mapping[str, Ranking], counts: Mapping[str, int]) -> dict[str, Tensor]:
    reads = {}
    for name, (order, _) in rankings.items():
        mask = zeros(len(order)).bool()
        mask[order[counts.get(name, 0) :]] = True
        reads[name] = mask
    return reads

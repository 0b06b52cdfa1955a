"""Networks without some of their channels, and what they score: nothing is rebuilt, readers see zeros."""

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from pipeline.data.batches import Batches
from pipeline.evaluation import reestimate_batchnorm
from pipeline.layers import Reads, masked
from pipeline.tasks import TASKS, Tally
from pipeline.tracing import Tracer, tracing


@torch.no_grad()
def scores(model: nn.Module, removals: Sequence[Reads], batches: Batches, limit: int) -> list[tuple[float, float]]:
    """Loss and headline score with each of `removals`, over at most `limit` batches.

    Up to the first layer that reads less, every removal computes what the whole network computes: that part is run once for all.
    Leaves the model in evaluation mode.
    """
    model.eval()
    with tracing(model):
        traced = fx.GraphModule(model, Tracer().trace(model))
    place = {str(node.target): index for index, node in enumerate(traced.graph.nodes) if node.op == "call_module"}
    end = len(traced.graph.nodes) - 1
    start = [min((place[name] for name, mask in reads.items() if not mask.all()), default=end) for reads in removals]
    tallies = [Tally(TASKS[batches.prepared.task]) for _ in removals]
    with parametrize.cached():
        for images, targets in islice(batches.epoch(0), limit):
            rest = _Rest(traced, images)
            for index in sorted(range(len(removals)), key=start.__getitem__):
                rest.advance(start[index])
                with masked(model, removals[index]):
                    tallies[index].add(rest.outputs(), targets)
    return [(score.loss, score.accuracy) for score in (tally.score() for tally in tallies)]


def refitted(
    model: nn.Module, removals: Sequence[Reads], batches: Batches, limit: int, refit: Batches
) -> list[tuple[float, float]]:
    """As `scores`, each with batch norms that fit."""
    found = []
    for reads in removals:
        copied = copy.deepcopy(model)
        with masked(copied, reads):
            reestimate_batchnorm(copied, refit, 0, limit)
            found += scores(copied, [{}], batches, limit)
    return found


class _Rest:
    """A batch on its way through a network: `advance` runs a part once, `outputs` the rest as often as asked."""

    def __init__(self, traced: fx.GraphModule, images: Tensor) -> None:
        self.interpreter, self.nodes, self.done = fx.Interpreter(traced), list(traced.graph.nodes), 0
        self.values: dict[fx.Node, Any] = {}  # None once no later node reads it
        self.images = images

    def advance(self, place: int) -> None:
        """Run the nodes before `place`."""
        for node in self.nodes[self.done : place]:
            self.interpreter.env = self.values
            self.values[node] = self.images if node.op == "placeholder" else self.interpreter.run_node(node)
            self.values |= dict.fromkeys(self.interpreter.user_to_last_uses.get(node, []))
        self.done = max(self.done, place)

    def outputs(self) -> Any:
        """Of the network, from where it stands."""
        fresh = {node: value.clone() if isinstance(value, Tensor) else value for node, value in self.values.items()}  # in-place ops
        return self.interpreter.run(self.images, initial_env=fresh)

"""One step of the optimiser: launched kernel by kernel, compiled by torch, or replayed as one CUDA graph.

A small network's kernels end sooner than Python launches the next ones. A CUDA graph holds the whole step, forward, penalties,
backward and optimiser, and is launched at once. It reads and writes the memory that it was captured with, so that edits in place
between two epochs need nothing; where a network, an optimiser or any of their tensors is another one, or what a penalty reads in
Python has changed, or an edit was logged, the step is captured anew, after a few steps that are launched one by one.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pipeline import distributed
from pipeline.hooks import Hook, Run
from pipeline.precision import autocast

WARM_UP = 3  # steps before a capture: in them the optimiser makes its state, and cuDNN and cuBLAS their workspaces


class Step:
    """Steps of `run` in the way `how`, "eager", "compile" or "graph"; `begin` opens an epoch.

    `loss`, `everything` (with the hooks' penalties), `hits` and `of` add up over the epoch what the steps gave, on the device.
    """

    def __init__(self, run: Run, hooks: Sequence[Hook], how: str) -> None:
        self.run, self.hooks = run, hooks
        self.compiled, self.graph = how == "compile", how == "graph"
        self.forward: Callable[[Tensor], Tensor] = run.model
        self.sums = torch.zeros(4, dtype=torch.float64, device=run.device)
        self.replay: Callable[[], None] | None = None
        self.places: tuple[int, ...] = ()  # of the tensors that it was captured with
        self.events = 0  # of the run: a network may branch in Python on what an edit changed in place
        self.stream = torch.cuda.Stream(run.device) if self.graph and run.device.type == "cuda" else None
        self.kind: Hashable = None  # the batch's shape and what the penalties read
        self.warm = 0

    def begin(self, sums: Sequence[float] = (0.0, 0.0, 0.0, 0.0)) -> None:
        """Before the steps of an epoch, or, with the `sums` so far, of the rest of one."""
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64))
        if not self.compiled:
            self.forward = self.run.model
        elif getattr(self.forward, "_orig_mod", None) is not self.run.model:
            torch.use_deterministic_algorithms(True, warn_only=True)  # which tells the compiler, too, now that it is needed
            torch._dynamo.reset()  # else code for networks that are gone counts against its limit
            self.forward = torch.compile(self.run.model, dynamic=False)
        edited = self.events != len(self.run.events)
        if edited or (self.replay and self.places != tuple(_places(self.run))):
            self.replay, self.warm, self.events = None, 0, len(self.run.events)

    def take(self, images: Tensor, labels: Tensor) -> None:
        """One step on a batch, at the learning rate `run.lr`; then the hooks' `after_step`."""
        self._set_learning_rate()
        keys = [hook.penalty_reads(self.run) for hook in self.hooks] if self.graph else [None]
        if any(key is None for key in keys):
            self._launch(images, labels)
        else:
            self._replay(images, labels, tuple(keys))
        for hook in self.hooks:
            hook.after_step(self.run)

    def read(self) -> tuple[float, float, float, float]:
        """`loss`, `everything`, `hits`, `of` of the epoch so far. Waits for the device."""
        loss, everything, hits, of = self.sums.tolist()
        return loss, everything, hits, of

    def _launch(self, images: Tensor, labels: Tensor) -> None:
        """The step itself."""
        run = self.run
        assert run.optimizer is not None
        # Cached: a computed weight is composed once a step, however often the layers and the penalties read it.
        with parametrize.cached():
            with autocast(run.device, run.fit.precision):
                logits = self.forward(images)
            loss = run.task.loss(logits.float(), labels, run.fit.label_smoothing)
            penalties = [found for hook in self.hooks if (found := hook.penalty(run, images, labels, logits)) is not None]
            run.optimizer.zero_grad(set_to_none=True)
            everything = sum(penalties, loss)
            (everything if run.scaler is None else run.scaler.scale(everything)).backward()
        distributed.average_gradients(run.model)
        if run.scaler is None:
            run.optimizer.step()
        else:
            run.scaler.step(run.optimizer)
            run.scaler.update()
        gave = (loss.detach(), everything.detach(), *run.task.hits(logits.detach(), labels))
        for total, value in zip(self.sums, gave, strict=True):
            total += value

    def _replay(self, images: Tensor, labels: Tensor, keys: Hashable) -> None:
        if self.kind != (images.shape, keys):
            self.kind, self.replay, self.warm = (images.shape, keys), None, 0
        if self.warm < WARM_UP:
            self.warm += 1
            beside(lambda: self._launch(images, labels), self.stream)
            return
        if self.replay is None:
            self.images, self.labels = torch.empty_like(images), torch.empty_like(labels)
            self.replay = capture(lambda: self._launch(self.images, self.labels), self.stream)
            self.places = tuple(_places(self.run))
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.replay()

    def _set_learning_rate(self) -> None:
        assert self.run.optimizer is not None
        for group in self.run.optimizer.param_groups:
            rate = self.run.lr * group["lr_scale"]
            if not self.graph:
                group["lr"] = rate
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = torch.tensor(rate, device=self.run.device)


def capture(launch: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], None]:
    """What launches all at once, and again each time it is called, the kernels that `launch` would launch one by one."""
    graph = torch.cuda.CUDAGraph()
    # other threads may pin memory for the next images
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        launch()
    return graph.replay


def beside(launch: Callable[[], None], stream: torch.cuda.Stream | None) -> None:
    """`launch` on the stream of the capture, as that asks of the steps before it."""
    assert stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)


def _places(run: Run) -> Iterator[int]:
    """Where the tensors lie that every step reads or writes, and which objects hold them."""
    assert run.optimizer is not None
    yield from (id(run.model), id(run.optimizer))
    yield from (tensor.data_ptr() for tensor in run.model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor))
    states = run.optimizer.state.values()
    yield from (value.data_ptr() for state in states for value in state.values() if isinstance(value, Tensor))

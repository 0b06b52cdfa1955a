"""How far a training is: a line that rewrites itself on a terminal, in a log one line an epoch and one every few minutes of it."""

import os
import sys
import time
from types import TracebackType
from typing import Any, Self

from pipeline import distributed
from pipeline.hooks import Run

LOG_S = 120.0  # seconds between two lines of a log
LONG = 0.2  # share of the time from which waiting for images is worth more workers


class Progress:
    """Loss, headline score, images a second and time left of `run`, on standard output; of the first process alone.

    Of images that are streamed also the share of the time that the training waited for them: near 0 the device is what limits the
    speed, and where it is more than `LONG` a line says, once, what to do.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.first = distributed.rank() == 0
        self.terminal = sys.stdout.isatty() and self.first
        self.advised = False

    def __enter__(self) -> Self:
        run = self.run
        self.started = self.told = time.monotonic()
        self.done_before = self._done()
        if self.done_before and self.first:
            within = f" and step {run.step} of {len(run.train)}" if run.step else ""
            print(f"{run.stage}: goes on after epoch {run.epoch} of {run.epochs}{within}", flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.terminal:
            print(flush=True)

    def begin(self) -> None:
        """Before the steps of an epoch, or of the rest of one."""
        self.began, self.begun_at, self.waited_before = time.monotonic(), self.run.step, self.run.train.waited

    def step(self, loss: float) -> None:
        """After a step, with the mean loss of the epoch so far."""
        if self.terminal or (self.first and time.monotonic() - self.told >= LOG_S):
            share = self.run.step / len(self.run.train)
            self._tell(
                f"{self._head(self.run.epoch + 1)} {share:4.0%}  loss {loss:.4f}  {_pace(self.speed())}  {self._left()} left"
            )

    def epoch(self, row: dict[str, Any]) -> None:
        """After an epoch."""
        names = self.run.task.names
        if self.first:
            self._tell(
                f"{self._head(row['epoch'])}  loss {row['train_loss']:.4f}  {names.title} {row[f'train_{names.headline}']:.2%}"
                f"  validation {row[f'validation_{names.headline}']:.2%}  {_pace(row)}  {self._left()} left"
            )
        if self.first and not self.advised and row.get("loader_share", 0) > LONG:
            self.advised = True
            print(f"\n{self._advice()}" if self.terminal else self._advice(), flush=True)

    def speed(self) -> dict[str, float]:
        """Training images a second in this epoch so far; of streamed ones, the share of the time that it waited for them."""
        run, took = self.run, time.monotonic() - self.began
        speed = {"images_per_s": round(run.train.images * (run.step - self.begun_at) / len(run.train) / took, 1)}
        if run.train.waited is not None and self.waited_before is not None:
            speed["loader_share"] = round((run.train.waited - self.waited_before) / took, 3)
        return speed

    def _advice(self) -> str:
        workers, cores = self.run.train.workers, os.cpu_count() or 1
        images = f"{self.run.stage}: the training waits for images, which {workers or 'no'} processes decode"
        if workers < cores:
            return f"{images}: raise runtime.workers, up to the {cores} cores of this machine"
        return f"{images} on {cores} cores: smaller image files, or data.storage: memory, would help"

    def _head(self, epoch: int) -> str:
        return f"{self.run.stage}: epoch {epoch}/{self.run.epochs}"

    def _done(self) -> float:
        """Epochs so far."""
        return self.run.epoch + self.run.step / len(self.run.train)

    def _left(self) -> str:
        done = self._done()
        seconds = (time.monotonic() - self.started) / (done - self.done_before) * (self.run.epochs - done)
        return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"

    def _tell(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)
        self.told = time.monotonic()


def _pace(speed: dict[str, Any]) -> str:
    share = speed.get("loader_share")
    return f"{speed['images_per_s']:,.0f} images/s" + ("" if share is None else f"  waits {share:.0%} for images")

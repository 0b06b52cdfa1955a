"""How far a training is: a line that rewrites itself on a terminal, one line an epoch in a log."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from pipeline import distributed
from pipeline.hooks import Run


class Progress:
    """Loss, headline score, images a second and time left of `run`, on standard output; of the first process alone."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.first = distributed.rank() == 0
        self.terminal = sys.stdout.isatty() and self.first

    def __enter__(self) -> Self:
        self.started = self.epoch_started = time.monotonic()
        self.epochs_before = self.run.epoch
        if self.epochs_before and self.first:
            print(f"{self.run.stage}: goes on after epoch {self.epochs_before} of {self.run.epochs}", flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.terminal:
            print(flush=True)

    def step(self, step: int, loss: float) -> None:
        """After a step, on a terminal only."""
        if self.terminal:
            share = (step + 1) / len(self.run.train)
            self._rewrite(f"{self._head(self.run.epoch + 1)} {share:4.0%}  loss {loss:.4f}")

    def epoch(self, row: dict[str, Any]) -> None:
        """After an epoch."""
        names = self.run.task.names
        text = (
            f"{self._head(row['epoch'])}  loss {row['train_loss']:.4f}  {names.title} {row[f'train_{names.headline}']:.2%}"
            f"  validation {row[f'validation_{names.headline}']:.2%}  {row['images_per_s']:,.0f} images/s  {self._left()} left"
        )
        if self.terminal:
            self._rewrite(text)
        elif self.first:
            print(text, flush=True)
        self.epoch_started = time.monotonic()

    def images_per_s(self) -> float:
        """Training images a second in this epoch so far."""
        return round(self.run.train.images / (time.monotonic() - self.epoch_started), 1)

    def _head(self, epoch: int) -> str:
        return f"{self.run.stage}: epoch {epoch}/{self.run.epochs}"

    def _left(self) -> str:
        done = self.run.epoch - self.epochs_before
        seconds = (time.monotonic() - self.started) / done * (self.run.epochs - self.run.epoch)
        return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"

    def _rewrite(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", flush=True)

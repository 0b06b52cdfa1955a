"""The control of every revive method: the same training without edits. With 0 epochs the network stays as it is."""

from typing import Literal

from pipeline.config import Block
from pipeline.hooks import Hook


class Options(Block):
    """A block under `revive:`."""

    method: Literal["finetune"]


def create(options: Options) -> Hook:
    """The hook that does nothing."""
    return Hook()

"""The control of every compress method: the same training at full width. With 0 epochs the network stays as it is."""

from typing import Literal

from pipeline.config import CompressBlock
from pipeline.hooks import Hook


class Options(CompressBlock):
    """A block under `compress:`."""

    method: Literal["finetune"]


def create(options: Options) -> Hook:
    """The hook that does nothing."""
    return Hook()

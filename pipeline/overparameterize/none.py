"""The control: no layer is over-parameterised."""

from typing import Literal

from torch import nn

from pipeline.config import Section
from pipeline.hooks import Hook

__all__ = ["Hook", "Options", "expand"]


class Options(Section):
    """Options under `train.overparameterize`."""

    method: Literal["none"]


def expand(model: nn.Module) -> None:
    """Leave `model` as it is."""

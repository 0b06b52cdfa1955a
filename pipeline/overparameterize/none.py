"""The control: no layer is over-parameterised."""

from typing import Literal

from torch import nn

from pipeline.config import Section
from pipeline.expansion import Chosen


class Options(Section):
    """Options under `train.overparameterize`."""

    method: Literal["none"]


def expand(model: nn.Module, *, layers: Chosen = ("*",)) -> None:
    """Leave `model` as it is."""

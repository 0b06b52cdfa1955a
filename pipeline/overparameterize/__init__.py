"""Over-parameterised training: filtering layers whose kernel is computed from more parameters than it has.

Each method is one file with

    Options      its part of params.yaml, under train.overparameterize
    expand       expand(model, layers=..., **arguments): expand every layer that is chosen and that the method covers, in place
    Hook         where there is one, Hook(**arguments): what training must add while the network is expanded (rules, penalties)

and `collapse` merges any of them into plain layers of the same class.
"""

from typing import Any

from torch import nn

from pipeline import methods
from pipeline.expansion import Chosen, collapse

__all__ = ["collapse", "overparameterize"]


def overparameterize(model: nn.Module, method: str = "kflo", layers: Chosen = ("*",), **arguments: Any) -> nn.Module:
    """Expand the layers of `model` that the method covers, in place, and return it.

    `layers` chooses among them: a predicate on (qualified name, layer), or patterns of names. A trained network computes at the
    start what it did, unless the method's arguments ask for published initial weights.
    """
    methods.load("overparameterize", method).expand(model, layers=layers, **arguments)
    return model

"""Over-parameterised training: filtering layers whose kernel is computed from more parameters than it has.

Each method is one file with

    Options      its part of params.yaml, under train.overparameterize
    expand       expand(model, **arguments): parametrise every layer it covers, in place
    Hook         Hook(**arguments): what training must add while the network is expanded (parameter rules, penalties)

and `collapse` merges any of them into plain layers of the same class.
"""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from pipeline import methods
from pipeline.layers import filtering_layers


def overparameterize(model: nn.Module, method: str = "kflo", **arguments: Any) -> nn.Module:
    """Expand every layer of `model` that the method covers, in place, and return it."""
    methods.load("overparameterize", method).expand(model, **arguments)
    return model


def collapse(model: nn.Module) -> nn.Module:
    """Merge every over-parameterised layer of `model` into the plain layer it computes, in place, and return it."""
    for _, layer in filtering_layers(model):
        # A deep copy shares the class that torch made for the original, and removing a parametrisation edits that class: the
        # layer gets a class of its own first.
        if parametrize.is_parametrized(layer):
            shared: Any = type(layer)
            own: Any = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            layer.__class__ = own
        for tensor in ("bias", "weight"):
            if parametrize.is_parametrized(layer, tensor):
                parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)
    return model

"""Over-parameterised training: filtering layers whose kernel is computed from more parameters than it has.

Each method is one file with

    Options      its part of params.yaml, under train.overparameterize
    expand       expand(model, layers=..., **arguments): expand every layer that is chosen and that the method covers, in place
    Hook         where there is one, Hook(**arguments): what training must add while the network is expanded (rules, penalties)

and `collapse` merges any of them into plain layers of the same class.
"""

from inspect import signature
from types import ModuleType
from typing import Any

from torch import nn

from pipeline import methods
from pipeline.config import parse
from pipeline.errors import InputError
from pipeline.expansion import Chosen, collapse

__all__ = ["collapse", "overparameterize"]


def overparameterize(model: nn.Module, method: str = "kflo", layers: Chosen = ("*",), **arguments: Any) -> nn.Module:
    """Expand the layers of `model` that the method covers, in place, and return it.

    `layers` chooses among them: a predicate on (qualified name, layer), or patterns of names. A trained network computes at the
    start what it did (with batch norms in branches: in evaluation), unless the arguments ask for published initial weights.
    `InputError` for arguments that are not the method's or not allowed.
    """
    module = methods.load("overparameterize", method)
    chosen: Chosen = [layers] if isinstance(layers, str) else layers
    if not callable(chosen) and not (isinstance(chosen, list | tuple) and all(isinstance(pattern, str) for pattern in chosen)):
        raise InputError(f"{method}: layers = {layers!r}: must be patterns of names, or a predicate on (name, layer)")
    _check(method, module, arguments)
    module.expand(model, layers=chosen, **arguments)
    return model


def _check(method: str, module: ModuleType, arguments: dict[str, Any]) -> None:
    """Hold the arguments, and the defaults of those that are not given, against the method's options."""
    there = signature(module.expand).parameters
    options = {name: value.default for name, value in there.items() if name not in ("model", "layers")} | arguments
    if "layers" in module.Options.model_fields:
        options["layers"] = ["*"]
    try:
        parse(method, {"method": method, **options}, module.Options)
    except InputError as error:
        raise InputError(str(error).replace("params.yaml: ", "")) from None

"""Methods and networks by name: a name in params.yaml is the stem of a file, which is imported only when it is asked for.

Families are the packages `models`, `overparameterize`, `revive` and `compress`. A new file is a new choice; nothing lists it.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.config import Section, Train, parse
from pipeline.errors import InputError


def names(family: str) -> list[str]:
    """What there is to choose from, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / family)]))


def load(family: str, name: str) -> ModuleType:
    """The module of one choice; `InputError` lists all when there is none of that name."""
    if name not in names(family):
        raise InputError(f"{family}: there is no {name!r}; choose one of {', '.join(names(family))}")
    return importlib.import_module(f"pipeline.{family}.{name}")


def options(family: str, key: str, value: Any, *, by: str = "method") -> Any:
    """`value`, found in params.yaml under `key`, as the `Options` of the choice that its entry `by` names."""
    name = value.get(by) if isinstance(value, dict) else None
    if name not in names(family):
        raise InputError(f"params.yaml: {key}.{by} = {name!r}: must be one of {', '.join(names(family))}")
    chosen: type[Section] = load(family, name).Options
    return parse(key, value, chosen)


def inside(family: str, train: Train) -> Any:
    """The options of `train.revive` or `train.compress`: those of a block of that family, but for `fit`, which is the training's
    own."""
    chosen: dict[str, Any] = getattr(train, family)
    if "fit" in chosen:
        raise InputError(f"params.yaml: train.{family}.fit is not a parameter: here train.fit holds; remove it")
    return options(family, f"train.{family}", {**chosen, "fit": train.fit.model_dump()})

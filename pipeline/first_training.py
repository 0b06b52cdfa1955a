"""The first training of the chain: a network built, perhaps started from others, over-parameterised and trained.

Transfer learning as in "Utilizing Excess Resources in Training Neural Networks": one network to start from gives its weights;
of several, KFLO stacks the filters (`kflo.stack`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import chain, checkpoint, methods
from pipeline.averaging import Averaging
from pipeline.config import Train, lookup, parse
from pipeline.errors import InputError
from pipeline.expansion import collapse
from pipeline.hooks import BiasRate, Hook, stable_seed
from pipeline.overparameterize import overparameterize
from pipeline.records import Record


def first_training(params: dict[str, Any], seed: int, *, prepared: Path, resume: Path, out: Path) -> None:
    """Train what the sections `model` and `train` say on the data in `prepared`; write `out`/model and `out`/record.json."""
    where, used = chain.setting(params, prepared, resume)
    options = parse("train", lookup(params, "train"), Train)
    network = methods.options("models", "model", lookup(params, "model"), by="name").model_dump()
    expansion = methods.options("overparameterize", "train.overparameterize", options.overparameterize).model_dump()
    parameters = {"model": network, "train": options.model_dump() | {"overparameterize": expansion}, **used}
    record = Record("train", str(seed), parameters, seed=seed)

    described = {"name": network["name"], "arguments": {key: value for key, value in network.items() if key != "name"}}
    card = checkpoint.new_card(described, where.prepared)
    folders = start_folders(Path(options.start))
    torch.manual_seed(stable_seed(seed, "initial weights"))
    model = checkpoint.build(card)
    record.notes += begin(model, [collapse(checkpoint.load(folder)[0]) for folder in folders], expansion)
    if expansion["method"] != "none":
        card["expansion"] = {"method": expansion["method"], "arguments": _arguments(expansion)}
    hooks: list[Hook] = [BiasRate(options.bias_lr)] if options.bias_lr != 1 else []
    hooks += [Averaging(options.ema)] if options.ema else []
    files = [path for folder in folders for path in sorted(folder.iterdir())]
    chain.train_stage(where, record, model, card, fit=options.fit, hooks=hooks, inputs=files, out=out)


def start_folders(folder: Path) -> list[Path]:
    """The model folders among the sub-folders of `folder` (or their `model`), by name."""
    if not folder.is_dir():
        raise InputError(
            f"params.yaml: train.start = {str(folder)!r}: must be a folder; its sub-folders hold networks to start from"
        )
    return [path for child in sorted(folder.iterdir()) for path in (child, child / "model") if (path / "model.json").is_file()]


def begin(model: nn.Module, networks: list[nn.Module], expansion: dict[str, Any]) -> list[str]:
    """Over-parameterise `model` in place, after it took the weights of trained plain `networks`, if any; notes on what it did
    not take. `InputError` where several are given to a method that starts from one."""
    method, left = expansion["method"], transfer(model, networks[0]) if networks else []
    overparameterize(model, method, **_arguments(expansion))
    if len(networks) > 1:
        stack = getattr(methods.load("overparameterize", method), "stack", None)
        if stack is None:
            raise InputError(
                f"params.yaml: train.start has {len(networks)} networks, but {method} starts from one; kflo stacks several"
            )
        left = stack(model, networks)
    return [f"not taken over from the networks of train.start: {', '.join(left)}"] if left else []


def transfer(model: nn.Module, network: nn.Module) -> list[str]:
    """Copy every tensor of `network` that `model` has in the same shape, in place; the names of the others of `model`.

    `InputError` where they have nothing in common.
    """
    source, left = network.state_dict(), []
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in source and source[name].shape == tensor.shape:
                tensor.copy_(source[name])
            else:
                left.append(name)
    if len(left) == len(model.state_dict()):
        raise InputError(f"a {type(network).__name__} has no tensor in common with this {type(model).__name__} to start from")
    return left


def _arguments(expansion: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in expansion.items() if key != "method"}

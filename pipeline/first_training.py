"""The first training of the chain: a network built, perhaps started from others, over-parameterised and trained.

Transfer learning as in "Utilizing Excess Resources in Training Neural Networks": one network to start from gives its weights;
of several, KFLO stacks the filters (`kflo.stack`). A network to start from is a folder of another training of the chain, or a
weight file that somebody published.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import chain, checkpoint, methods, weights
from pipeline.averaging import Averaging
from pipeline.compression import compress_hooks
from pipeline.config import Train, lookup, parse
from pipeline.errors import InputError
from pipeline.expansion import collapse
from pipeline.hooks import BiasRate, Hook, stable_seed
from pipeline.overparameterize import overparameterize
from pipeline.records import Record
from pipeline.weights import Weights

COUNTER = "num_batches_tracked"  # of batch norms: old files lack it, it fits any other one, and nothing here depends on it


def first_training(params: dict[str, Any], seed: int, *, prepared: Path, resume: Path, out: Path) -> None:
    """Train what the sections `model` and `train` say on the data in `prepared`; write `out`/model and `out`/record.json."""
    where, used = chain.setting(params, prepared, resume)
    options = parse("train", lookup(params, "train"), Train)
    network = methods.options("models", "model", lookup(params, "model"), by="name").model_dump()
    expansion = methods.options("overparameterize", "train.overparameterize", options.overparameterize).model_dump()
    parameters = {"model": network, "train": options.model_dump() | {"overparameterize": expansion}, **used}
    revive, compress = methods.inside("revive", options), methods.inside("compress", options)
    parameters["train"] |= {"revive": revive.model_dump(exclude={"fit"}), "compress": compress.model_dump(exclude={"fit"})}
    record = Record("train", str(seed), parameters, seed=seed)

    described = {"name": network["name"], "arguments": {key: value for key, value in network.items() if key != "name"}}
    card = checkpoint.new_card(described, where.prepared)
    starts = weights.start_paths(Path(options.start))
    networks = [collapse(checkpoint.load(path)[0]) if path.is_dir() else weights.read(path) for path in starts]

    def drawn(*numbers: int) -> tuple[nn.Module, list[str]]:
        torch.manual_seed(stable_seed(seed, "initial weights", *numbers))
        model = checkpoint.build(card)
        return model, begin(model, networks, expansion, options.start_layers)

    model, left = drawn()
    record.notes += left
    if expansion["method"] != "none":
        card["expansion"] = {"method": expansion["method"], "arguments": _arguments(expansion)}
    hooks: list[Hook] = [BiasRate(options.bias_lr)] if options.bias_lr != 1 else []
    hooks += [Averaging(options.ema)] if options.ema else []
    hooks.append(methods.load("revive", revive.method).create(revive))
    hooks += compress_hooks(compress)
    files = [file for path in starts for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    fresh = None if networks else lambda number: drawn(number)[0]
    run = {"fit": options.fit, "hooks": hooks, "inputs": files, "fresh": fresh, "blank": lambda: blank(card, expansion)}
    chain.train_stage(where, record, model, card, **run, out=out)


def blank(card: dict[str, Any], expansion: dict[str, Any]) -> nn.Module:
    """The network with fresh weights, whatever it started from."""
    model = checkpoint.build(card)
    begin(model, [], expansion)
    return model


def begin(
    model: nn.Module, networks: Sequence[nn.Module | Weights], expansion: dict[str, Any], layers: Sequence[str] = ("*",)
) -> list[str]:
    """Over-parameterise `model` in place, after it took the `layers` of trained plain `networks`, if any; notes on what it did
    not take. `InputError` where several are given to a method that starts from one, or not taken whole."""
    method, left = expansion["method"], transfer(model, networks[0], layers) if networks else []
    overparameterize(model, method, **_arguments(expansion))
    if len(networks) > 1:
        stack = getattr(methods.load("overparameterize", method), "stack", None)
        if stack is None:
            raise InputError(
                f"params.yaml: train.start has {len(networks)} networks, but with train.overparameterize.method = {method!r} "
                "a network starts from one; kflo stacks several"
            )
        if list(layers) != ["*"]:
            raise InputError(
                f"params.yaml: train.start_layers = {list(layers)}: must be ['*'] where train.start has several networks: "
                f"{method} stacks whole ones"
            )
        left = stack(model, networks)
    return [f"not taken over from the networks of train.start: {', '.join(left)}"] if left else []


def transfer(model: nn.Module, network: nn.Module | Weights, layers: Sequence[str] = ("*",)) -> list[str]:
    """Copy every tensor of `network` that `model` has in the same shape, in place, where its own name or its layer's fits one of
    the patterns `layers`; the names of the others of `model`, but for batch norms' counters.

    `InputError` where there is nothing to copy, or no tensor fits a pattern; `model` is then as it was.
    """
    source, target = network.state_dict(), model.state_dict()
    chosen = [name for name in weights.chosen(model, layers) if name in source and _alike(source[name], target[name])]
    if all(name.endswith(COUNTER) for name in chosen):
        raise InputError(_nothing_fits(model, network, layers))
    with torch.no_grad():
        for name in chosen:
            target[name].copy_(source[name])
    return [name for name in target if name not in chosen and not name.endswith(COUNTER)]


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.is_floating_point() == second.is_floating_point()


def _nothing_fits(model: nn.Module, network: nn.Module | Weights, layers: Sequence[str]) -> str:
    needed, among = type(model).__name__, "" if list(layers) == ["*"] else f" among train.start_layers = {list(layers)}"
    if isinstance(network, nn.Module):
        return f"a {type(network).__name__} has no tensor in common with this {needed} to start from{among}"
    has, wanted = _first_tensors(network.state_dict()), _first_tensors(model.state_dict())
    return f"{network.path} has no tensor that fits this {needed} in name and shape{among}: it has {has}; the network has {wanted}"


def _first_tensors(state: Mapping[str, Tensor], count: int = 4) -> str:
    shown = [f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in state.items() if tensor.dim()]
    return ", ".join(shown[:count]) + (", ..." if len(shown) > count else "")


def _arguments(expansion: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in expansion.items() if key != "method"}

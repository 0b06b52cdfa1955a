"""What each method, and surgery layer by layer, can do to this network: outputs/coverage/coverage.json, before any training."""

from typing import Any

import torch

from pipeline import checkpoint, methods
from pipeline.config import Train, Variants, lookup, parse, read_params
from pipeline.coverage import described
from pipeline.data.batches import Prepared, load
from pipeline.errors import InputError
from pipeline.files import write_json
from pipeline.layers import expanded, filtering_layers
from pipeline.overparameterize import overparameterize
from pipeline.tasks import TASKS, check_options, check_output
from pipeline.weights import chosen
from stages import PREPARED, folder, run


def main() -> None:
    """Ask every method about the untrained network; a method that cannot work on it stops the chain here."""
    params = read_params()
    data = load(PREPARED)
    network = methods.options("models", "model", lookup(params, "model"), by="name").model_dump()
    train = parse("train", lookup(params, "train"), Train)
    expansion = methods.options("overparameterize", "train.overparameterize", train.overparameterize).model_dump()
    check_options(TASKS[data.task], "train", train.fit)
    with torch.device("meta"):  # shapes alone: no memory, no random numbers
        model = checkpoint.build(checkpoint.new_card({"name": network.pop("name"), "arguments": network}, data))
        check_output(TASKS[data.task], lookup(params, "model.name"), model, data.shape, len(data.classes))
        chosen(model, train.start_layers)
        try:
            overparameterize(model, expansion.pop("method"), **expansion)
        except InputError as error:
            raise InputError(f"params.yaml: train.overparameterize: {error}") from error
    variants = parse("variants", lookup(params, "variants"), Variants)
    plain = [name for name, layer in filtering_layers(model) if not expanded(layer)]
    notes: dict[str, list[str]] = {"train.overparameterize": [f"leaves plain: {', '.join(plain)}"] if plain else []}
    for family in ("revive", "compress"):
        notes[f"train.{family}"] = _ask(family, f"train.{family}", methods.inside(family, train), model, data)
    for family, names in (("revive", variants.revive), ("compress", variants.compress)):
        for key in (f"{family}.{name}" for name in names):
            notes[key] = _ask(family, key, methods.options(family, key, lookup(params, key)), model, data)
    notes["surgery"], layers = described(model, data.shape)
    for key, told in notes.items():
        print("\n".join(f"{key}: {note}" for note in told or ["treats every layer it is meant for"]))
    write_json(folder("coverage") / "coverage.json", {"notes": notes, "layers": layers})
    write_json(folder("coverage") / "passed.json", {"passed": True})


def _ask(family: str, key: str, options: Any, model: Any, data: Prepared) -> list[str]:
    check_options(TASKS[data.task], key, options.fit, getattr(options, "distill", None))
    try:
        return methods.load(family, options.method).create(options).coverage(model, data.shape)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


if __name__ == "__main__":
    run(main)

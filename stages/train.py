"""Prepared data -> outputs/train/SEED: the over-parameterised network, trained."""

import torch

from pipeline import chain, checkpoint, methods
from pipeline.config import Train, lookup, parse, read_params
from pipeline.hooks import stable_seed
from pipeline.overparameterize import overparameterize
from pipeline.records import Record
from stages import PREPARED, RESUME, folder, run


def main(seed: str) -> None:
    """Build, expand and train the network of the section `model` as the section `train` says."""
    params = read_params()
    where, used = chain.setting(params, PREPARED, RESUME)
    options = parse("train", lookup(params, "train"), Train)
    network = methods.options("models", "model", lookup(params, "model"), by="name").model_dump()
    expansion = methods.options("overparameterize", "train.overparameterize", options.overparameterize).model_dump()
    parameters = {"model": network, "train": {"overparameterize": expansion, "fit": options.fit.model_dump()}, **used}
    record = Record("train", seed, parameters, seed=int(seed))

    data = where.prepared
    described = {"name": network["name"], "arguments": {key: value for key, value in network.items() if key != "name"}}
    card = checkpoint.new_card(described, data)
    torch.manual_seed(stable_seed(int(seed), "initial weights"))
    model = checkpoint.build(card)
    if expansion["method"] != "none":
        arguments = {key: value for key, value in expansion.items() if key != "method"}
        overparameterize(model, expansion["method"], **arguments)
        card["expansion"] = {"method": expansion["method"], "arguments": arguments}
    chain.train_stage(where, record, model, card, fit=options.fit, out=folder("train", seed))


if __name__ == "__main__":
    run(main)

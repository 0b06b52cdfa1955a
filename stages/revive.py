"""outputs/train/SEED -> outputs/revive/REVIVE-SEED: the network trained on by a revive method, or by its control."""

from pipeline import chain, checkpoint, methods
from pipeline.config import lookup, read_params
from pipeline.distributed import spread
from pipeline.records import Record
from pipeline.resume import forget
from stages import PREPARED, RESUME, folder, run


def main(revive: str, seed: str) -> None:
    """Train on as the block `revive.REVIVE` says."""
    if spread("revive", revive, seed):
        return
    params = read_params()
    where, used = chain.setting(params, PREPARED, RESUME)
    key = f"revive.{revive}"
    options = methods.options("revive", key, lookup(params, key))
    parent = folder("train", seed) / "model"
    model, card = checkpoint.load(parent, where.prepared)
    forget(RESUME, f"train-{seed}")
    parameters = {"revive": options.model_dump(), **used}
    record = Record("revive", f"{revive}-{seed}", parameters, revive=revive, seed=int(seed))
    hooks = [methods.load("revive", options.method).create(options)]
    out = folder("revive", revive, seed)
    chain.train_stage(where, record, model, card, fit=options.fit, hooks=hooks, inputs=sorted(parent.iterdir()), out=out)


if __name__ == "__main__":
    run(main)

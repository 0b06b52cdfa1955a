"""outputs/revive/REVIVE-SEED -> outputs/compress/REVIVE-COMPRESS-SEED: a smaller network, or the control at full width."""

from pipeline import chain, checkpoint, methods
from pipeline.compression import compress_hooks
from pipeline.config import lookup, read_params
from pipeline.distributed import spread
from pipeline.records import Record
from pipeline.resume import forget
from stages import PREPARED, RESUME, folder, run


def main(revive: str, compress: str, seed: str) -> None:
    """Compress and train on as the block `compress.COMPRESS` says."""
    if spread("compress", revive, compress, seed):
        return
    params = read_params()
    where, used = chain.setting(params, PREPARED, RESUME)
    key = f"compress.{compress}"
    options = methods.options("compress", key, lookup(params, key))
    parent = folder("revive", revive, seed) / "model"
    model, card = checkpoint.load(parent, where.prepared)
    forget(RESUME, f"revive-{revive}-{seed}")
    variant, parameters = f"{revive}-{compress}-{seed}", {"compress": options.model_dump(), **used}
    record = Record("compress", variant, parameters, revive=revive, compress=compress, seed=int(seed))
    out = folder("compress", revive, compress, seed)
    hooks, inputs = compress_hooks(options), sorted(parent.iterdir())
    chain.train_stage(where, record, model, card, fit=options.fit, hooks=hooks, inputs=inputs, out=out)


if __name__ == "__main__":
    run(main)

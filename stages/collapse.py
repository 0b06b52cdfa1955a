"""outputs/compress/VARIANT -> outputs/collapse/VARIANT: over-parameterised layers merged into plain ones, certified equal."""

from pipeline import chain, checkpoint
from pipeline.certificate import certify
from pipeline.config import read_params
from pipeline.overparameterize import collapse
from pipeline.records import Record
from pipeline.resume import forget
from stages import PREPARED, RESUME, folder, run


def main(revive: str, compress: str, seed: str) -> None:
    """Merge, and compare both networks on the test images."""
    where, used = chain.setting(read_params(), PREPARED, RESUME)
    parent = folder("compress", revive, compress, seed) / "model"
    expanded, card = checkpoint.load(parent, where.prepared)
    collapsed, _ = checkpoint.load(parent)
    forget(RESUME, f"compress-{revive}-{compress}-{seed}")
    collapse(collapsed)
    variant = f"{revive}-{compress}-{seed}"
    record = Record("collapse", variant, used, revive=revive, compress=compress, seed=int(seed))
    record.metrics |= certify(expanded.to(where.device), collapsed.to(where.device), where.evaluated("test"))
    record.metrics["parameters"] = sum(parameter.numel() for parameter in collapsed.parameters())
    chain.write(record, collapsed, {**card, "expansion": None}, folder("collapse", revive, compress, seed))


if __name__ == "__main__":
    run(main)

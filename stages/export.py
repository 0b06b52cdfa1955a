"""outputs/collapse/VARIANT -> outputs/export/VARIANT/PRECISION: the network as ONNX files, each proven on the whole test split."""

import torch

from pipeline.checkpoint import load
from pipeline.config import Runtime, section
from pipeline.data.batches import load as load_data
from pipeline.deployment import Export
from pipeline.files import replaced
from pipeline.records import Record
from pipeline.scores import NAMES
from pipeline.shipping import PICTURES, TENSORS, Shipment
from stages import PREPARED, folder, run


def main(revive: str, compress: str, seed: str) -> None:
    """Export one variant in every precision: all of them, or none where one fails."""
    options, runtime = section("export", Export), section("runtime", Runtime)
    torch.set_num_threads(runtime.threads)
    prepared = load_data(PREPARED)
    model, card = load(folder("collapse", revive, compress, seed) / "model", prepared)
    place = folder("export", revive, compress, seed)
    shipment = Shipment(place.name, model, card, prepared, options, runtime.threads, runtime.workers)
    names = NAMES[card["task"]]
    with replaced(place) as partial:
        for precision in options.precisions:
            record = Record(
                "export",
                place.name,
                {"export": options.model_dump()},
                revive=revive,
                compress=compress,
                seed=int(seed),
                precision=precision,
                data=card["data"],
            )
            shipped = shipment.write(precision, partial)
            record.metrics, record.events, record.notes = shipped.metrics, shipped.events, shipped.notes
            record.artifacts = [TENSORS, PICTURES]
            record.write(partial / precision)
            told = f"{record.metrics['size_mb']:.2f} MB, test {names.title} {record.metrics[f'test_{names.headline}']:.4f}"
            print(f"{place / precision}: {told}")


if __name__ == "__main__":
    run(main)

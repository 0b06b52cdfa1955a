"""outputs/collapse/VARIANT -> outputs/export/VARIANT: the network as an ONNX file, proven on the whole test split."""

import torch

from pipeline.checkpoint import load
from pipeline.config import Export, Runtime, section
from pipeline.data.batches import Batches
from pipeline.data.batches import load as load_data
from pipeline.export import export_proven
from pipeline.measure import size_mb
from pipeline.pictures import Pictures
from pipeline.records import Record
from pipeline.scores import NAMES
from stages import PREPARED, folder, run

BATCH_SIZE = 250  # of the proof: decides its memory, not its result


def main(revive: str, compress: str, seed: str) -> None:
    """Export one variant."""
    options, runtime = section("export", Export), section("runtime", Runtime)
    torch.set_num_threads(runtime.threads)
    prepared = load_data(PREPARED)
    model, card = load(folder("collapse", revive, compress, seed) / "model", prepared)
    test = Batches(prepared, "test", BATCH_SIZE, "cpu", None, False, 0, workers=runtime.workers)
    place = folder("export", revive, compress, seed)
    record = Record(
        "export",
        place.name,
        {"export": options.model_dump()},
        revive=revive,
        compress=compress,
        seed=int(seed),
        data=card["data"],
    )
    path = place / "model.onnx"
    pictures = Pictures(card, test.images)
    proof = {"opset": options.opset, "atol": options.atol, "rtol": options.rtol, "threads": runtime.threads}
    figures = export_proven(model, card, path, test.epoch(0), **proof, watch=pictures.add)
    images = figures.pop("images")
    record.metrics |= figures | {"size_mb": size_mb(path)}
    record.notes.append(f"proven on {images} test images and at batch sizes 1, 2, 5, 32 on the CPU")
    record.events.append(pictures.event())
    record.artifacts = [path.name]
    record.write(place)
    names = NAMES[card["task"]]
    print(f"{path}: {size_mb(path):.2f} MB, test {names.title} {figures[f'test_{names.headline}']:.4f}")


if __name__ == "__main__":
    run(main)

"""outputs/export/VARIANT -> outputs/profile/VARIANT/PRECISION/record.json: size, multiply-adds, memory, latency beside the
control's, for each precision."""

import tempfile
from pathlib import Path

from pipeline import measure, profiling
from pipeline.checkpoint import load
from pipeline.config import section
from pipeline.deployment import Export, Profile
from pipeline.export import read_metadata
from pipeline.records import Record
from stages import folder, run


def main(revive: str, compress: str, seed: str) -> None:
    """Measure one variant against the fp32 file of `profile.control` of the same seed."""
    options, precisions = section("profile", Profile), section("export", Export).precisions
    place = folder("profile", revive, compress, seed)
    paths = {name: folder("export", revive, compress, seed) / name / "model.onnx" for name in precisions}
    control = folder("export", options.control, seed) / profiling.CONTROL / "model.onnx"
    for file in (*paths.values(), control):
        read_metadata(file)  # refuses what was not exported by this chain
    model, card = load(folder("collapse", revive, compress, seed) / "model")
    counted = measure.count(model, card["input"]["shape"])
    lacks = [f"macs lacks the operation {name}, met {times} times" for name, times in counted["unsupported"].items()]
    lacks += [f"macs lacks the module {name}: it was never called" for name in counted["uncalled"]]
    print(f"{place.name}: {counted['parameters']:,} parameters, {counted['macs'] / 1e6:,.1f} M MACs", *lacks, sep="\n")
    with tempfile.TemporaryDirectory() as engines:
        for precision, path in paths.items():
            record = Record(
                "profile",
                place.name,
                {"profile": options.model_dump()},
                revive=revive,
                compress=compress,
                seed=int(seed),
                precision=precision,
                data=card["data"],
            )
            found = profiling.profile(path, precision, control, options, Path(engines))
            counts = {"parameters": counted["parameters"], "macs": counted["macs"], "size_mb": measure.size_mb(path)}
            record.metrics = counts | found.metrics
            record.events = [*found.events, {"kind": "counts", **counted}]
            record.notes = [*found.notes, *lacks]
            record.write(place / precision)
            print(*(f"{precision}: {note}" for note in found.notes), sep="\n", end="\n" if found.notes else "")


if __name__ == "__main__":
    run(main)

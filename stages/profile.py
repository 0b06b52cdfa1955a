"""outputs/export/VARIANT -> outputs/profile/VARIANT/record.json: size, multiply-adds, memory, latency beside the
control's."""

from pipeline import latency, measure
from pipeline.checkpoint import load
from pipeline.config import Profile, section
from pipeline.export import read_metadata
from pipeline.records import Record
from stages import folder, run


def main(revive: str, compress: str, seed: str) -> None:
    """Measure one variant against `profile.control` of the same seed."""
    options = section("profile", Profile)
    place = folder("profile", revive, compress, seed)
    path = folder("export", revive, compress, seed) / "model.onnx"
    control = folder("export", options.control, seed) / "model.onnx"
    for file in (path, control):
        read_metadata(file)  # refuses what was not exported by this chain
    model, card = load(folder("collapse", revive, compress, seed) / "model")
    record = Record(
        "profile",
        place.name,
        {"profile": options.model_dump()},
        revive=revive,
        compress=compress,
        seed=int(seed),
        data=card["data"],
    )
    timed, record.events, record.notes = latency.profile(
        path,
        control,
        options.providers,
        options.batch_sizes,
        threads=options.threads,
        warmup_s=options.warmup_s,
        repeats=options.repeats,
        stability=options.stability,
        attempts=options.attempts,
    )
    counted = measure.count(model, card["input"]["shape"])
    record.metrics = {
        "parameters": counted["parameters"],
        "macs": counted["macs"],
        "size_mb": measure.size_mb(path),
        **timed,
    }
    record.events.append({"kind": "counts", **counted})
    record.notes += [f"macs lacks the operation {name}, met {times} times" for name, times in counted["unsupported"].items()]
    record.notes += [f"macs lacks the module {name}: it was never called" for name in counted["uncalled"]]
    record.write(place)
    print(
        f"{place.name}: {counted['parameters']:,} parameters, {counted['macs'] / 1e6:,.1f} M MACs",
        *record.notes,
        sep="\n",
    )


if __name__ == "__main__":
    run(main)

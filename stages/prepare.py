"""Raw data -> outputs/prepare/data, divided into train, validation and test, with its statistics and fingerprint."""

from pipeline.config import Data, section
from pipeline.data.prepare import prepare
from pipeline.records import Record
from stages import PREPARED, folder, run


def main() -> None:
    """Prepare the data set of the section `data`."""
    options = section("data", Data)
    record = Record("prepare", "data", {"data": options.model_dump()})
    card = prepare(options, PREPARED)
    record.data = card["fingerprint"]
    record.metrics |= {f"{split}_images": count for split, count in card["counts"].items()}
    record.metrics["classes"] = len(card["classes"])
    record.notes += card["notes"]
    record.artifacts = [f"{PREPARED.name}/{name}" for name in ("data.json", *card["files"])]
    record.write(folder("prepare"))
    counts = ", ".join(f"{count} {split}" for split, count in card["counts"].items())
    of = f"of {len(card['classes'])} classes" if card["task"] == "classify" else f"with {', '.join(card['classes'])}"
    print(f"{card['name']}: {counts} images {of}, {'x'.join(map(str, card['shape']))}")


if __name__ == "__main__":
    run(main)

"""outputs/source/source.json: changes when the user's own raw data does, so that `prepare` reads it again."""

from pipeline.config import Data, section
from pipeline.data.listing import listing
from pipeline.files import write_json
from stages import folder, run


def main() -> None:
    """Look at the raw data of the section `data`."""
    options = section("data", Data)
    write_json(folder("source") / "source.json", {"name": options.name, "listing": listing(options)})


if __name__ == "__main__":
    run(main)

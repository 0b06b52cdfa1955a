"""params.yaml, all of it, checked before anything runs; outputs/check/passed.json stays the same while it passes."""

from pipeline.files import write_json
from pipeline.grid import check
from stages import folder, run


def main() -> None:
    """Refuse params.yaml with one line for each mistake."""
    check()
    write_json(folder("check") / "passed.json", {"passed": True})


if __name__ == "__main__":
    run(main)

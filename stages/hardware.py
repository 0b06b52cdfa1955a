"""Write what this machine is, so that a latency measured on another one is not taken for this one's."""

from pipeline import files, hardware
from stages import OUTPUTS, run


def main() -> None:
    """Write outputs/hardware/hardware.json: on the same machine the same bytes."""
    files.write_json(OUTPUTS / "hardware" / "hardware.json", hardware.describe())


if __name__ == "__main__":
    run(main)

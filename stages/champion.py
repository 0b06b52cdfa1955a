"""Records of export and profile -> outputs/champion/champion.json: the variant that the rule of params.yaml chooses."""

from pipeline import files
from pipeline.champion import choose
from pipeline.config import section
from pipeline.deployment import Champion
from pipeline.lineage import present
from stages import OUTPUTS, folder, run


def main() -> None:
    """Choose of the present grid; that no variant is within the limits is an answer too."""
    decision = choose(present(OUTPUTS), section("champion", Champion))
    files.write_json(folder("champion") / "champion.json", decision, summed=True)
    print(f"champion: {decision['champion'] or 'none'}: {decision['reason']}")


if __name__ == "__main__":
    run(main)

"""outputs/export/*/*, outputs/champion/champion.json -> repository/ for NVIDIA Triton: new models and new versions are added."""

import os
from pathlib import Path

from pipeline import files
from pipeline.champion import decided
from pipeline.config import section
from pipeline.deployment import Repository
from pipeline.lineage import chains, present
from pipeline.repository import CHAMPION, as_json, write
from stages import OUTPUTS, folder, run


def main() -> None:
    """Add what is new and say what is where."""
    options = section("repository", Repository)
    champion = decided(OUTPUTS)
    place = Path(os.environ.get("DVC_ROOT", ".")).resolve() / options.folder
    done, others = write(chains(present(OUTPUTS)), champion, OUTPUTS, place, options)
    told = {"folder": options.folder, "champion": champion["champion"], "reason": champion["reason"]}
    files.write_json(folder("repository") / "written.json", {**told, "models": as_json(done), "others": others})
    added = sum(model.added for model in done)
    print(f"{options.folder}: {added} versions added, {len(done) - added} there already")
    if champion["champion"] is None:
        stays = f"; {options.folder}/{CHAMPION} is still the one that was chosen before" if CHAMPION in others else ""
        print(f"no champion: {champion['reason']}{stays}")
    left = [name for name in others if name != CHAMPION]
    if left:
        print(f"there too, not written this time: {', '.join(left)}")


if __name__ == "__main__":
    run(main)

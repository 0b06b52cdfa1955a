"""outputs/*/*/record.json -> MLflow: the runs of the present grid, each published once."""

import os
from pathlib import Path

from pipeline import files
from pipeline.config import Tracking, Variants, read_params, section
from pipeline.lineage import select
from pipeline.records import read_records
from pipeline.scores import of_metrics
from pipeline.tracking import Unreachable, publish
from pipeline.tracking_server import shown
from stages import OUTPUTS, folder, run


def main() -> None:
    """Publish to MLFLOW_TRACKING_URI, or to mlflow.db in the project's root; a server that is away loses nothing."""
    options, grid = section("tracking", Tracking), section("variants", Variants)
    records = select(read_records(OUTPUTS), grid.revive, grid.compress, read_params()["seed"])
    root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    told = {"uri": shown(uri), "experiment": options.experiment, "score": of_metrics(r["metrics"] for r in records).headline}
    try:
        done = publish(records, OUTPUTS, options, uri)
    except Unreachable as error:
        files.write_json(folder("track") / "published.json", {**told, "published": False, "reason": str(error)})
        print(f"{error}: not published; run `make track` when the server is back")
        return
    files.write_json(folder("track") / "published.json", {**told, "published": True, "experiment_id": done.experiment_id})
    print(f"{shown(uri)}: {done.added} variants added, {done.replaced} replaced, {done.unchanged} there already")


if __name__ == "__main__":
    run(main)

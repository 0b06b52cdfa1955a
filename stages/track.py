"""outputs/**/record.json -> MLflow: the runs of the present grid, each published once, and the registered model's versions."""

import os
from pathlib import Path

from pipeline import files
from pipeline.champion import decided
from pipeline.config import section
from pipeline.deployment import Tracking
from pipeline.lineage import present
from pipeline.scores import of_metrics
from pipeline.tracking import Unreachable, publish
from pipeline.tracking_registry import model_name
from pipeline.tracking_server import shown
from stages import OUTPUTS, folder, run


def main() -> None:
    """Publish to MLFLOW_TRACKING_URI, or to mlflow.db in the project's root; a server that is away loses nothing."""
    options, records = section("tracking", Tracking), present(OUTPUTS)
    decision = decided(OUTPUTS)
    root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    told = {"uri": shown(uri), "experiment": options.experiment, "model": model_name(options.experiment)}
    told["score"] = of_metrics(r["metrics"] for r in records).headline
    try:
        done = publish(records, OUTPUTS, options, uri, decision)
    except Unreachable as error:
        files.write_json(folder("track") / "published.json", {**told, "published": False, "reason": str(error)})
        print(f"{error}: not published; run `make track` when the server is back")
        return
    found = {"published": True, "experiment_id": done.experiment_id, "champion": done.champion}
    files.write_json(folder("track") / "published.json", told | found)
    print(f"{shown(uri)}: {done.added} variants added, {done.replaced} replaced, {done.unchanged} there already")
    champion = f"version {done.champion}, {decision['champion']}" if done.champion else f"none: {decision['reason']}"
    print(f"champion of the registered model {done.model}: {champion}")


if __name__ == "__main__":
    run(main)

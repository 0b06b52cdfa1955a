"""No stage: MLflow's page with the variants of the grid side by side, for `make ui`."""

import os
from urllib.parse import quote

from pipeline.errors import InputError
from pipeline.files import read_json
from stages import folder, run

PORT = "5000"
PRESENT_GRID = quote('tags.`winnow.current` = "true"')


def main() -> None:
    """Print the address that compares the variants; serve it from here where the runs are in a file of this folder."""
    published = read_json(folder("track") / "published.json")
    if not published["published"]:
        raise InputError(f"the runs are not in MLflow ({published['reason']}): `make track` publishes them")
    local = published["uri"].startswith("sqlite:")
    server = f"http://127.0.0.1:{PORT}" if local else published["uri"].rstrip("/")
    metric = quote(f"metrics.`{published.get('score', 'accuracy')}`")  # older files name none
    best_first = f"orderByKey={metric}&orderByAsc=false"
    view = f"compareRunsMode=CHART&workflowType=machine_learning&{best_first}&searchFilter={PRESENT_GRID}"
    print(f"{server}/#/experiments/{published['experiment_id']}/runs?{view}", flush=True)
    if local:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.execlp("mlflow", "mlflow", "server", "--backend-store-uri", published["uri"], "--host", "127.0.0.1", "--port", PORT)


if __name__ == "__main__":
    run(main)

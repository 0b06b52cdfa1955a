"""record.json: what one run of a stage was given, did, and measured. Written by stages, read by report and tracking."""

import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import files, hardware

FORMAT = 2
PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime-gpu", "onnxruntime")


class Record:
    """Collects what a stage did between its start and `write`.

    `metrics` are final numbers by name, `history` one dict an epoch, `events` what a method changed, `notes` what it could
    not treat, `layers` the channels of each layer, `artifacts` paths relative to the record's folder.
    """

    def __init__(
        self,
        stage: str,
        variant: str,
        parameters: dict[str, Any],
        *,
        revive: str | None = None,
        compress: str | None = None,
        seed: int | None = None,
        precision: str | None = None,
        data: str | None = None,
    ) -> None:
        self.identity = {"stage": stage, "variant": variant, "revive": revive, "compress": compress, "seed": seed}
        self.identity |= {"precision": precision}
        self.parameters = parameters
        self.data = data
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.events: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.artifacts: list[str] = []
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()

    def as_dict(self) -> dict[str, Any]:
        """The record as it is written."""
        return {
            "format": FORMAT,
            **self.identity,
            "parameters": self.parameters,
            "metrics": self.metrics,
            "history": self.history,
            "events": self.events,
            "layers": self.layers,
            "notes": self.notes,
            "artifacts": self.artifacts,
            "data": self.data,
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
            "hardware": hardware.describe(),
            "versions": versions(),
            "commit": commit(),
        }

    def write(self, folder: Path) -> None:
        """Write record.json into `folder`."""
        files.write_json(folder / "record.json", self.as_dict(), summed=True)


def read_records(root: Path) -> list[dict[str, Any]]:
    """Every record under `root`/STAGE/VARIANT/PRECISION/ or above, in the order of their paths."""
    found = [path for depth in ("*", "*/*", "*/*/*") for path in root.glob(f"{depth}/record.json")]
    return [files.read_json(path) for path in sorted(found)]


def place(root: Path, record: dict[str, Any]) -> Path:
    """The folder below `root` that holds a record and the files it names."""
    stage = root / record["stage"]
    return stage if record["stage"] == "prepare" else stage / record["variant"] / (record["precision"] or "")


def versions() -> dict[str, str]:
    """Versions of the installed packages that decide results."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def commit() -> str | None:
    """The git commit of the working directory, "-dirty" appended where tracked files differ from it; None outside a repository.
    params.yaml and DVC's locks do not count: parameters stand in the record itself, and the locks change while the chain runs."""
    try:
        dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!params.yaml", ":!*dvc.lock")
        return _git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

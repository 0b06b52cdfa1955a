"""Records published to MLflow, once each: one top-level run a variant, with a nested run for each of its stages.

A variant has a run for each precision it is exported in. That holds every parameter of its chain, few metrics with one name for
all variants (so that MLflow's charts compare them), the model that takes pictures, which pipeline/tracking_registry.py registers,
its card and the dataset; a stage's run holds its final metrics, its curves by epoch, its record and
its files. Files of a stage that several variants share are uploaded once: the tag `winnow.files` is "here" in the run that
holds them and names that run in the others.

What is published is known by `winnow.fingerprint`, a hash of the records and the files. Publishing again adds nothing; a
variant whose records changed, or whose publication was interrupted, is published anew and its old runs are deleted (MLflow
keeps deleted runs until `mlflow gc`). Runs of variants that are not among the records stay.
"""

import colorsys
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files, model_card
from pipeline.deployment import Tracking
from pipeline.errors import InputError
from pipeline.lineage import OWN, Chain, Record, chains, flat_parameters
from pipeline.records import place
from pipeline.report import chart, sensitive, story, widths
from pipeline.tracking_model import PICTURES, log_model
from pipeline.tracking_registry import Entry, model_name, register
from pipeline.tracking_server import Unreachable, session

if TYPE_CHECKING:
    from mlflow.entities import Run

__all__ = ["Published", "Unreachable", "publish"]

FORMAT = 4  # part of every fingerprint: a new layout of the runs publishes anew
LONGEST = 6000  # characters of a parameter that MLflow keeps
MOST = 100  # parameters, and metrics, in one request


@dataclass(frozen=True)
class Published:
    """How many variants (a precision each) were added, replaced or found as they are, and the experiment that holds them; the
    registered model, and its version that is the champion, if any."""

    added: int
    replaced: int
    unchanged: int
    experiment_id: str
    model: str
    champion: str | None


def publish(records: list[Record], root: Path, tracking: Tracking, uri: str, decision: dict[str, Any]) -> Published:
    """Bring the experiment and the registered model at `uri` up to date with `records`, whose folders lie below `root` (outputs/),
    and with `decision` about them, as champion.json holds it.

    Raises `Unreachable` where no server answers, within a few times `tracking.timeout_s` seconds, and `InputError` where
    MLflow refuses or a file that a record names is missing.
    """
    wanted = chains(records)
    prints = {chain.name: _fingerprint(chain.records.values(), root) for chain in wanted}
    with session(uri, tracking, root) as (client, experiment_id):
        publisher = _Publisher(client, experiment_id, root)
        added, replaced, runs = publisher.update(wanted, prints)
        made = [(chain, path) for chain in wanted for path in _shipped(chain, root) if path.name == PICTURES]
        entries = [Entry(chain, runs[chain.name], prints[chain.name], files.sha256(path)) for chain, path in made]
        model = model_name(tracking.experiment)
        champion = register(client, experiment_id, model, entries, decision)
        return Published(added, replaced, len(wanted) - added - replaced, experiment_id, model, champion)


class _Publisher:
    """One pass over an experiment."""

    def __init__(self, client: Any, experiment_id: str, root: Path) -> None:
        self.client, self.experiment_id, self.root = client, experiment_id, root
        self.holders: dict[str, str] = {}  # fingerprint of a record -> the run that holds its files

    def update(self, wanted: list[Chain], prints: dict[str, str]) -> tuple[int, int, dict[str, str]]:
        """Add what is missing, mark the runs of the present grid, delete what a crash left, and point links to living runs.

        A run that a newer one replaces stays: its tag winnow.current becomes "false". Returns how many variants were added, how
        many replaced, and each one's run.
        """
        runs = self._runs()
        tops = [run for run in runs if run.data.tags.get("winnow.variant") in prints]
        current: dict[str, Run] = {}
        for run in tops:
            same = run.data.tags.get("winnow.fingerprint") == prints[run.data.tags["winnow.variant"]]
            if same and run.info.status == "FINISHED":
                current.setdefault(run.data.tags["winnow.variant"], run)
        kept = {run.info.run_id for run in current.values()}
        doomed = [run for run in tops if run.info.status != "FINISHED"]
        gone = {run.info.run_id for run in doomed}
        for run in runs:
            if run.data.tags.get("winnow.files") == "here" and run.data.tags.get("mlflow.parentRunId") not in gone:
                self.holders[run.data.tags["winnow.record"]] = run.info.run_id
        ids = {name: run.info.run_id for name, run in current.items()}
        for index, chain in enumerate(wanted):
            if chain.name not in current:
                ids[chain.name] = self._add(chain, prints[chain.name], _color(index))
        for run in runs:
            tags = run.data.tags
            wish = "true" if run.info.run_id in kept else "false"
            if "winnow.variant" in tags and run not in doomed and tags.get("winnow.current") != wish:
                self.client.set_tag(run.info.run_id, "winnow.current", wish)
        self._delete(doomed, runs)
        self._relink()
        replaced = {run.data.tags["winnow.variant"] for run in tops} - current.keys()
        return len(wanted) - len(current) - len(replaced), len(replaced), ids

    def _runs(self) -> list["Run"]:
        """All runs of the experiment that are not deleted."""
        found, token = [], None
        while True:
            page = self.client.search_runs([self.experiment_id], max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _add(self, chain: Chain, fingerprint: str, color: str) -> str:
        """A variant's run and those of its stages; only at the very end is it FINISHED. Its time is that of its own stages."""
        last = list(chain.records.values())[-1]
        tags = {"winnow.variant": chain.name, "winnow.fingerprint": fingerprint, "revive": chain.revive}
        tags |= {"compress": chain.compress, "seed": str(chain.seed), "precision": chain.precision}
        tags |= {"mlflow.source.name": "winnow", "mlflow.runColor": color}
        spans = [_span(record) for stage, record in chain.records.items() if stage in OWN]
        parameters = flat_parameters(chain.records) | {"precision": chain.precision}
        run_id = self._create(chain.name, last, tags, min(spans)[0])
        self._log(run_id, parameters, final_metrics(chain), spans[-1][1])
        self._log_dataset(run_id, chain)
        for stage, record in chain.records.items():
            self._add_stage(run_id, stage, record)
        self.client.log_dict(run_id, parameters, "parameters.json")
        plots = {chain.names.rename(quantity): story.curves(chain, quantity) for quantity in ("accuracy", "loss")}
        plots |= {"channels": story.channels(chain), "filters": story.filters(chain), "widths": widths.picture(chain)}
        plots["sensitivity"] = sensitive.picture(sensitive.last(chain))
        for name, svg in plots.items():
            if svg:
                self.client.log_text(run_id, chart.standalone(svg), f"plots/{name}.svg")
        shipped = _shipped(chain, self.root)
        self.client.log_text(run_id, model_card.text(chain, {}, {path.name: path for path in shipped}), "MODEL_CARD.md")
        for path in shipped:
            if path.name == PICTURES:
                log_model(self.client, self.experiment_id, run_id, parameters, path)
        self.client.set_tag(run_id, "winnow.current", "true")
        self.client.set_terminated(run_id, "FINISHED", max(end for _, end in spans))
        return run_id

    def _add_stage(self, parent: str, stage: str, record: Record) -> None:
        """A nested run: curves, final metrics, the record, and the files or where they are."""
        fingerprint = _fingerprint([record], self.root)
        holder = self.holders.get(fingerprint)
        start, end = _span(record)
        tags = {"mlflow.parentRunId": parent, "winnow.record": fingerprint, "winnow.stage": stage}
        tags |= {"winnow.files": holder or "here", "mlflow.source.name": f"stages/{stage}.py"}
        run_id = self._create(f"{stage} {record['variant']}", record, tags, start)
        self._log(run_id, flat_parameters({stage: record}), record["metrics"], end)
        self._log_curves(run_id, record, start, end)
        folder = place(self.root, record)
        self.client.log_artifact(run_id, str(folder / "record.json"))
        if not holder:
            for path in _uploads(self.root, record):
                self.client.log_artifact(run_id, str(path), path.relative_to(folder).parent.as_posix().strip("."))
            self.holders[fingerprint] = run_id
        self.client.set_terminated(run_id, "FINISHED", end)

    def _create(self, name: str, record: Record, tags: dict[str, str], start: int) -> str:
        commit = record["commit"]
        tags = {"winnow.commit": str(commit), "winnow.data": str(record["data"]), "mlflow.source.type": "LOCAL"} | tags
        if commit:
            tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        return self.client.create_run(self.experiment_id, start_time=start, tags=tags, run_name=name).info.run_id

    def _log(self, run_id: str, parameters: dict[str, str], metrics: dict[str, float], time_ms: int) -> None:
        from mlflow.entities import Metric, Param

        texts = {
            key: value if len(value) <= LONGEST else f"{value[: LONGEST - 30]}… whole in the artifacts"
            for key, value in parameters.items()
        }
        params = [Param(key, value) for key, value in texts.items()]
        values = [Metric(key, float(value), time_ms, 0) for key, value in metrics.items()]
        for start in range(0, max(len(params), len(values)), MOST):
            part = slice(start, start + MOST)
            self.client.log_batch(run_id, metrics=values[part], params=params[part])

    def _log_curves(self, run_id: str, record: Record, start: int, end: int) -> None:
        """Every number of the history, at its epoch; times are spread evenly over the stage."""
        from mlflow.entities import Metric

        history = record["history"]
        values = []
        for index, row in enumerate(history, 1):
            time_ms = start + (end - start) * index // len(history)
            numbers = {key: value for key, value in row.items() if key != "epoch" and isinstance(value, int | float)}
            values += [Metric(f"epoch/{key}", float(value), time_ms, row["epoch"]) for key, value in numbers.items()]
        for first in range(0, len(values), MOST):
            self.client.log_batch(run_id, metrics=values[first : first + MOST])

    def _log_dataset(self, run_id: str, chain: Chain) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        prepared = chain.records.get("prepare")
        if prepared is None or not prepared["data"]:
            return
        source = prepared["parameters"].get("data", {})
        name, digest = str(source.get("name", "data")), prepared["data"][:36]  # MLflow keeps 36 characters; the tag has all
        profile = json.dumps(prepared["metrics"])
        dataset = Dataset(name, digest, "local", json.dumps({"uri": str(source.get("root", name))}), profile=profile)
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _delete(self, doomed: list["Run"], runs: list["Run"]) -> None:
        """Runs with their stages and models; the top-level run last, so that an interruption leaves it to be found again."""
        for top in doomed:
            for run in runs:
                if run.data.tags.get("mlflow.parentRunId") == top.info.run_id:
                    self.client.delete_run(run.info.run_id)
            source = f"source_run_id = '{top.info.run_id}'"
            for model in self.client.search_logged_models([self.experiment_id], filter_string=source):
                self.client.delete_logged_model(model.model_id)
            self.client.delete_run(top.info.run_id)

    def _relink(self) -> None:
        """Links to a run that was deleted now name the one that holds the same files."""
        for run in self._runs():
            link, record = run.data.tags.get("winnow.files"), run.data.tags.get("winnow.record")
            holder = self.holders.get(record or "")
            if holder and link not in ("here", holder):
                self.client.set_tag(run.info.run_id, "winnow.files", holder)


def final_metrics(chain: Chain) -> dict[str, float]:
    """The few figures that MLflow's charts compare: of the ONNX file accuracy (or what the task has in its place, and its scores
    beside it) and error_percent = 100 (1 - accuracy), because the charts start at 0 and write two decimals; its accuracy on the
    validation split; precision_loss, what a precision below fp32 loses of the accuracy; macs, size_mb, parameters, and the latency
    (median, ms) and speed-up of each setting that was measured."""
    names = chain.names
    accuracy = chain.metric("export", f"test_{names.headline}")
    measured = {names.headline: accuracy, "error_percent": None if accuracy is None else 100 * (1 - accuracy)}
    measured |= {name: chain.metric("export", f"test_{name}") for name in names.beside}
    measured |= {f"validation_{names.headline}": chain.metric("export", f"validation_{names.headline}")}
    measured |= {"precision_loss": chain.metric("export", "loss")}
    measured |= {name: chain.metric("profile", name) for name in ("macs", "size_mb", "parameters")}
    for name, value in chain.records.get("profile", {}).get("metrics", {}).items():
        if name.startswith("latency_") and name.endswith("_p50_ms"):
            measured[name.replace("_p50_ms", "_ms")] = value
        elif name.startswith("speedup_") and "_ci_" not in name:
            measured[name] = value
    return {name: value for name, value in measured.items() if value is not None}


def _fingerprint(records: Iterable[Record], root: Path) -> str:
    """Hash of the records and of the files that are published with them."""
    records = list(records)
    sums = [[str(path.relative_to(root)), files.sha256(path)] for r in records for path in _uploads(root, r, models=True)]
    return hashlib.sha256(json.dumps([FORMAT, records, sums], sort_keys=True).encode()).hexdigest()


def _uploads(root: Path, record: Record, *, models: bool = False) -> list[Path]:
    """The files of a stage that are published; prepared data are not, and what takes pictures is logged as a model (`models` lists
    it too)."""
    if record["stage"] == "prepare":
        return []
    paths = [place(root, record) / name for name in record["artifacts"]]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is missing, which the record beside it names: run `dvc checkout`, or `dvc repro`")
    return [path for path in paths if models or path.name != PICTURES]


def _shipped(chain: Chain, root: Path) -> list[Path]:
    """The ONNX files of a chain."""
    record = chain.records.get("export")
    return [path for path in _uploads(root, record, models=True) if path.suffix == ".onnx"] if record else []


def _span(record: Record) -> tuple[int, int]:
    """When a stage began and ended, in milliseconds since 1970."""
    start = datetime.fromisoformat(record["started"]).timestamp()
    return round(start * 1000), round((start + record["seconds"]) * 1000)


def _color(index: int) -> str:
    """A colour in MLflow's charts that differs from those of its neighbours: hues a golden section apart."""
    parts = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.65, 0.5 + 0.1 * (index % 4))
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)

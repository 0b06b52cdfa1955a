"""Talking to MLflow: is the server there, one process at a time, quiet, patient for seconds and not for minutes."""

import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipeline.deployment import Tracking
from pipeline.errors import InputError

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
CHATTER = ("alembic", "mlflow")


class Unreachable(Exception):
    """No tracking server answers."""


@contextmanager
def session(uri: str, tracking: Tracking, root: Path) -> Iterator[tuple[Any, str]]:
    """An MlflowClient of `uri` and the id of the experiment, for one process at a time.

    A sqlite store is made where it is missing, with its artifacts in mlartifacts/ beside it. Raises `Unreachable` where the
    server does not answer, at first or later, and `InputError` where it refuses.
    """
    probe(uri, tracking.timeout_s)
    with _environment(tracking.timeout_s), _lock(uri, root):
        import mlflow
        import requests
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        levels = {name: logging.getLogger(name).level for name in CHATTER}
        before, variable = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
        try:
            for name in CHATTER:
                logging.getLogger(name).setLevel(logging.ERROR)
            _make_database(uri)
            mlflow.set_tracking_uri(uri)
            client = mlflow.MlflowClient(uri)
            yield client, _experiment(client, tracking.experiment, uri)
        except (MlflowException, requests.RequestException, SQLAlchemyError) as error:
            probe(uri, tracking.timeout_s)  # the server may have gone meanwhile
            raise InputError(f"MLflow at {shown(uri)} refuses: {' '.join(str(error).split())[:600]}") from error
        finally:
            mlflow.set_tracking_uri(before)  # which sets the variable too
            if variable is None:
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def probe(uri: str, timeout_s: int) -> None:
    """Ask for a sign of life, once: `Unreachable` after `timeout_s` seconds at most. A local file is always there."""
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    try:
        if scheme in ("http", "https"):
            import requests  # it honours the proxies of the environment

            answer = requests.get(f"{uri.rstrip('/')}/health", timeout=timeout_s)
            if answer.status_code in (502, 503, 504):
                raise Unreachable(f"the MLflow server at {shown(uri)} answers {answer.status_code}")
        elif parts.hostname and scheme in PORTS:
            socket.create_connection((parts.hostname, parts.port or PORTS[scheme]), timeout_s).close()
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError):
            raise InputError(f"MLFLOW_TRACKING_URI {shown(uri)} is no address: {error}") from None
        raise Unreachable(f"the MLflow server at {shown(uri)} does not answer") from None


def shown(uri: str) -> str:
    """The address without a user's name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment, made or restored where needed."""
    from mlflow.entities import ViewType

    found = client.get_experiment_by_name(name)
    if found is None:
        kind = {"mlflow.experimentKind": "custom_model_development"}  # so that the page asks nothing and shows charts
        database = _database(uri)
        place = (database.parent / "mlartifacts").as_uri() if database else None
        return client.create_experiment(name, artifact_location=place, tags=kind)
    if found.lifecycle_stage != ViewType.to_string(ViewType.ACTIVE_ONLY).removesuffix("_only"):
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _database(uri: str) -> Path | None:
    """The file of a sqlite store."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(found[1]).resolve() if found else None


def _make_database(uri: str) -> None:
    """Make a sqlite store that is missing beside its place, then rename it there: MLflow cannot go on with one half made."""
    database = _database(uri)
    if not database or database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = database.with_name(f".{database.name}.partial")
    for left in database.parent.glob(f"{partial.name}*"):
        left.unlink()
    store = SqlAlchemyStore(f"sqlite:///{partial}", (database.parent / "mlartifacts").as_uri())
    store.engine.dispose()
    partial.replace(database)


@contextmanager
def _lock(uri: str, root: Path) -> Iterator[None]:
    """Wait until no other process of this machine publishes: two that make or migrate one database break each other."""
    database = _database(uri)
    path = database.with_name(f"{database.name}.lock") if database else root / "mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a crash
        yield


@contextmanager
def _environment(timeout_s: int) -> Iterator[None]:
    """MLflow's settings while it is used; what the user set stays."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)

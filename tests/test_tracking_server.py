"""Tracking servers that do not answer, and addresses."""

import json
import socket
import time
from pathlib import Path

import pytest
import sample_records
import yaml

from pipeline import files, tracking_server
from pipeline.deployment import Tracking
from pipeline.errors import InputError
from pipeline.tracking import Unreachable, publish
from pipeline.tracking_server import shown


def silent_server() -> socket.socket:
    """Takes connections and never answers."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_closed_port_is_unreachable(scheme, tmp_path):
    with silent_server() as server:
        port = server.getsockname()[1]
    with pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
        publish([], tmp_path, Tracking(experiment="x", timeout_s=2), f"{scheme}://user:secret@127.0.0.1:{port}", {})


def test_a_server_that_never_answers_is_given_up_within_a_minute(tmp_path):
    start = time.monotonic()
    with silent_server() as server, pytest.raises(Unreachable, match="does not answer"):
        publish([], tmp_path, Tracking(experiment="x", timeout_s=1), f"http://127.0.0.1:{server.getsockname()[1]}", {})
    assert time.monotonic() - start < 60


def test_no_address_is_a_mistake_of_the_users(tmp_path):
    with pytest.raises(InputError, match="no address"):
        publish([], tmp_path, Tracking(experiment="x", timeout_s=1), "http://:99999", {})


def test_addresses_are_shown_without_passwords():
    assert shown("https://me:secret@host:5000/path") == "https://host:5000/path"
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_the_stage_ends_well_without_a_server_and_says_how_to_publish_later(tmp_path, monkeypatch, capsys):
    from stages import track

    sample_records.write(sample_records.grid((0,), ("finetune",), ("diet",)), tmp_path / "outputs")
    files.write_json(tmp_path / "outputs" / "champion" / "champion.json", {"champion": None, "reason": "no rule"})
    params = yaml.safe_load(Path("params.yaml").read_text()) | {"tracking": {"experiment": "winnow", "timeout_s": 2}}
    params |= {"variants": {"revive": ["finetune"], "compress": ["diet"]}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    with silent_server() as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    track.main()
    assert "not published; run `make track` when the server is back" in capsys.readouterr().out
    assert json.loads(Path("outputs/track/published.json").read_text())["published"] is False


def test_a_store_that_a_kill_left_half_made_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.partial").write_bytes(b"SQLite format 3\0 cut short")
    (tmp_path / ".mlflow.db.partial-journal").write_bytes(b"of a process that is dead")
    tracking = Tracking(experiment="winnow", timeout_s=5)
    with tracking_server.session(f"sqlite:///{tmp_path / 'mlflow.db'}", tracking, tmp_path) as (client, experiment_id):
        assert client.get_experiment(experiment_id).name == "winnow"
    assert not list(tmp_path.glob(".mlflow.db.partial*"))

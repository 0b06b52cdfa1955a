"""No stage: the champion of MLflow's registry, served by MLflow on this machine alone, for `make serve`."""

import os
import socket
import sys
from pathlib import Path

from pipeline import files
from pipeline.asking import address, body, champion, example, fit, form
from pipeline.errors import InputError
from stages import OUTPUTS, PREPARED, folder, run


def main() -> None:
    """Print the line that asks the server, and become the server."""
    published = files.read_json(folder("track") / "published.json")
    if not published["published"]:
        raise InputError(f"nothing was published to MLflow ({published['reason']}): `make track` publishes it")
    wanted = form(champion(OUTPUTS))
    if not published.get("champion"):
        raise InputError("the registered model has no champion yet: `make track` publishes it")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or published["uri"]  # the file holds no password
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(f"{uri} is gone: `make track` publishes again")
    server = address()
    host, port = server.removeprefix("http://").split(":")
    with socket.socket() as probe:
        if probe.connect_ex((host, int(port))) == 0:
            raise InputError(f"port {port} is taken: stop what listens there, or choose another one, WINNOW_PORT={int(port) + 1}")
    request = folder("serve") / "picture.json"
    files.write_bytes(request, body(fit(example(PREPARED)[0], wanted)[0]))
    name = f"models:/{published['model']}@champion"
    print(f"{name}, version {published['champion']}, at {server}; once it says that it runs:")
    chosen = f"WINNOW_PORT={port} " if "WINNOW_PORT" in os.environ else ""
    print(
        f"  {chosen}make ask PICTURE=file.png\n  curl {server}/invocations -H 'Content-Type: application/json' -d @{request}",
        flush=True,
    )
    os.environ |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    words = ["mlflow", "models", "serve", "--model-uri", name, "--env-manager", "local", "--host", host, "--port", port]
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # mlflow calls uvicorn
    os.execlp(words[0], *words)


if __name__ == "__main__":
    run(main)

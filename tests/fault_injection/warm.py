"""Stages in forks of one process that has imported what they need: a run costs no start-up.

python warm.py, in the project's folder, reads a line of JSON for each request, {"runs": [run, ...]}, with

words        the stage and its words           cwd     where it runs          log    what it says goes there
environment  variables to add                  fault   as sitecustomize's     fsize  bytes that a file may have, or null

learn        a file for the names of the modules that it imports, which are then imported here as well

starts all of them, each in a process group of its own, answers with a line of their process ids, and, when all have ended,
one of their exit codes, negative for a signal.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

import sitecustomize
import torch

import stages


def main() -> None:
    """Serve until the requests end."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        runs = json.loads(line)["runs"]
        started = [fork(run) for run in runs]
        print(json.dumps(started), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
        for name in (name for run in runs if run["learn"] for name in Path(run["learn"]).read_text().split()):
            with contextlib.suppress(Exception):  # not every module is meant to be imported by name
                importlib.import_module(name)
        print(json.dumps(codes), flush=True)


def fork(run: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(run["cwd"])
        handle = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for place, opened in ((0, nothing), (1, handle), (2, handle)):
            os.dup2(opened, place)
        os.environ.update(run["environment"])
        if run["fsize"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (run["fsize"], run["fsize"]))
        sys.stdin = open(0, closefd=False)
        known = set(sys.modules)
        code = call(run["words"], run["fault"])
        if run["learn"]:
            Path(run["learn"]).write_text("\n".join(name for name in list(sys.modules) if name not in known))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def call(words: list[str], fault: dict[str, Any] | None) -> int:
    sys.argv = [f"stages/{words[0]}.py", *words[1:]]
    if fault:
        sitecustomize.arm(fault)
    code = 0
    try:
        stages.run(importlib.import_module(f"stages.{words[0]}").main)
    except SystemExit as end:
        code = int(end.code or 0)
    last = getattr(sitecustomize.arm, "last", None)
    if last:
        last()
    return code


if __name__ == "__main__":
    main()

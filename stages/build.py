"""No stage: builds the chain with several stages at once, for `make JOBS=4`. A plain `dvc repro` ends it, and runs one by one those
that measure times and what follows from them."""

import re
import sys
from typing import Any

from pipeline.config import Runtime, lookup, parse, read_params
from pipeline.errors import InputError
from pipeline.gpu_sharing import places
from pipeline.side_by_side import Speech, ended_by_signals, run
from stages import OUTPUTS, guard

NOISE = "^$|^> |lock file '|^To (track|enable)|^\t(git add|dvc config)|^Use `dvc|didn't change, skipping|^Data and"
BUSY = "Unable to acquire lock|it is being blocked by"  # another `dvc` is at work
SPEECH = Speech(re.compile("^Running stage '(?:.*:)?([^']+)'"), re.compile(NOISE), re.compile(BUSY))


def main(jobs: str = "", *words: str) -> None:
    """As `dvc repro WORDS`, with up to `jobs` stages at once."""
    from dvc.cli import main as dvc
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from networkx import ancestors, descendants

    if not re.fullmatch("[1-9][0-9]*", jobs):
        raise InputError(f"JOBS = {jobs!r}: must be a whole number from 1 up")
    options, targets = [word for word in words if word[0] == "-"], [word for word in words if word[0] != "-"]
    try:
        repo = Repo(_wait_for_lock=True)
        with repo.lock:
            graph = repo.index.graph  # from a stage to those that it needs
            asked = [stage for target in targets or ["dvc.yaml"] for stage in repo.stage.collect(target)]
    except DvcException:
        sys.exit(dvc(["repro", *words]))  # says what is wrong
    params = read_params()
    alone = {stage for stage in graph if _measures(stage, params)}
    kept = set(asked).union(*(descendants(graph, stage) for stage in asked)) - alone.union(*(ancestors(graph, s) for s in alone))
    beside = {stage.addressing: stage for stage in kept}
    needs = {name: [other.addressing for other in graph.successors(stage)] for name, stage in beside.items()}
    start = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *options, "--single-item"]
    with ended_by_signals(), places(int(jobs), parse("runtime", lookup(params, "runtime"), Runtime)) as given:
        code = run(needs, lambda names: [*start, *names], given, OUTPUTS / "logs", lambda name: _changed(beside[name]), SPEECH)
    sys.exit(code or dvc(["repro", *words]))


def _measures(stage: Any, params: dict[str, Any]) -> bool:
    """Whether it looks at the machine or measures times, which others beside it would spoil."""
    used = [lookup(params, key) for chosen in stage.params for key in chosen.params]
    return stage.always_changed or stage.name.startswith("profile@") or "'of': 'latency'" in str(used)


def _changed(stage: Any) -> bool:
    """As far as it can be told without a process; what it needs is done."""
    return stage.changed_stage() or any(item.status() for item in (*stage.deps, *stage.outs))


if __name__ == "__main__":
    guard("stages.build", lambda: main(*sys.argv[1:]))

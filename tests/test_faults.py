"""A few faults of every kind that one process meets; `make faults` injects hundreds, of all kinds, over the whole chain."""

import subprocess
import sys
from pathlib import Path

KINDS = ("kill", "kill in a write", "kill before rename", "power cut", "disk full", "file too large", "read-only")
KINDS += ("damaged input", "damaged state", "twice at once", "clock")
STAGES = ("prepare", "train", "revive", "compress", "collapse")


def test_faults_lose_nothing_and_change_no_result(tmp_path: Path) -> None:
    words = ["--faults", "12", "--seed", "0", "--kinds", *KINDS, "--stages", *STAGES, "--end", "collapse"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words, "--workdir", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "work lost beyond the current epoch: 0\ncorrupt files accepted: 0\nwrong results: 0\n" in done.stdout

"""The lines of a training: in a log one an epoch and some within long ones; what is waited for, and what to do about it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from networks import randomise
from raw_data import image_folder, options
from test_training import fit, network, run_on
from torch import nn

from pipeline import progress as progress_module
from pipeline.data import stream
from pipeline.data.batches import Prepared, load
from pipeline.data.prepare import prepare
from pipeline.hooks import Hook, Run
from pipeline.training import train

Lines = Callable[[], list[str]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    return lambda: capsys.readouterr().out.splitlines()


def streamed(folder: Path, workers: int) -> Run:
    """Forty images of 12 x 12 pixels, decoded in this process; the line says that `workers` do."""
    prepare(options("folder", image_folder(folder / "raw", 40), image_size=12, storage="stream"), folder / "data")
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    run = run_on(load(folder / "data"), randomise(small), fit(epochs=2, batch_size=8))
    run.train.workers = workers
    return run


@pytest.mark.parametrize(("decode_s", "step_s", "low", "high"), [(0.005, 0.0, 0.5, 1.0), (0.0, 0.1, 0.0, 0.15)])
def test_the_line_of_an_epoch_says_how_long_was_waited_for_images(
    decode_s: float, step_s: float, low: float, high: float, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Hook):
        def after_step(self, run: Run) -> None:
            time.sleep(step_s)

    run, decode = streamed(tmp_path, 1), stream.decode
    monkeypatch.setattr(stream, "decode", lambda *of: (time.sleep(decode_s), decode(*of))[1])
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    lines()
    train(run, [Slow()])
    said = lines()
    for row, line in zip(run.history, (line for line in said if "epoch" in line), strict=True):
        assert low <= row["loader_share"] <= high
        assert f" images/s  waits {row['loader_share']:.0%} for images  " in line
    advice = (
        "test: the training waits for images, which 1 processes decode: raise runtime.workers, up to the 8 cores of this machine"
    )
    assert said.count(advice) == (low > 0.2)


def test_where_every_core_decodes_more_workers_are_no_advice(lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "LONG", -1.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    train(streamed(tmp_path, 4), [])
    said = "\n".join(lines())
    assert "which 4 processes decode on 4 cores: smaller image files, or data.storage: memory, would help" in said
    assert "raise" not in said


def test_of_images_in_memory_nothing_is_said(tiny: Prepared, lines: Lines) -> None:
    run = run_on(tiny, network(), fit(epochs=1))
    train(run, [])
    assert "loader_share" not in run.history[0] and "waits" not in lines()[0]


def test_long_epochs_have_lines_within_and_a_time_left(tiny: Prepared, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only steps move, 50 s each, a look at the loss every other step: 24 steps an epoch are 20 minutes."""
    clock = [0.0]

    class Slow(Hook):
        def after_step(self, run: Run) -> None:
            clock[0] += 50

    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("pipeline.training.CHECK_EVERY", 2)
    train(run_on(tiny, network(), fit(epochs=3, batch_size=8)), [Slow()])
    said = lines()
    within = [line.split() for line in said if "validation" not in line]
    assert [line.split()[2] for line in said if "validation" in line] == ["1/3", "2/3", "3/3"]
    assert [words[3] for words in within if words[2] == "1/3"] == ["12%", "29%", "46%", "62%", "79%", "96%"]
    for words in within:  # 8 images in 50 s; the rest of 3600 s
        epoch, share = int(words[2][0]) - 1, int(words[3][:-1]) / 100
        assert words[6:8] == ["0", "images/s"] and words[-1] == "left"
        left = float(words[-3]) * {"min": 60, "s": 1}[words[-2]]
        assert abs(left - 1200 * (3 - epoch - share)) < 40

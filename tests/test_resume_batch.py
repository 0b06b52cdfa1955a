"""A training that is killed within an epoch goes on at the batch, and ends bit for bit as an undisturbed one."""

import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import randomise
from raw_data import image_folder, options
from test_laws import COMPRESS, REVIVE, hook
from test_training import TEACHER, Killed, fit, outcome, run_on
from torch import Tensor, nn

from pipeline import chain, checkpoint
from pipeline import resume as resume_module
from pipeline.averaging import Averaging
from pipeline.config import Augment, Runtime
from pipeline.data import stream
from pipeline.data.batches import Batches, Prepared, load
from pipeline.data.prepare import prepare
from pipeline.distillation import Distillation
from pipeline.errors import InputError
from pipeline.hooks import Hook, Run
from pipeline.overparameterize import kflo, overparameterize
from pipeline.records import Record
from pipeline.resume import Resume, forget
from pipeline.training import train

BATCH = 32  # 6 steps an epoch
AUGMENT = {"pad": 0, "pad_mode": "zero", "flip": False, "scale": None}
AT_ONCE = 1e-9  # seconds between two saves: one after every step


class Killer(Hook):
    """Keeps which steps were done, and ends this attempt within the given one of its steps."""

    def __init__(self, done: list[tuple[int, int]], step: float = math.inf) -> None:
        self.done, self.step = done, step

    def penalty(self, run: Run, *tensors: Tensor) -> None:
        self.step -= 1
        if self.step < 0:
            raise Killed

    def after_step(self, run: Run) -> None:
        self.done.append((run.epoch, run.step))


def network(expand: bool, seed: int = 0) -> nn.Module:
    """With dropout, batch norms, and a 1x1 convolution, which learned groups need."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Dropout(0.3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return randomise(overparameterize(model, "kflo", width=2) if expand else model, seed)


class Loud(Hook):
    """Gradients beyond fp16's range until the scale has come down: a resumed run that began with the first one would skip steps."""

    def prepare(self, run: Run) -> None:
        run.model.get_parameter("12.weight").data.mul_(1000)


UNEXPANDED = ("lgc", "torch_pruning")
METHODS = [("revive", name) for name in REVIVE] + [("compress", name) for name in COMPRESS if name != "torch_pruning"]
# Hooks, changes of the fit, expanded or not.
CASES: dict[str, tuple[Callable[[], list[Hook]], dict[str, Any], bool]] = {
    name: (lambda family=family, name=name: [hook(family, name)], {}, name not in UNEXPANDED) for family, name in METHODS
}
CASES |= {
    "adam, a moving average": (lambda: [Averaging(0.9)], {"optimizer": "adam", "lr": 0.01, "select": "best"}, False),
    "fp16": (lambda: [Loud()], {"precision": "fp16", "label_smoothing": 0.1}, False),
    "a teacher": (lambda: [Distillation(TEACHER), hook("compress", "diet")], {"schedule": "constant"}, True),
}


def attempt(data: Prepared, case: str, resume: Resume | None, killer: Killer) -> Run | None:
    """One process: everything made anew. None where it was killed."""
    make, changes, expand = CASES[case]
    run = run_on(data, network(expand), fit(**{"epochs": 3, "batch_size": BATCH} | changes))
    run.fresh = (lambda number: network(expand, number)) if case == "grafting" else None
    torch.manual_seed(torch.seed())
    try:
        train(run, [*([kflo.Hook()] if expand else []), *make(), killer], resume)
    except Killed:
        return None
    return run


@pytest.mark.parametrize("case", CASES)
def test_a_training_killed_within_epochs_does_no_step_twice_and_ends_bit_for_bit(case: str, tiny: Prepared, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    undisturbed = attempt(tiny, case, None, Killer(steps))
    assert undisturbed is not None and steps[:7] == [*((0, step) for step in range(6)), (1, 0)]
    draw, done, kills = random.Random(case), list[tuple[int, int]](), 0
    while True:  # each as another process would
        resume = Resume(tmp_path, "test-0", "0" * 16, AT_ONCE)
        run = attempt(tiny, case, resume, Killer(done, draw.randint(1, 5)))
        if run is not None:
            break
        kills += 1
        assert kills < 20, "it does not go on"
    assert done == steps and kills >= 3
    assert outcome(run) == outcome(undisturbed)


@pytest.mark.parametrize(("step_s", "saves"), [(7.0, 10), (100.0, 94), (0.1, 0)])
def test_within_an_epoch_the_state_is_kept_as_often_as_asked(
    step_s: float, saves: int, tiny: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save is due after 60 s, of a clock that only steps move."""
    clock, kept = [1000.0], [(0, 1000.0)]

    class Slow(Hook):
        def after_step(self, run: Run) -> None:
            clock[0] += step_s

    def save(run: Run, hooks: Any) -> None:
        whole(run, hooks)
        kept.append((run.step, clock[0]))

    monkeypatch.setattr(resume_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    resume = Resume(tmp_path, "test-0", "0" * 16, 60.0)
    whole, resume.save = resume.save, save  # type: ignore[method-assign]
    train(run_on(tiny, network(False), fit(epochs=2, batch_size=4)), [Slow()], resume)  # 48 steps an epoch
    gaps = [after - before for (_, before), (_, after) in zip(kept, kept[1:], strict=False)]
    assert not saves or max(gaps) < 60 + step_s
    assert sum(step > 0 for step, _ in kept) == saves


def test_streamed_images_that_were_trained_on_are_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"image_size": 12, "storage": "stream", "validation": 0.25}
    prepare(options("folder", image_folder(tmp_path / "raw", 40), **changes), tmp_path / "prepared")
    data, decode, read = load(tmp_path / "prepared"), stream.decode, list[Path]()

    def network() -> nn.Module:
        return randomise(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        )

    def attempt(resume: Resume | None, steps: float = math.inf) -> tuple[Run, list[Path]]:
        """The run and the files that it read."""
        read.clear()
        run = run_on(data, network(), fit(epochs=1, batch_size=5))
        with contextlib.suppress(Killed):
            train(run, [Killer([], steps)], resume)
        return run, list(read)

    monkeypatch.setattr(stream, "decode", lambda path, *of: (read.append(path), decode(path, *of))[1])
    undisturbed, files = attempt(None)
    resume = Resume(tmp_path, "test-0", "0" * 16, AT_ONCE)
    _, before = attempt(resume, 3)
    resumed, after = attempt(resume)
    assert before == files[:20]  # three batches, and the one of the step that was killed
    assert after == files[15:] and len(files) == data.counts["train"] // 5 * 5 + data.counts["validation"]
    assert outcome(resumed) == outcome(undisturbed)


def test_epochs_begin_at_any_batch(tiny: Prepared) -> None:
    batches = Batches(tiny, "train", 20, "cpu", None, True, 0)
    whole = list(batches.epoch(2))
    for start in (0, 1, 8, 9):
        rest = list(batches.epoch(2, start=start))
        assert len(rest) == len(whole) - start
        for (images, labels), (found, kinds) in zip(whole[start:], rest, strict=True):
            assert torch.equal(images, found) and torch.equal(labels, kinds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_a_killed_training_draws_the_same_dropout(tiny: Prepared, tmp_path: Path) -> None:
    def attempt(resume: Resume | None, steps: float = math.inf) -> Run:
        run = run_on(tiny, network(False), fit(epochs=2, batch_size=BATCH))
        batches = [Batches(tiny, split, BATCH, "cuda", None, split == "train", 0) for split in ("train", "validation")]
        run.device, run.train, run.validation = torch.device("cuda"), *batches
        with contextlib.suppress(Killed):
            train(run, [Killer([], steps)], resume)
        return run

    undisturbed = attempt(None)
    for steps in (2, 1, 3, math.inf):
        resumed = attempt(Resume(tmp_path, "test-0", "0" * 16, AT_ONCE), steps)
    for one, other in zip(undisturbed.history, resumed.history, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)


def test_more_workers_and_other_saves_go_on_with_an_unfinished_training(
    tiny: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(steps: float, **changes: Any) -> str:
        """What a stage says."""
        runtime = {"device": "cpu", "threads": 1, "workers": 0, "processes": 1, "hosts": 1, "save_s": AT_ONCE, "launch": "eager"}
        chosen = Runtime.model_validate(runtime | changes)
        where = chain.Setting(tiny, Augment.model_validate(AUGMENT), chosen, torch.device("cpu"), tmp_path / "resume")
        card = checkpoint.new_card({"name": "cifar_quick", "arguments": {}}, tiny)
        record = Record("train", "0", {"runtime": chosen.model_dump()}, seed=0)
        torch.manual_seed(0)
        with contextlib.suppress(Killed):
            hooks = [Killer([], steps)]
            chain.train_stage(where, record, checkpoint.build(card), card, fit=fit(epochs=1), hooks=hooks, out=tmp_path / "out")
        return capsys.readouterr().out

    attempt(1)
    assert "goes on after epoch 0 of 1 and step 1 of 3" in attempt(1, workers=3, save_s=1e-8)
    assert "goes on" not in attempt(1, threads=2)
    assert "goes on after epoch 0 of 1 and step 2 of 3" in attempt(9)
    assert len(list((tmp_path / "resume").glob("train-0-*"))) == 1  # not that of two threads
    forget(tmp_path / "resume", "train-0")
    assert not list((tmp_path / "resume").iterdir())


def test_the_state_of_another_width_is_removed_and_said(tiny: Prepared, tmp_path: Path) -> None:
    """As after a kill where a target of latency is met by other widths than the first time."""

    def attempt(width: int) -> None:
        model = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
        train(run_on(tiny, model, fit(epochs=2)), [Killer([], 4 if width == 4 else math.inf)], resume())

    def resume() -> Resume:
        return Resume(tmp_path, "compress-a", "0" * 16)

    with pytest.raises(Killed):
        attempt(4)
    assert resume().path.exists()
    with pytest.raises(InputError, match="other widths than what was chosen now; it is removed"):
        attempt(5)
    assert not resume().path.exists()
    attempt(5)


@pytest.mark.parametrize(("device", "side", "batch"), [("cpu", 16, 256), ("cuda", 16, 1024), ("cuda", 65, 256)])
def test_small_images_are_evaluated_in_large_batches_on_a_gpu(
    device: str, side: int, batch: int, tiny: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain.Setting, "batches", lambda own, split, size: (split, size))
    data = replace(tiny, shape=(1, side, side))
    where = chain.Setting(data, Augment.model_validate(AUGMENT), None, torch.device(device), tmp_path)  # type: ignore[arg-type]
    assert where.evaluated("test") == ("test", batch)

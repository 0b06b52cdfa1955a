"""The ways to launch a step: a captured one takes the same steps, and is captured anew exactly where it would be stale."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FIT
from networks import randomise
from test_laws import COMPRESS, REVIVE, hook
from torch import Tensor, nn

from pipeline import step
from pipeline.averaging import Averaging
from pipeline.config import Fit, Runtime, parse
from pipeline.data.batches import Batches, Prepared
from pipeline.errors import InputError
from pipeline.hooks import Hook, Run
from pipeline.overparameterize import kflo, overparameterize
from pipeline.training import train

RUNTIME = {"device": "auto", "threads": 1, "workers": 0, "processes": 1, "hosts": 1, "save_s": 60.0, "launch": "graph"}
UNEXPANDED = ("lgc", "torch_pruning")
METHODS = [("revive", name) for name in REVIVE] + [("compress", name) for name in COMPRESS if name != "torch_pruning"]
BATCH = 64  # 3 steps an epoch


def make_run(data: Prepared, device: str = "cpu", method: str = "", **changes: Any) -> Run:
    """Three convolutions on the first digits, over-parameterised where the method takes that."""

    def draw(number: int) -> nn.Module:
        model = nn.Sequential()
        for name, inputs, outputs, size in (("1", data.shape[0], 8, 3), ("2", 8, 16, 1), ("3", 16, 16, 3)):
            model.add_module(f"conv{name}", nn.Conv2d(inputs, outputs, size, stride=1 if size == 1 else 2, bias=False))
            model.add_module(f"bn{name}", nn.BatchNorm2d(outputs))
            model.add_module(f"relu{name}", nn.ReLU())
        for name, module in (("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(16, 10))):
            model.add_module(name, module)
        return randomise(overparameterize(model, "kflo", depth=2, width=2) if method not in UNEXPANDED else model, number)

    fit = Fit.model_validate(FIT | {"epochs": 4, "batch_size": BATCH, "lr": 0.02} | changes)
    fresh = draw if method == "grafting" else None
    batches = [Batches(data, split, BATCH, device, None, split == "train", 0) for split in ("train", "validation")]
    return Run(draw(0), fit, *batches, seed=0, device=torch.device(device), fresh=fresh)


def trained(run: Run, launch: Any, *hooks: Hook) -> dict[str, Tensor]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    return train(run, [kflo.Hook(), Averaging(0.9), *hooks], launch=launch).state_dict()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a step is captured. Steps launched again from Python stand for a replayed graph: the same reads and writes."""
    counted = []

    def capture(launch: Callable[[], None], stream: object) -> Callable[[], None]:
        counted.append(1)
        return launch

    monkeypatch.setattr(step, "capture", capture)
    monkeypatch.setattr(step, "beside", lambda launch, stream: launch())
    monkeypatch.setattr(step, "WARM_UP", 1)
    return counted


@pytest.mark.parametrize(("family", "name"), METHODS)
def test_captured_steps_are_the_same_steps(family: str, name: str, tiny: Prepared, captures: list[int]) -> None:
    one = trained(make_run(tiny, method=name), "eager", hook(family, name))
    assert not captures
    other = trained(make_run(tiny, method=name), "graph", hook(family, name))
    assert bool(captures) is (name != "grafting") and one.keys() == other.keys()  # whose networks take batches of their own
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


class Replaces(Hook):
    """After the second epoch other tensors hold the same values: of a weight, a running mean or a momentum."""

    def __init__(self, what: str) -> None:
        self.what = what

    def after_epoch(self, run: Run) -> bool:
        layer = run.model.get_submodule("bn1")
        assert isinstance(layer, nn.BatchNorm2d) and run.optimizer is not None
        if run.epoch == 2 and self.what == "weight":
            layer.weight.data = layer.weight.data.clone()
        elif run.epoch == 2 and self.what == "running mean":
            layer.running_mean = layer.running_mean.clone()  # type: ignore[union-attr]
        elif run.epoch == 2 and self.what == "momentum":
            state = run.optimizer.state[layer.weight]
            state["momentum_buffer"] = state["momentum_buffer"].clone()
        elif run.epoch == 2 and self.what == "an edit":
            run.log("edit")
        elif run.epoch == 2 and self.what == "values":
            layer.weight.data.mul_(1)
        return False


@pytest.mark.parametrize(("what", "times"), [("values", 1), ("an edit", 2), ("weight", 2), ("running mean", 2), ("momentum", 2)])
def test_a_step_is_captured_anew_where_a_tensor_is_another_one(what: str, times: int, tiny: Prepared, captures: list[int]) -> None:
    trained(make_run(tiny), "graph", Replaces(what))
    assert len(captures) == times


class Changes(Hook):
    """A penalty that ends in the sixth step; what it reads is said or not."""

    def __init__(self, said: Any) -> None:
        self.said, self.steps = said, 0

    def penalty(self, run: Run, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        return logits.float().square().mean() if self.steps < 6 else None

    def penalty_reads(self, run: Run) -> Any:
        return self.said(self)

    def after_step(self, run: Run) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    ("said", "times"), [(lambda own: own.steps < 6, 2), (lambda own: None, 0)], ids=["what it reads", "that it cannot be captured"]
)
def test_a_penalty_says_when_a_step_must_be_captured_anew(
    said: Callable[[Changes], Any], times: int, tiny: Prepared, captures: list[int]
) -> None:
    one = trained(make_run(tiny), "eager", Changes(said))
    other = trained(make_run(tiny), "graph", Changes(said))
    assert len(captures) == times
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fp16_trains_as_fp32(optimizer: str, tiny: Prepared) -> None:
    run, plain = (make_run(tiny, precision=precision, optimizer=optimizer, lr=0.01) for precision in ("fp16", "fp32"))
    trained(run, "eager")
    trained(plain, "eager")
    assert run.scaler is not None and plain.scaler is None
    for one, other in zip(run.history, plain.history, strict=True):
        assert abs(one["train_loss"] - other["train_loss"]) < 0.01
    assert one["train_loss"] < run.history[0]["train_loss"] - 0.2


def test_an_overflow_in_the_first_step_leaves_no_undefined_momentum(tiny: Prepared) -> None:
    """Of a loss that is scaled by 2^16, gradients beyond fp16's range: the first steps are skipped."""
    run = make_run(tiny, precision="fp16", epochs=1)
    nn.init.constant_(run.model.get_parameter("bn3.weight"), 1e4)
    trained(run, "eager")
    assert run.optimizer is not None and run.scaler is not None and run.scaler.get_scale() < 2**16
    assert all(state["momentum_buffer"].isfinite().all() for state in run.optimizer.state.values())


@pytest.mark.parametrize(
    "changes", [{"device": "cpu"}, {"device": "cuda", "processes": 2}, {"device": "auto", "hosts": 2}], ids=str
)
def test_a_graph_needs_one_process_on_a_gpu(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"runtime.*launch must be eager or compile"):
        parse("runtime", RUNTIME | changes, Runtime)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's own
@pytest.mark.parametrize(("family", "name"), [("revive", "restart"), ("compress", "slimming"), ("compress", "lgc")])
def test_compiled_networks_train_as_launched_ones(family: str, name: str, tiny: Prepared) -> None:
    one, other = make_run(tiny, method=name), make_run(tiny, method=name)
    trained(one, "eager", hook(family, name))
    trained(other, "compile", hook(family, name))
    for before, after in zip(one.history, other.history, strict=True):
        assert abs(before["train_loss"] - after["train_loss"]) <= 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("family", "name"), METHODS)
@pytest.mark.parametrize("launch", ["graph", "compile"])
def test_on_cuda_graphs_and_compiled_networks_train_as_launched_ones(family: str, name: str, launch: str, tiny: Prepared) -> None:
    one = make_run(tiny, "cuda", name)
    other = make_run(tiny, "cuda", name)
    trained(one, "eager", hook(family, name))
    trained(other, launch, hook(family, name))
    for before, after in zip(one.history[:2], other.history[:2], strict=True):  # later ones part by chance, from rounding
        assert abs(before["train_loss"] - after["train_loss"]) <= 0.01 * before["train_loss"]

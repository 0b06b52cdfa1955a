"""Selective convolution with re-allocation, in training: functions preserved, slots always open, exact resumption, deployment."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import test_training
import torch
from networks import difference, randomise
from test_redirect import sampled
from test_selective import options
from test_training import Killer, attempt, fit, outcome, run_on
from torch import Tensor, nn

from pipeline import checkpoint, models
from pipeline.certificate import certify
from pipeline.compress.selective import SHIFT_DECAY, Options, Selective, create
from pipeline.data.batches import Prepared
from pipeline.errors import InputError
from pipeline.export import export
from pipeline.hooks import Hook, Run
from pipeline.inference import open_session
from pipeline.layers import insert
from pipeline.overparameterize import collapse, kflo, overparameterize
from pipeline.redirect import Redirect
from pipeline.resume import Resume
from pipeline.selection import close
from pipeline.training import train

SHAPE = (1, 16, 16)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "densenet": {"depth": 10, "growth": 8, "compression": 0.5, "stem": "tiny"},
    "resnet_preact": {"depth": 11, "stem": "tiny"},
    "resnext": {"depth": 11, "cardinality": 2, "width": 2, "stem": "tiny"},
}


def network(name: str = "densenet", expand: bool = False) -> nn.Module:
    model = models.build(name, input_shape=SHAPE, classes=10, **ARGUMENTS[name])
    return randomise(overparameterize(model, "kflo", depth=2, width=1.5) if expand else model)


def realloc(**changes: Any) -> Options:
    return options(gamma=0.5, until=0.9, realloc={"1x1": 3}, **changes)


def ready(run: Run, chosen: Options) -> Selective:
    hook = Selective(chosen)
    hook.coverage(run.model, run.input_shape)
    hook.prepare(run)
    run.model.eval()
    return hook


def parts(hook: Selective, model: nn.Module, name: str) -> tuple[Any, Any, Any]:
    """The convolution of a unit, its batch norm, and the pointers in front of that."""
    norm: Any = model.get_submodule(hook.units[name].norm or "")
    return model.get_submodule(name), norm, getattr(norm, "distribute", None)


@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
def test_slots_are_filled_again_without_a_change_of_any_output(make_run: Any, expand: bool) -> None:
    run = make_run(network(expand=expand))
    hook, x = ready(run, realloc()), torch.randn(16, *SHAPE)
    identities = {name: id(parameter) for name, parameter in run.model.named_parameters()}
    for epoch in range(4):
        run.epoch = epoch
        old = copy.deepcopy(run.model)
        hook.rewire(run, 1.0)
        closed = copy.deepcopy(old)  # what deallocation alone leaves: zeros where slots were filled
        for name in hook.names:
            layer, norm, distribute = parts(hook, run.model, name)
            gate = layer.gate.open
            row = next(row for row in run.events[-1]["layers"] if row["name"] == name)
            if name not in hook.sources:
                closed.get_submodule(name).gate.open.copy_(gate)  # type: ignore[union-attr,operator]
                assert not (gate > old.get_submodule(name).gate.open).any()  # type: ignore[union-attr,operator]
                continue
            columns = layer.weight.detach().abs().amax((0, 2, 3))
            filled = columns < 1e-6
            assert gate.all() and row["reopened"] == int(filled.sum()) > 0
            assert row["redirected"] == int((distribute.pointer >= 0).sum())
            closed.get_submodule(name).gate.open.copy_((~filled).float())  # type: ignore[union-attr,operator]
            _check_copies(parts(hook, old, name), (layer, norm, distribute), filled)
        wanted, found = closed(x), run.model(x)
        assert torch.equal(found, wanted) if not expand else (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert identities == {name: id(parameter) for name, parameter in run.model.named_parameters()}


def _check_copies(before: tuple[Any, Any, Any], after: tuple[Any, Any, Any], filled: Tensor) -> None:
    """Every filled slot reads what an open one read, and has its normalisation."""
    width = len(filled)
    reads = [d.pointer.where(d.pointer >= 0, torch.arange(width)) for _, _, d in (before, after)]
    state = lambda norm, i: (norm.weight[i], norm.bias[i], norm.running_mean[i], norm.running_var[i])  # noqa: E731
    open_before = [i for i in range(width) if not filled[i]]
    for slot in filled.nonzero().flatten().tolist():
        fits = [i for i in open_before if reads[0][i] == reads[1][slot] and state(before[1], i) == state(after[1], slot)]
        assert fits, "copied from no open slot"
        assert after[2].shift[slot].abs().max() <= 1.5 and after[2].pointer[slot] >= 0
    assert torch.equal(reads[0][~filled], reads[1][~filled])


def test_a_closed_slot_reads_no_other_channel_any_more(make_run: Any) -> None:
    run = make_run(network())
    hook = ready(run, realloc())
    hook.rewire(run, 1.0)
    name = next(iter(hook.sources))
    layer, _, distribute = parts(hook, run.model, name)
    closed = torch.zeros(layer.in_channels, dtype=torch.bool).index_fill(0, distribute.redirected()[:1], True)
    before = distribute.pointer.clone()
    close(run.model, hook.units[name], closed)
    assert layer.gate.open.tolist() == (~closed).float().tolist()
    assert torch.equal(distribute.pointer, before.masked_fill(closed, -1)) and not torch.equal(distribute.pointer, before)


def test_gates_pointers_and_shifts_get_gradients_only_where_they_act(make_run: Any) -> None:
    run = make_run(network())
    hook = ready(run, realloc())
    hook.rewire(run, 1.0)
    run.model.train()(torch.randn(8, *SHAPE)).square().sum().backward()
    for name in hook.sources:
        layer, _, distribute = parts(hook, run.model, name)
        used = distribute.pointer >= 0
        assert (layer.weight.grad[:, used] != 0).any(0).any()  # the zero column learns
        assert used.any() and (distribute.shift.grad[~used] == 0).all()
        assert (distribute.shift.grad[used] == 0).all()  # through a column of zeros nothing comes back yet
    with torch.no_grad():
        for name in hook.sources:
            run.model.get_submodule(name).weight.normal_()  # type: ignore[union-attr,operator]
    run.model.zero_grad()
    run.model(torch.randn(8, *SHAPE)).square().sum().backward()
    for name in hook.sources:
        _, _, distribute = parts(hook, run.model, name)
        used = distribute.pointer >= 0
        assert (distribute.shift.grad[used] != 0).any() and (distribute.shift.grad[~used] == 0).all()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
def test_the_optimiser_forgets_what_it_knew_of_filled_slots_where_asked(make_run: Any, reset: bool, expand: bool) -> None:
    run = make_run(network(expand=expand))
    hook = ready(run, realloc(reset_momentum=reset))
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.0, momentum=0.9)
    hook.rewire(run, 1.0)
    run.model.train()(torch.randn(8, *SHAPE)).square().sum().backward()
    run.optimizer.step()
    before = {p: state["momentum_buffer"].clone() for p, state in run.optimizer.state.items()}
    run.epoch = 1
    hook.rewire(run, 1.0)
    for name in hook.sources:
        layer, norm, distribute = parts(hook, run.model, name)
        filled = layer.weight.detach().abs().amax((0, 2, 3)) < 1e-6
        for parameter in (norm.weight, norm.bias, distribute.shift):
            old, new = before[parameter], run.optimizer.state[parameter]["momentum_buffer"]
            assert torch.equal(new, old.masked_fill(filled.reshape(-1, *[1] * (old.ndim - 1)), 0) if reset else old)
        kernel = layer.parametrizations.weight.original if expand else layer.weight
        old, new = before[kernel], run.optimizer.state[kernel]["momentum_buffer"]
        if expand:
            compose = layer.parametrizations.weight[0]
            assert torch.equal(old, new) is not reset and (not reset or compose(new)[:, filled].abs().max() < 1e-5)
        else:
            assert torch.equal(new, old.masked_fill(filled[:, None, None], 0) if reset else old)


def test_shifts_have_a_weight_decay_of_their_own_and_the_schedules_rate(tiny: Prepared) -> None:
    run, hook = run_on(tiny, network(), fit(weight_decay=0.01, epochs=1)), create(realloc())
    train(run, [hook])
    assert run.optimizer is not None
    groups = {(group["weight_decay"], group["lr_scale"]): len(group["params"]) for group in run.optimizer.param_groups}
    assert groups[(SHIFT_DECAY, 1.0)] == len(hook.sources) == 5 and set(groups) == {(SHIFT_DECAY, 1.0), (0.01, 1.0)}  # type: ignore[attr-defined]


class Before(Hook):
    """Keeps the network with its gates and pointers as it is when training ends."""

    def finish(self, run: Run) -> None:
        self.model = copy.deepcopy(run.model).eval()


def trained(data: Prepared, name: str, expand: bool, chosen: Options) -> tuple[nn.Module, nn.Module, Run]:
    run, before = run_on(data, network(name, expand), fit(epochs=3, lr=0.02)), Before()
    result = train(run, [*([kflo.Hook()] if expand else []), before, create(chosen)])
    return before.model, result, run


@pytest.mark.parametrize(("name", "expand"), [("densenet", True), ("resnet_preact", False), ("resnext", False)])
def test_the_deployed_network_is_the_trained_one(name: str, expand: bool, tiny: Prepared, tmp_path: Path) -> None:
    """Slots redirected by K = 3 in 1x1 convolutions, channels cut by K = 0 in the others, batch norms left as they are."""
    prune_too = name != "resnext"
    chosen = realloc() if prune_too else realloc(max_pointers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.compress.selective.settle_batchnorm", lambda _: None)
        before, result, run = trained(tiny, name, expand, chosen)
    surgery = next(event for event in run.events if event["kind"] == "surgery")
    redirected = [count for count in surgery["redirected"].values() if count]
    assert len(redirected) > 2 and bool(surgery["removed"]) is prune_too
    assert not prune_too or any(surgery["removed"].values())
    assert not any("gate" in key or "distribute" in key for key in result.state_dict())
    assert not any(module._forward_pre_hooks for module in result.modules())
    assert any("distribute.shift" in key for key in before.state_dict())
    assert difference(before, result, SHAPE, images=16) < 1e-5
    merged = collapse(copy.deepcopy(result))
    assert certify(result, merged, run.validation)["top1_agreement"] == 1.0
    card = checkpoint.new_card({"name": name, "arguments": ARGUMENTS[name]}, tiny)
    checkpoint.save(tmp_path / "model", merged, card)
    loaded, _ = checkpoint.load(tmp_path / "model")
    assert difference(merged, loaded, SHAPE) < 1e-6  # but for the memory order of kernels
    if expand:
        card["expansion"] = {"method": "kflo", "arguments": {"depth": 2, "width": 1.5, "l2_factor": 1.0, "mixer_decay": 1e-9}}
        checkpoint.save(tmp_path / "expanded", result, card)
        assert difference(result, checkpoint.load(tmp_path / "expanded")[0], SHAPE) < 1e-6
    assert sum(isinstance(module, Redirect) for module in loaded.modules()) == len(redirected)
    if name == "densenet":
        export(loaded, {**card, "channels": None}, path := tmp_path / "model.onnx", 20)
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        assert not kinds & {"GridSample", "ScatterElements", "ScatterND", "NonZero", "MatMul", "Where"}, kinds
        x = torch.randn(5, *SHAPE)
        (found,) = open_session(path, "cpu", 1).run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), before(x), rtol=1e-4, atol=1e-4)


def test_the_sampler_in_the_network_is_torchs(make_run: Any) -> None:
    run = make_run(network())
    hook = ready(run, realloc())
    hook.rewire(run, 1.0)
    name = next(iter(hook.sources))
    _, norm, distribute = parts(hook, run.model, name)
    slots, x = distribute.redirected(), torch.randn(2, norm.num_features, 5, 7)
    wanted = x.index_copy(1, slots, sampled(x[:, distribute.pointer[slots]], distribute.shift[slots]))
    torch.testing.assert_close(norm(x), nn.BatchNorm2d.forward(norm, wanted), rtol=0, atol=1e-5)


def test_units_that_re_allocate_never_get_smaller_and_without_it_nothing_is_opened(tiny: Prepared) -> None:
    _, result, run = trained(tiny, "densenet", False, realloc())
    opened: dict[str, list[int]] = {}
    for event in run.events[:-2]:
        for row in event["layers"]:
            opened.setdefault(row["name"], []).append(row["open"])
            assert not row["name"].endswith("conv1") or row["open"] == row["inputs"]
    assert all(counts == sorted(counts, reverse=True) and len(counts) == 2 for counts in opened.values())
    widths = {name: layer.in_channels for name, layer in result.named_modules() if isinstance(layer, nn.Conv2d)}
    whole = {name: layer.in_channels for name, layer in network().named_modules() if isinstance(layer, nn.Conv2d)}
    assert all(widths[name] == width for name, width in whole.items() if name.endswith("conv1"))


def test_a_network_that_only_re_allocates_keeps_its_batch_norms_and_its_size(tiny: Prepared) -> None:
    before, result, run = trained(tiny, "resnext", False, realloc())
    assert [event["kind"] for event in run.events] == ["dealloc", "dealloc", "surgery"]
    counts = [sum(p.numel() for name, p in model.named_parameters() if "distribute" not in name) for model in (before, result)]
    assert counts[0] == counts[1] and difference(before, result, SHAPE) < 1e-5


CASES: dict[str, tuple[Callable[[], list[Hook]], dict[str, Any], bool]] = {
    "realloc": (lambda: [create(realloc(max_pointers=4))], {"select": "best"}, False),
    "realloc of kflo": (lambda: [kflo.Hook(), create(realloc(reset_momentum=True, compensate=True))], {"nesterov": True}, True),
    "target": (
        lambda: [create(options(gamma=None, until=0.9, multiple=2, target={"of": "params", "fraction": 0.7}))],
        {"optimizer": "adam", "lr": 0.003},
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_bit_for_bit_as_an_undisturbed_one(
    case: str, tiny: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(test_training.CASES, case, CASES[case])
    monkeypatch.setattr(test_training, "network", lambda expand: network(expand=expand))
    expected = attempt(tiny, case, None, Killer())
    assert expected is not None
    resume, attempts = Resume(tmp_path, "selective", "0" * 16), 0
    while (run := attempt(tiny, case, resume, Killer(step=5))) is None:
        attempts += 1
    assert attempts == 3 and outcome(run) == outcome(expected)


def test_what_is_redirected_already_is_only_closed_and_several_networks_at_once_are_refused(make_run: Any) -> None:
    model = network()
    there = torch.arange(4)
    insert(
        model, "features.denseblock1.denselayer1.norm1", "redirect", Redirect(torch.arange(16), there[:0], torch.zeros(0, 1, 3, 3))
    )
    hook = Selective(realloc())
    notes = hook.coverage(model, SHAPE)
    assert "features.denseblock1.denselayer1.conv1" in hook.names and len(hook.sources) == 4
    assert any("closes channels of features.denseblock1.denselayer1.conv1 for good" in note for note in notes)
    run = make_run(network())
    run.own = run.model
    with pytest.raises(InputError, match="several networks at once"):
        hook.prepare(run)

"""Learned group convolution against the loops of CondenseNet's code, its published counts, and the masked network."""

import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FIT
from torch import Tensor, nn
from torch.func import functional_call

from pipeline import checkpoint, models
from pipeline.compress.lgc import LearnedGroups, Options, condense, convert, create, group_lasso, masked, narrow
from pipeline.data.batches import Prepared
from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.hooks import Hook, Run
from pipeline.layers import ChannelSelect, insert
from pipeline.measure import count
from pipeline.overparameterize import overparameterize
from pipeline.resume import Resume
from pipeline.training import train

SMALL = {"depth": 8, "growth": 8, "groups": 4, "dropout": 0.0}


def options(**changes: Any) -> Options:
    usual = {
        "method": "lgc",
        "groups": 4,
        "until": 0.5,
        "lasso": 0.0,
        "linear": 1.0,
        "distill": None,
        "sensitivity": None,
        "fit": FIT,
    }
    return Options.model_validate(usual | changes)


def network(seed: int = 0, shape: tuple[int, int, int] = (1, 16, 16), **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("condensenet", input_shape=shape, classes=10, **SMALL | changes)


def scan(weight: Tensor, groups: int, drops: int) -> list[set[int]]:
    """What each group keeps after some drops of I/G inputs, channel by channel."""
    outputs, inputs = weight.shape[:2]
    kept = [{*range(inputs)} for _ in range(groups)]
    for _ in range(drops):
        for group in range(groups):
            size = {i: sum(abs(float(weight[o, i])) for o in range(group, outputs, groups)) for i in kept[group]}
            kept[group] -= {*sorted(size, key=lambda i: size[i])[: inputs // groups]}  # noqa: B023  # used at once
    return kept


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(4, 12, 8), (2, 6, 10), (3, 9, 3), (4, 4, 4)])
def test_each_group_drops_the_inputs_that_its_outputs_weigh_least(groups: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight, kept = torch.randn(outputs, inputs, 1, 1), torch.ones(groups, inputs, dtype=torch.bool)
    for drops in range(1, groups):
        kept = condense(weight, kept, inputs // groups)
        assert [{*row.nonzero().flatten().tolist()} for row in kept] == scan(weight, groups, drops)
        zeroed = masked(weight, kept)
        for o in range(outputs):
            for i in range(inputs):
                assert float(zeroed[o, i]) == (float(weight[o, i]) if bool(kept[o % groups, i]) else 0.0)
    assert (kept.sum(1) == inputs // groups).all()


def test_a_dropped_input_stays_dropped_and_ties_go_by_index() -> None:
    weight, kept = torch.zeros(4, 4, 1, 1), torch.tensor([[True, False, True, True], [True, True, True, True]])
    assert condense(weight, kept, 1).tolist() == [[False, False, True, True], [False, True, True, True]]


def condensed(layer: Any, groups: int) -> Tensor:
    """A layer whose dropped weights are 0; what is kept."""
    kept = torch.ones(groups, layer.in_channels, dtype=torch.bool)
    kept = condense(layer.weight, kept, layer.in_channels // groups * (groups - 1))
    with torch.no_grad():
        layer.weight.copy_(masked(layer.weight, kept))
    return kept


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("selected", [False, True], ids=["whole", "selected"])
def test_the_converted_layer_computes_what_the_masked_one_does(groups: int, selected: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2), nn.ReLU()).double()
    name = "0"
    if selected:
        insert(model, name, "select", ChannelSelect(torch.randperm(9)[:8]))
        name = "0.layer"
    kept = condensed(model.get_submodule(name), groups)
    x = torch.randn(3, 9 if selected else 8, 7, 7, dtype=torch.float64)
    wanted = model(x)
    convert(model, name, kept)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    parts: Any = model.get_submodule("0")
    assert list(parts._modules) == ["select", "layer", "shuffle"]
    assert parts.layer.weight.shape == (12, 8 // groups, 1, 1) and parts.layer.groups == groups and parts.layer.in_channels == 8
    channels = torch.arange(12.0).reshape(1, 12, 1, 1)
    shuffled = channels.reshape(1, groups, 12 // groups, 1, 1).transpose(1, 2).reshape(1, 12, 1, 1)  # ShuffleNet's
    assert torch.equal(parts.shuffle(channels), shuffled)


def test_a_narrowed_linear_layer_reads_its_heaviest_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    layer: Any = copy.deepcopy(model[1])
    assert narrow(model, "1", 0.5) == 4
    sizes = [sum(map(abs, column)) for column in layer.weight.T.tolist()]
    heaviest = sorted(sorted(range(9), key=lambda i: -sizes[i])[:4])
    x = torch.randn(5, 9)
    torch.testing.assert_close(model(x), x[:, heaviest] @ layer.weight[:, heaviest].T + layer.bias)


def converted(depth: int, growth: int) -> nn.Module:
    """CondenseNet of the published form; its weights do not matter."""
    with torch.device("meta"):
        model = network(shape=(3, 32, 32), depth=depth, growth=growth)
    model.to_empty(device="cpu")
    hook = LearnedGroups(options())
    hook.coverage(model, (3, 32, 32))
    for name in hook.names:
        layer: Any = model.get_submodule(name)
        nn.init.ones_(layer.weight)
        convert(model, name, condensed(layer, 4))
    return model


@pytest.mark.parametrize(("depth", "millions"), [(50, "0.22"), (86, "0.52"), (122, "0.95")])
def test_converted_networks_have_the_published_number_of_parameters(depth: int, millions: str) -> None:
    assert f"{sum(p.numel() for p in converted(depth, 8).parameters()) / 1e6:.2f}" == millions


def test_condensenet_182_has_the_published_counts() -> None:
    model = converted(182, 12)
    found = count(model, (3, 32, 32))
    assert found["parameters"] == 4_221_946 and f"{found['macs'] / 1e6:.1f}" == "493.9" and not found["unsupported"]
    assert narrow(model, "classifier", 0.5) == 1272
    assert sum(p.numel() for p in model.parameters()) == 4_209_226


def test_1x1_convolutions_that_divide_are_learned_and_the_rest_is_told() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 12, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    hook = LearnedGroups(options(groups=4))
    assert hook.coverage(model, (3, 16, 16)) == ["lgc leaves 0, 1, 2, 3: no ungrouped 1x1 convolution of a multiple of 4 channels"]
    assert hook.names == ["4"] and hook.linear == ["7"]
    hook = LearnedGroups(options(groups=2))
    hook.coverage(model, (3, 16, 16))
    assert hook.names == ["1", "2", "4"]
    with pytest.raises(InputError, match="no ungrouped 1x1 convolution whose inputs and outputs both divide into 5 groups"):
        LearnedGroups(options(groups=5)).coverage(model, (3, 16, 16))
    overparameterize(model, "kflo", depth=2, width=1.0)
    with pytest.raises(InputError, match="layer 4 is over-parameterised.*overparameterize.method to none"):
        LearnedGroups(options()).coverage(model, (3, 16, 16))


@pytest.mark.parametrize(("groups", "until", "epochs"), [(4, 0.5, 2), (2, 1.0, 1), (8, 0.3, 1)])
def test_inputs_go_at_the_published_shares_of_training(make_run: Any, groups: int, until: float, epochs: int) -> None:
    run = make_run(network(depth=8), epochs=epochs, batch_size=32, lr=0.01)
    train(run, [create(options(groups=groups, until=until))])
    events = [event for event in run.events if event["kind"] == "condense"]
    total, wanted = epochs * len(run.train), []
    for k in range(1, groups):
        # The authors drop before the first step whose share of training, over `until`, reaches k / (G - 1).
        share = Fraction(k, groups - 1) * Fraction(str(until))
        wanted.append(next(step for step in range(total + 1) if Fraction(step, total) >= share))
    assert [event["step"] for event in events] == wanted
    inputs = events[0]["layers"][0]["inputs"]
    assert [event["layers"][0]["open"] for event in events] == [inputs - k * (inputs // groups) for k in range(1, groups)]


def test_the_weights_that_stay_take_the_course_of_the_authors_masked_forward_pass(make_run: Any) -> None:
    model = network()
    theirs, hook, run = copy.deepcopy(model), LearnedGroups(options()), make_run(model, epochs=2, batch_size=64)
    run.rounds = [2]
    hook.coverage(model, run.input_shape)
    hook.prepare(run)
    how: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    ours, other = torch.optim.SGD(model.parameters(), **how), torch.optim.SGD(theirs.parameters(), **how)
    kept = {name: torch.ones(4, len(mask[0]), dtype=torch.bool) for name, mask in hook.kept.items()}
    drops = 0
    for step, (images, labels) in zip(range(2 * len(run.train)), [*run.train.epoch(0), *run.train.epoch(1)], strict=True):
        ours.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        ours.step()
        hook.after_step(run)
        while drops < 3 and 6 * step >= (drops + 1) * 2 * len(run.train):
            for name, mask in kept.items():
                weight = masked(theirs.get_parameter(f"{name}.weight"), mask)
                kept[name] = condense(weight, mask, mask.shape[1] // 4)
            drops += 1
        effective = {f"{name}.weight": masked(theirs.get_parameter(f"{name}.weight"), mask) for name, mask in kept.items()}
        other.zero_grad()
        F.cross_entropy(functional_call(theirs, effective, (images,)), labels).backward()
        other.step()
    assert drops == hook.stage == 3
    for name, mask in kept.items():
        assert torch.equal(hook.kept[name], mask)
        weight = model.get_parameter(f"{name}.weight")
        torch.testing.assert_close(weight, masked(theirs.get_parameter(f"{name}.weight"), mask), rtol=1e-3, atol=1e-4)
        assert torch.equal(weight != 0, masked(torch.ones_like(weight), mask) != 0)


def test_the_lasso_is_the_sum_of_column_norms_until_all_is_dropped(make_run: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 1, 1)
    weight[1::2, 2] = 0
    wanted = sum(max(float(weight[g::2, i].square().sum()), 1e-6) ** 0.5 for g in range(2) for i in range(4))
    assert float(group_lasso(weight, 2)) == pytest.approx(wanted, rel=1e-6)
    run, hook = make_run(network(), epochs=1), LearnedGroups(options(lasso=0.5))
    run.rounds = [1]
    hook.coverage(run.model, run.input_shape)
    hook.prepare(run)
    nothing = torch.zeros(1)
    found = hook.penalty(run, nothing, nothing, nothing)
    weights = [run.model.get_parameter(f"{name}.weight") for name in hook.names]
    assert found is not None and found.item() == pytest.approx(0.5 * sum(group_lasso(w, 4).item() for w in weights))
    found.backward()
    assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in weights)
    hook.drop(run, 3)
    assert hook.penalty(run, nothing, nothing, nothing) is None
    assert LearnedGroups(options()).penalty(run, nothing, nothing, nothing) is None


class Before(Hook):
    """Keeps the network as training left it."""

    def finish(self, run: Run) -> None:
        self.model = copy.deepcopy(run.model)


@pytest.mark.parametrize("linear", [1.0, 0.5])
def test_a_trained_network_is_converted_stored_and_loaded(make_run: Any, prepared: Prepared, tmp_path: Path, linear: float) -> None:
    before, run = Before(), make_run(network(), epochs=2, lr=0.02)
    small = train(run, [before, create(options(linear=linear))])
    x = torch.randn(16, 1, 16, 16)
    expected = before.model.eval()
    if linear < 1:
        narrow(expected, "classifier", linear)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected(x), rtol=1e-5, atol=1e-5)
    assert [event["kind"] for event in run.events] == ["condense"] * 3 + ["surgery"]
    checkpoint.save(tmp_path, small, checkpoint.new_card({"name": "condensenet", "arguments": SMALL}, prepared))
    loaded, card = checkpoint.load(tmp_path)
    stored, found = small.state_dict(), loaded.state_dict()
    assert stored.keys() == found.keys() and all(torch.equal(tensor, found[name]) for name, tensor in stored.items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), small(x), rtol=1e-5, atol=1e-5)  # other memory order, other order of sums
    table = {row["name"]: row for row in checkpoint.layer_table(loaded, card)}
    learned = table["block1.0.conv1"]
    assert learned["groups"] == 4 and learned["inputs"] == learned["full_inputs"] == 16
    assert table["classifier"]["inputs"] == round(linear * table["classifier"]["full_inputs"])


def test_without_training_everything_goes_at_the_end_and_batch_norms_are_estimated_again(make_run: Any) -> None:
    run = make_run(network(), epochs=0)
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters() if name.endswith("conv1.weight")}
    small: Any = train(run, [create(options())])
    dropped, surgery, batchnorm = run.events
    assert dropped["kind"] == "condense" and all(row["open"] == row["inputs"] // 4 for row in dropped["layers"])
    assert surgery["groups"] == {name.removesuffix(".weight"): 4 for name in weights}
    assert batchnorm["batches"] == len(run.train)
    assert batchnorm["validation_accuracy_after"] == evaluate(small, run.validation).accuracy
    for name, weight in weights.items():
        select: Any = small.get_submodule(f"{name.removesuffix('.weight')}.select")
        assert [{*row.tolist()} for row in select.index.reshape(4, -1)] == scan(weight, 4, 3)


def test_the_best_network_is_sought_among_those_that_dropped_as_much(make_run: Any) -> None:
    hook, run = LearnedGroups(options()), make_run(network(), epochs=2)
    run.rounds = [2]
    hook.coverage(run.model, run.input_shape)
    hook.prepare(run)
    run.best, run.best_accuracy = run.model.state_dict(), 0.9
    hook.drop(run, 1)
    assert run.best is None and run.best_accuracy == -1.0


class Kill(Hook):
    def after_epoch(self, run: Run) -> bool:
        if run.epoch == 2:  # the first epoch is kept
            raise KeyboardInterrupt
        return False


def test_a_killed_training_goes_on_as_if_nothing_had_happened(make_run: Any, tmp_path: Path) -> None:
    undisturbed = train(make_run(network(), epochs=3), [create(options())]).state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(make_run(network(), epochs=3), [create(options()), Kill()], Resume(tmp_path, "lgc", "0" * 16))
    run = make_run(network(seed=1), epochs=3)
    resumed = train(run, [create(options()), Hook()], Resume(tmp_path, "lgc", "0" * 16)).state_dict()
    assert len(run.history) == 3 and [event["kind"] for event in run.events] == ["condense"] * 3 + ["surgery"]
    assert undisturbed.keys() == resumed.keys() and all(torch.equal(tensor, resumed[key]) for key, tensor in undisturbed.items())

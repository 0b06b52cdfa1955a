"""Weight evolution against a reference that loops over single numbers, written from what the authors' code does."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIT
from torch import Tensor, nn

from pipeline import models
from pipeline.errors import InputError
from pipeline.expansion import collapse
from pipeline.layers import convolutions
from pipeline.overparameterize import overparameterize
from pipeline.revive.weight_evolution import Options, batch_norms, create, crossover, evolve, scheduled
from pipeline.training import train

PUBLISHED: dict[str, Any] = {"rule": "code", "share": 0.2, "norm_share": 0.05, "local": 0.1, "force": 2}
SCHEDULE: dict[str, Any] = {"period": 60, "divisors": [1, 2.5, 5], "steepness": 15}
ENDS = {"gamma": ".weight", "beta": ".bias"}


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw filters, gammas and betas whose strengths differ by up to a hundred times."""
    generator = torch.Generator().manual_seed(seed)
    for module in [*dict(convolutions(model)).values(), *batch_norms(model).values()]:
        for tensor in module.parameters(recurse=False):
            strength = 100 ** -torch.rand(len(tensor), *[1] * (tensor.ndim - 1), generator=generator)
            tensor.data.copy_(strength * torch.randn(tensor.shape, generator=generator))
    return model


def network(seed: int = 0) -> Any:
    """Convolutions of every sort, with normalisations. Kernels of `flat` have height 1: they are crossed as a whole."""
    torch.manual_seed(seed)
    layers = {"first": nn.Conv2d(3, 12, 3), "flat": nn.Conv2d(12, 9, (1, 3)), "tall": nn.Conv2d(9, 10, (3, 1), bias=False)}
    layers |= {"grouped": nn.Conv2d(10, 16, 3, groups=2), "depthwise": nn.Conv2d(16, 16, 3, groups=16)}
    layers |= {"pointwise": nn.Conv2d(16, 14, 1), "last": nn.Conv2d(14, 8, 5), "instance": nn.InstanceNorm2d(8)}
    layers |= {"norm1": nn.BatchNorm2d(12), "norm2": nn.BatchNorm2d(10), "norm3": nn.BatchNorm2d(14)}
    layers |= {"bare": nn.BatchNorm2d(16, affine=False), "fc": nn.Linear(8, 10), "after": nn.BatchNorm1d(10)}
    return spread(nn.ModuleDict(layers), seed)


def size_of(values: Any) -> float:
    return float(np.abs(values).sum())


def pairs_of(sizes: list[float], threshold: float, local: float, counter: list[float], limit: float) -> list[tuple[int, int]]:
    """(dominant, inferior) of one layer; `counter` holds one number."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    high = sum(1 for size in sizes if size >= threshold)
    count = 0
    if high != len(sizes):
        count = sum(1 for size in sizes if size <= sizes[order[0]] * local)
        counter[0] = 0 if count else counter[0] + 1
        if not count and counter[0] >= limit:
            count, counter[0] = 1, 0
    count = min(count, len(sizes) - high)
    return list(zip(order[: len(sizes) - count], order[len(sizes) - count :], strict=False))


def crossed_kernel(weak: list[list[float]], strong: list[list[float]], rule: str) -> list[list[float]]:
    s = sorted((value for row in weak for value in row), key=abs)[0]
    large = sorted((value for row in strong for value in row), key=abs, reverse=True)[0]
    if rule == "code":
        if abs(s + large) <= 0.01 * max(abs(s), abs(large)):
            return weak
        alpha = s / (s + large)
        return [[large * alpha + s * (1 - alpha) if value == s else value for value in row] for row in weak]
    alpha = abs(s) / (abs(s) + abs(large))
    return [[alpha * s + (1 - alpha) * large if value == s else value for value in row] for row in weak]


def reference(tensors: dict[str, Any], rule: str, share: float, norm_share: float, local: float, force: int, memory: Any) -> Any:
    """New tensors and the pairs of each, from {layer: filters}, {norm.weight: gammas} and {norm.bias: betas}, as lists."""
    new, found = copy.deepcopy(tensors), {}
    limit = sum("." not in name for name in tensors) / force if force else math.inf
    for kind, part in (("filters", share), ("gamma", norm_share), ("beta", norm_share)):
        members = {name: values for name, values in tensors.items() if name.endswith(ENDS.get(kind, name.partition(".")[0]))}
        sizes = {name: [size_of(v) / (len(v) if kind == "filters" else 1) for v in values] for name, values in members.items()}
        together = sorted(size for own in sizes.values() for size in own)
        for name, values in members.items():
            found[name] = pairs_of(sizes[name], together[int(len(together) * part)], local, memory[kind], limit)
            for strong, weak in found[name]:
                if kind == "filters" and len(values[weak][0]) > 1:
                    new[name][weak] = [crossed_kernel(a, b, rule) for a, b in zip(values[weak], values[strong], strict=True)]
                else:
                    alpha = size_of(values[weak]) / (size_of(values[weak]) + size_of(values[strong]))
                    new[name][weak] = (alpha * np.array(values[weak]) + (1 - alpha) * np.array(values[strong])).tolist()
    return new, found


def treated(model: nn.Module) -> dict[str, Tensor]:
    """What may change, by the names that the reference knows."""
    kernels = {name: layer.weight.detach().clone() for name, layer in convolutions(model)}
    norms = [(name, norm) for name, norm in batch_norms(model).items() if norm.affine]
    return kernels | {name + end: getattr(norm, end[1:]).detach().clone() for name, norm in norms for end in ENDS.values()}


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize(  # as published before the schedule; more; most of each layer; nearly all forced; no filters
    "setting", [(0.2, 0.05, 0.1, 2), (0.6, 0.5, 0.1, 2), (0.9, 0.9, 0.9, 0), (0.3, 0.3, 0.001, 5), (0.0, 0.4, 0.5, 7)]
)
def test_three_passes_are_those_of_the_authors_loops(setting: tuple[float, float, float, int], rule: str) -> None:
    options = {"rule": rule} | dict(zip(("share", "norm_share", "local", "force"), setting, strict=True))
    waiting, memory = {}, {kind: [0] for kind in ("filters", "gamma", "beta")}
    model = network(seed=setting[3])
    for _ in range(3):
        before, state = treated(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lists = {name: tensor.tolist() for name, tensor in before.items()}
        new, pairs = reference(lists, rule, *setting, memory)
        done = evolve(model, **options, waiting=waiting)
        assert done["filters"] + sum(done["norms"].values()) > 0
        for name, tensor in treated(model).items():
            torch.testing.assert_close(tensor, torch.tensor(new[name]), rtol=1e-5, atol=1e-9)
            others = list(set(range(len(tensor))) - {weak for _, weak in pairs[name]})
            assert torch.equal(tensor[others], before[name][others])
        untouched = state.keys() - {name if "." in name else f"{name}.weight" for name in before}
        assert {"first.bias", "norm1.running_var", "fc.weight", "after.bias"} < untouched
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in untouched)
        counts = {name: len(found) for name, found in pairs.items()}
        assert {row["name"]: row["filters"] for row in done["layers"]} == {n: c for n, c in counts.items() if c and "." not in n}
        for row in done["layers"]:
            for key, source in (("mean_norm_before", lists), ("mean_norm_after", new)):
                norms = [size_of(source[row["name"]][weak]) for _, weak in pairs[row["name"]]]
                assert row[key] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
        assert done["norms"] == {kind: sum(c for n, c in counts.items() if n.endswith(end)) for kind, end in ENDS.items()}
        assert {kind: [waiting.get(kind, 0)] for kind in memory} == memory


def test_the_share_follows_the_published_schedule() -> None:
    by_hand = {0: 0.1, 15: 0.2 * 0.7310586, 59: 0.2 * 0.9807979}  # 0.2 sigmoid(e / 15)
    by_hand |= {60: 0.04, 75: 0.08 * 0.7310586, 119: 0.08 * 0.9807979}
    by_hand |= {120: 0.02, 135: 0.04 * 0.7310586, 180: 0.04 * 0.9820138, 100_000: 0.04}  # no new period begins at 180
    assert {epoch: scheduled(0.2, epoch, **SCHEDULE) for epoch in by_hand} == pytest.approx(by_hand, rel=1e-6)


def layers_of(*norms: list[float], inputs: int = 1) -> nn.Sequential:
    """A 2x2 convolution for each list, its filters constant and with these L1 norms for each input."""
    model = nn.Sequential(*(nn.Conv2d(inputs, len(own), 2) for own in norms))
    for layer, own in zip(model, norms, strict=True):
        layer.weight.data = torch.tensor(own)[:, None, None, None].repeat(1, inputs, 2, 2) / 4
    return model


def changed(model: nn.Module, **options: Any) -> list[list[int]]:
    """The filters of each layer that a pass changes."""
    before = treated(model)
    done = evolve(model, **(PUBLISHED | {"share": 0.5, "force": 0} | options))
    found = [(layer.weight != before[name]).flatten(1).any(1).nonzero().flatten().tolist() for name, layer in convolutions(model)]
    assert done["filters"] == sum(map(len, found))
    return found


def test_inferior_filters_are_weak_in_the_network_and_in_their_layer_and_matched_in_order() -> None:
    strong, weak = [100.0, 5.0, 200.0, 150.0], [1.0, 0.9, 1.1, 0.05]
    # Of 8 sorted norms those below the one at place int(8 share): 0.05, 0.9, 1.0, 1.1, 5, 100, 150, 200.
    assert changed(layers_of(strong, weak), share=0.49) == [[], [3]]  # place 3: three are weak, one is so in its layer
    assert changed(layers_of(strong, weak), share=0.62) == [[], [3]]  # place 4: 5 itself is not below 5
    assert changed(layers_of(strong, weak), share=0.63) == [[1], [3]]  # place 5
    assert changed(layers_of(strong, weak), share=1.0) == [[1], [3]]  # place 8 is past the end: below the largest
    assert changed(layers_of(strong, weak), share=0.12) == [[], []]  # place 0: none is below the smallest
    assert changed(layers_of([8.0, 1.0, 7.0, 6.0]), local=0.125) == [[1]]  # an eighth of 8 itself is a candidate
    assert changed(layers_of([8.0, 1.01, 7.0, 6.0]), local=0.125) == [[]]
    wide = layers_of([1.0, 0.05], [0.9, 0.06])
    wide[1] = layers_of([0.9, 0.06], inputs=32)[0]
    assert changed(wide, share=0.49) == [[1], []]  # norms are compared for each input: 0.05 of 1 is below 1.92 of 32
    # Partners are matched in order, and those without one stay.
    model = layers_of([0.4, 3.0, 50.0, 0.8, 40.0, 30.0])
    evolve(model, **(PUBLISHED | {"rule": "paper", "share": 0.5}))
    kernels = next(model.parameters()).detach().flatten(1)
    for weak, s, large in ((1, 0.75, 12.5), (3, 0.2, 10.0), (0, 0.1, 7.5)):  # elements are a quarter of the norm
        assert kernels[weak].tolist() == pytest.approx([(s * s + large * large) / (s + large), s, s, s], rel=1e-6)
    assert changed(layers_of([0.1, 0.2, 10.0, 0.3, 0.4]), share=0.99) == [[4]]  # one is dominant: it has one partner
    assert changed(layers_of([0.0, 0.0, 0.0]), share=0.99) == [[]]


def test_the_counter_forces_one_filter_of_every_so_many_layers_and_runs_on_between_passes() -> None:
    even = [1.0, 1.1, 1.2, 1.3]
    assert changed(layers_of(even, even, even, even), force=2) == [[], [0], [], [0]]  # 4 convolutions / 2
    assert changed(layers_of(even, even, even, even), force=0) == [[], [], [], []]
    assert changed(layers_of(even, [10.0, 10.0], even, even), force=2) == [[], [], [0], []]  # it stays where none is weak
    assert changed(layers_of(even, [1.0, 0.05, 1.0], even, even), force=2) == [[], [1], [], [0]]  # starts again at a candidate
    waiting = {"filters": 0}
    assert changed(layers_of(even, even, even), force=2, waiting=waiting) == [[], [0], []] and waiting["filters"] == 1  # 3 / 2
    assert changed(layers_of(even, even, even), force=2, waiting=waiting) == [[0], [], [0]] and waiting["filters"] == 0


def test_kernels_and_batch_norms_are_crossed_as_computed_by_hand() -> None:
    cases = [(0.01, 1.0, 0.02 / 1.01, 1.0001 / 1.01), (-0.01, 1.0, -0.02 / 0.99, 0.9999 / 1.01), (0.0, -2.0, 0.0, -2.0)]
    cases += [(0.5, -0.502, 0.5, (0.5**2 - 0.502**2) / 1.002)]  # |s + l| is 0.4 % of |l|: as coded, 251
    cases += [(0.5, -0.5, 0.5, 0.0), (0.0, 0.0, 0.0, 0.0)]
    cases += [(0.5, 0.0, 0.0, 0.5)]  # as coded, a dead partner wipes the element out
    for s, large, *expected in cases:
        weak, strong = torch.tensor([[[[0.7, s], [-0.6, 0.8]]]]), torch.tensor([[[[large / 2, large / 3], [large, -large / 4]]]])
        for rule, wanted in zip(("code", "paper"), expected, strict=True):
            assert crossover(weak, strong, rule).flatten().tolist() == pytest.approx([0.7, wanted, -0.6, 0.8], rel=1e-5, abs=1e-9)
    # Kernels of height 1 and entries of batch norms are weighted with their norms.
    weak, strong = torch.tensor([[[[1.0]], [[-1.0]]]]), torch.tensor([[[[2.0]], [[6.0]]]])
    for rule in ("code", "paper"):  # norms 2 and 8: a fifth, four fifths
        torch.testing.assert_close(crossover(weak, strong, rule), torch.tensor([[[[1.8]], [[4.6]]]]))
    norm: Any = nn.BatchNorm2d(4)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, -0.05, 2.0, 3.0]), torch.tensor([0.0, 0.0, -4.0, 0.5])
    done = evolve(norm, **(PUBLISHED | {"norm_share": 0.5}))
    assert norm.weight.tolist() == pytest.approx([1.0, (-(0.05**2) + 9) / 3.05, 2.0, 3.0])
    assert norm.bias.tolist() == pytest.approx([-4.0, 0.5, -4.0, 0.5])
    assert done == {"layers": [], "filters": 0, "norms": {"gamma": 1, "beta": 2}}


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_weights_stay_finite_and_a_layer_that_is_not_finite_stays_and_spoils_no_other(rule: str) -> None:
    model = network()
    for tensor in (model.first.weight[:6], model.pointwise.weight[:7], model.grouped.weight, model.norm1.weight):
        tensor.data.zero_()
    model.last.weight.data = torch.where(torch.arange(8) < 4, 0.001, -0.001)[:, None, None, None].repeat(1, 14, 5, 5)
    model.tall.weight.data[0, 0, 0, 0], model.norm2.weight.data[3] = float("nan"), float("inf")
    before = treated(model)
    for _ in range(5):
        assert evolve(model, rule=rule, share=0.5, norm_share=0.9, local=0.9, force=7)["filters"] > 0
    for name, tensor in treated(model).items():
        if name in ("tall", "norm2.weight", "grouped", "norm1.weight"):
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
        else:
            assert tensor.abs().max() <= 10 * before[name].abs().max()  # so it is finite
    # By the code's rule 0 stays 0; the paper's gives a dead kernel one element.
    assert bool(model.first.weight[:6].any()) is (rule == "paper")


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize(("name", "arguments"), [("cifar_quick", {}), ("resnet", {"depth": 8})])
def test_expanded_layers_get_the_kernels_of_plain_ones(name: str, arguments: dict[str, Any], rule: str) -> None:
    torch.manual_seed(0)
    expanded = overparameterize(spread(models.build(name, input_shape=(3, 16, 16), classes=10, **arguments)), depth=2, width=2)
    for mixer in [parameter for key, parameter in expanded.named_parameters() if "mixers" in key]:
        mixer.data += 0.05 * torch.randn_like(mixer)
    plain = collapse(copy.deepcopy(expanded))
    state = {key: tensor.clone() for key, tensor in expanded.state_dict().items()}
    setting = PUBLISHED | {"rule": rule, "share": 0.4, "norm_share": 0.3, "local": 0.2}
    there, here = evolve(plain, **setting), evolve(expanded, **setting)
    assert here["norms"] == there["norms"] and here["filters"] == there["filters"] > 0
    torch.testing.assert_close(after := treated(expanded), treated(plain), rtol=0, atol=1e-5)
    edited = {f"{row['name']}.parametrizations.weight.original" for row in there["layers"]} | after.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in expanded.state_dict().items() if key not in edited)


def test_batch_norms_inside_over_parameterised_layers_stay() -> None:
    torch.manual_seed(0)
    model = overparameterize(models.build("resnet", depth=8, input_shape=(3, 8, 8), classes=10), "acnet", norms="add", gamma=None)
    spread(model)
    inside = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".norms." in name}
    done = evolve(model, rule="paper", share=0.4, norm_share=0.4, local=0.5, force=2)
    assert inside and done["norms"]["gamma"] > 0
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in inside.items())
    kind, names = create(options()).coverage(model, (3, 8, 8))[1].split(": ")
    assert kind == "weight_evolution leaves batch norms inside over-parameterised layers"
    assert {name.rpartition(".")[0] for name in inside} == set(names.split(", "))


def options(**changes: Any) -> Options:
    return Options.model_validate({"method": "weight_evolution", **PUBLISHED, **SCHEDULE, "fit": FIT} | changes)


def test_it_acts_after_every_epoch_but_the_last_with_the_share_of_that_epoch(make_run: Any) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)]
    run = make_run(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)), epochs=4)
    train(run, [create(options(share=0.8, norm_share=0, local=0.9, period=2, divisors=[1, 4], steepness=2))])
    assert [(event["kind"], event["epoch"]) for event in run.events] == [("weight_evolution", epoch) for epoch in (1, 2, 3)]
    assert [event["share"] for event in run.events] == pytest.approx([0.4, 0.8 * 0.6224593, 0.1])  # sigmoid(0), (1/2), (0)
    assert all(event["filters"] > 0 and event["norms"] == {"gamma": 0, "beta": 0} for event in run.events)


def test_the_optimiser_keeps_its_momentum_and_a_resumed_run_its_counters(make_run: Any) -> None:
    filters, state = [], create(options()).state()
    for epoch in range(1, 5):
        run, hook = make_run(layers_of(*[[1.0, 1.1, 1.2, 1.3]] * 3), epochs=9), create(options(share=0.9))
        parameters = list(run.model.parameters())
        run.epoch, run.optimizer = epoch, torch.optim.SGD(parameters, lr=1e-9, momentum=0.9)
        sum(parameter.sum() for parameter in parameters).backward()
        run.optimizer.step()
        hook.load_state(state, {})
        assert not hook.after_epoch(run) and (state := hook.state())
        filters += [row["name"] for row in run.events[0]["layers"]]
        assert all((run.optimizer.state[parameter]["momentum_buffer"] == 1).all() for parameter in run.model.parameters())
    assert filters == ["1", "0", "2"] * 2  # every second layer, over the ends of epochs


def test_what_it_leaves_is_told_beforehand() -> None:
    layers, norms = create(options()).coverage(network(), (3, 8, 8))
    assert layers == "weight_evolution leaves layers that are no convolutions: fc"
    assert norms == "weight_evolution leaves normalisations other than 2D batch norms: after"
    with pytest.raises(InputError, match="no convolution"):
        create(options()).coverage(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    bad = {"rule": "intended", "share": 1.1, "norm_share": -0.1, "local": float("nan"), "force": -1, "period": 0, "steepness": 0}
    for name, value in [*bad.items(), ("divisors", []), ("divisors", [1, 0.5])]:
        with pytest.raises(ValueError, match=name):
            options(**{name: value})

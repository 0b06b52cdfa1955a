"""Rival methods against loops written from the papers and the authors' code, and each of them in a training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIT
from networks import build, randomise, shape_of
from torch import Tensor, nn

from pipeline import models
from pipeline.channels import follow
from pipeline.compress import l1, random, slimming
from pipeline.config import Target
from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.hooks import Run
from pipeline.layers import convolutions, filtering_layers
from pipeline.overparameterize import collapse, overparameterize
from pipeline.removal import filters_of
from pipeline.resume import Resume
from pipeline.structure import structure
from pipeline.training import train

SHAPE = (3, 8, 8)
HALF: dict[str, Any] = {"share": None, "target": Target(of="macs", fraction=0.5), "multiple": 1, "scope": "global"}
BLOCK: dict[str, Any] = {"share": 0.4, "target": None, "multiple": 1, "scope": "global", "protect": []}
BLOCK |= {"distill": None, "sensitivity": None}


def chain() -> nn.Module:
    """Convolution, batch norm and ReLU three times, as VGG."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 12), (12, 20), (20, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))).eval()


class Block(nn.Module):
    """A projection shortcut and a depthwise convolution: the filters of stem, shortcut and last make the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.depthwise, self.norm, self.inner = nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.last(self.inner(self.first(x)).relu())
        return self.head(self.norm(self.depthwise(x)).relu().mean((2, 3)))


class TwoNorms(Block):
    """Batch norms before and behind the depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.second(x + self.last(self.inner(self.first(x)).relu()))
        return self.head(self.norm(self.depthwise(x)).relu().mean((2, 3)))


def block() -> Any:
    return randomise(Block()).eval()


def by_layer(model: nn.Module, scores: Any, layer: str) -> list[float]:
    """The scores of the channels that a layer makes."""
    channels = follow(model, SHAPE)
    label = channels.units()
    return [scores[label[channel]] for channel in channels.outputs[layer]]


def total(filters: Tensor) -> list[float]:
    return [sum(abs(weight) for weight in filters[o].flatten().tolist()) for o in range(len(filters))]


def test_l1_scores_filters_by_their_sums_and_tied_ones_together() -> None:
    model = block()
    found = l1.scores(model, follow(model, SHAPE))
    inner = total(model.first.weight)
    assert by_layer(model, found, "first") == pytest.approx([value / (sum(inner) / 4) for value in inner])
    together = [total(layer.weight) for layer in (model.stem, model.last, model.depthwise)]
    wanted = [sum(values[c] / (sum(values) / 6) for values in together) / 3 for c in range(6)]
    assert by_layer(model, found, "stem") == by_layer(model, found, "last") == pytest.approx(wanted)
    expanded = overparameterize(copy.deepcopy(model), "kflo", depth=2, width=2)
    again = l1.scores(expanded, follow(expanded, SHAPE))
    assert list(again) == list(found) and list(again.values()) == pytest.approx(list(found.values()))


def authors_cut(model: Any, masks: list[Tensor]) -> nn.Module:
    """As vggprune.py: the filters in the masks, the same inputs of the next convolution, the classifier's columns."""
    smaller, start = copy.deepcopy(model), torch.ones(3, dtype=torch.bool)
    end = iter(masks)
    for old, new in zip(model, smaller, strict=True):
        if isinstance(old, nn.Conv2d):
            mask = next(end)
            new.weight = nn.Parameter(old.weight[mask][:, start].clone())
            start = mask
        elif isinstance(old, nn.BatchNorm2d):
            for name in ("weight", "bias"):
                setattr(new, name, nn.Parameter(getattr(old, name)[start].clone()))
            new.running_mean, new.running_var = old.running_mean[start], old.running_var[start]
        elif isinstance(old, nn.Linear):
            new.weight = nn.Parameter(old.weight[:, start].clone())
    return smaller


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5])
def test_l1_cuts_a_chain_as_the_authors_do(share: float) -> None:
    model, masks = chain(), []
    for _, layer in convolutions(model):
        sums = total(layer.weight)
        largest = sorted(range(len(sums)), key=sums.__getitem__)[-int(len(sums) * (1 - share)) :]
        masks.append(torch.tensor([i in largest for i in range(len(sums))]))
    smaller, facts = l1.prune(model, SHAPE, share=share, target=None, multiple=1, scope="layer")
    x = torch.randn(3, *SHAPE)
    torch.testing.assert_close(smaller(x), authors_cut(model, masks)(x), rtol=0, atol=0)
    assert facts["removed"] == {name: int((~mask).sum()) for (name, _), mask in zip(convolutions(model), masks, strict=True)}


def test_only_first_convolutions_of_blocks_go_where_adds_are_left_alone() -> None:
    with torch.device("meta"):
        model = models.build("resnet", input_shape=(3, 32, 32), classes=10, depth=20)
    model = randomise(model.to_empty(device="cpu"))
    with pytest.raises(InputError, match="cannot be reached"):
        l1.prune(model, (3, 32, 32), residual="first_only", **{**HALF, "target": Target(of="params", fraction=0.02)})
    smaller, facts = l1.prune(model, (3, 32, 32), residual="first_only", **{**HALF, "scope": "layer"})
    assert {name.rpartition(".")[2] for name in facts["removed"]} == {"conv1"} and "conv1" not in facts["removed"]
    assert len(facts["removed"]) == 9 and 0.49 <= facts["macs"] <= 0.5
    _, tied = l1.prune(model, (3, 32, 32), **{**HALF, "scope": "layer"})
    assert len(tied["removed"]) == 19


@pytest.mark.parametrize("percent", [0.3, 0.5, 0.7])
def test_slimming_cuts_a_chain_as_the_authors_do(percent: float) -> None:
    model: Any = chain()
    scales = [module.weight.detach().abs() for module in model if isinstance(module, nn.BatchNorm2d)]
    flat = sorted(value for scale in scales for value in scale.tolist())
    threshold = flat[int(len(flat) * percent)]
    masks = [scale > threshold for scale in scales]
    smaller, facts = slimming.prune(model, SHAPE, share=percent, target=None, multiple=1, scope="global")
    x = torch.randn(3, *SHAPE)
    torch.testing.assert_close(smaller(x), authors_cut(model, masks)(x), rtol=0, atol=0)
    assert sum(facts["removed"].values()) == int(len(flat) * percent) + 1


def test_slimming_ranks_tied_channels_by_the_mean_of_their_scales_and_leaves_those_without() -> None:
    model: Any = randomise(TwoNorms()).eval()
    found = slimming.scores(model, follow(model, SHAPE))
    wanted = (model.norm.weight.abs() + model.second.weight.abs()) / 2
    assert by_layer(model, found, "stem") == pytest.approx(wanted.tolist())
    assert by_layer(model, found, "first") == pytest.approx(model.inner.weight.abs().tolist())
    plain = build("lenet5", expand=False)
    with pytest.raises(InputError, match="ranks channels by their batch norms, and the network has none"):
        slimming.create(options(slimming, sparsity=0.0, cut_after=0.0)).coverage(plain, shape_of("lenet5"))


def options(module: Any, epochs: int = 4, **changes: Any) -> Any:
    name = module.__name__.rpartition(".")[2]
    return module.Options.model_validate({**BLOCK, "method": name, "fit": {**FIT, "epochs": epochs}, **changes})


def network(expanded: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = models.build("cifar_quick", input_shape=(1, 16, 16), classes=10)
    return overparameterize(model, "kflo", depth=2, width=2) if expanded else model


def test_the_penalty_of_slimming_has_the_gradient_that_the_authors_add(make_run: Any) -> None:
    model = nn.Sequential(chain(), nn.BatchNorm1d(10))
    run: Run = make_run(model)
    model[0][1].weight.data[3] = 0.0
    method = slimming.create(options(slimming, sparsity=0.01, cut_after=None))
    images = torch.zeros(1)
    penalty = method.penalty(run, images, images, images)
    assert penalty is not None
    penalty.backward()
    for name, parameter in model.named_parameters():
        scale = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d) and name.endswith("weight")
        wanted = 0.01 * torch.sign(parameter.detach()) if scale else None
        assert (parameter.grad is None) if wanted is None else torch.equal(parameter.grad, wanted), name


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
def test_slimming_trains_sparsely_cuts_and_trains_on_and_resumes_bit_for_bit(make_run: Any, tmp_path: Path, expanded: bool) -> None:
    class Killed(Exception):
        pass

    def training(name: str, epochs: int) -> tuple[Run, nn.Module]:
        """Goes on with what is kept under the name, and is killed after so many epochs of its own."""
        block = options(slimming, 3, sparsity=0.05, cut_after=0.5, share=0.4)
        run, resume = make_run(network(expanded), epochs=3, lr=0.02), Resume(tmp_path, name, "0" * 16)
        saved, count = resume.save, iter(range(1, 9))

        def save(*arguments: Any) -> None:
            saved(*arguments)
            if next(count) == epochs:
                raise Killed

        resume.save = save  # type: ignore[method-assign]
        return run, train(run, [slimming.create(block)], resume)

    run, trained = training("undisturbed", 9)
    assert [row["round"] for row in run.history] == [1, 1, 2]
    assert [(event["kind"], event["round"], event["epoch"]) for event in run.events] == [("slimming", 2, 2), ("batchnorm", 2, 2)]
    assert sum(run.events[0]["removed"].values()) == 32 + 32 + 64 - sum(
        len(module.weight) for module in trained.modules() if isinstance(module, nn.BatchNorm2d)
    )
    for epochs in (2, 1):  # killed before the cut, and again when the smaller network has trained
        with pytest.raises(Killed):
            training("killed", epochs)
    again = training("killed", 9)[1]
    assert structure(again) == structure(trained)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in trained.state_dict().items())


def test_slimming_cuts_before_after_or_never(make_run: Any) -> None:
    for cut_after, rounds, kinds, widths in ((0.0, [2], 2, "fewer"), (1.0, [2], 2, "fewer"), (None, [2], 0, "all")):
        run, method = make_run(network(), epochs=2), slimming.create(options(slimming, 2, sparsity=1e-4, cut_after=cut_after))
        method.coverage(run.model, run.input_shape)
        trained = train(run, [method])
        assert run.rounds == rounds and len(run.events) == kinds
        assert [event["epoch"] for event in run.events] == [0 if cut_after == 0 else 2] * kinds
        assert (structure(trained) == structure(network())) is (widths == "all")
    images = torch.zeros(1)
    cut, run = slimming.create(options(slimming, sparsity=1e-4, cut_after=0.0)), make_run(network())
    cut.prepare(run)
    assert cut.penalty(run, images, images, images) is None  # fine-tuning has no penalty


def test_random_draws_other_channels_for_another_seed_and_all_equally_often() -> None:
    model = chain()
    channels = follow(model, SHAPE)

    def drawn(seed: int) -> dict[int, float]:
        return dict(random.scores(channels, torch.Generator().manual_seed(seed)))

    assert drawn(0) == drawn(0) != drawn(1) and set(drawn(0)) == set(filters_of(channels))
    lowest = [min(by_layer_ids(channels, "0"), key=drawn(seed).__getitem__) for seed in range(600)]
    counts = [lowest.count(unit) for unit in by_layer_ids(channels, "0")]
    assert sum(counts) == 600 and all(25 <= count <= 80 for count in counts)  # 50 +- 4.4 standard deviations
    how = {"share": 0.5, "target": None, "multiple": 1, "scope": "layer"}
    smaller = [random.prune(model, SHAPE, generator=torch.Generator().manual_seed(seed), **how)[0] for seed in (0, 0, 1)]
    weights = [next(small.parameters()) for small in smaller]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def by_layer_ids(channels: Any, layer: str) -> list[int]:
    return [channels.units()[channel] for channel in channels.outputs[layer]]


RIVALS = {
    "l1": (l1, {"residual": "tied"}),
    "random": (random, {}),
    "slimming": (slimming, {"sparsity": 1e-4, "cut_after": 0.0}),
}


@pytest.mark.parametrize("rival", RIVALS)
def test_in_training_a_rival_cuts_an_expanded_network_as_the_merged_one(make_run: Any, rival: str) -> None:
    module, own = RIVALS[rival]
    block = options(module, 0, **own, share=None, target={"of": "macs", "fraction": 0.5}, multiple=8)
    found = []
    for expanded in (True, False):
        model = network(expanded=True)
        run = make_run(model if expanded else collapse(model), epochs=0)
        found.append((train(run, [module.create(block)]), run))
    (one, run), (other, _) = found
    merged = collapse(copy.deepcopy(one))
    assert structure(merged) == structure(other)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-4, atol=1e-5)
    cut, norms = run.events
    assert cut["kind"] == rival and 0.45 <= cut["macs"] <= 0.5 and norms["kind"] == "batchnorm"
    assert ("note" in cut) is (cut["macs"] < 0.49)
    assert all(len(layer.weight) % 8 == 0 for name, layer in filtering_layers(other) if name != "fc2")
    assert norms["validation_accuracy_after"] == evaluate(one, run.validation).accuracy
    whole = "fc1, fc2" if rival == "slimming" else "fc2"
    why = "protected, too narrow, without a score, or what enters or leaves the network"
    assert run.notes == [f"{rival} leaves {whole} at full width: {why}"]


def test_what_cannot_be_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="scope: sensitivity needs sensitivity: ecdm or measured"):
        options(l1, residual="tied", scope="sensitivity")
    for wrong in ({"share": None}, {"target": {"of": "macs", "fraction": 0.5}}):
        with pytest.raises(ValueError, match="give a share or a target"):
            options(l1, residual="tied", **wrong)
    tight = options(l1, residual="tied", share=None, target={"of": "macs", "fraction": 0.001})
    with pytest.raises(InputError, match="macs = 0.001 cannot be reached"):
        l1.create(tight).coverage(network(), (1, 16, 16))
    with pytest.raises(InputError, match="protect = 'conv9' matches no layer"):
        l1.create(options(l1, residual="tied", protect=["conv9"])).coverage(network(), (1, 16, 16))

"""The tables on compressing: their figures, that every row can be trained, and that its method treats its network as published."""

import json
from functools import cache
from typing import Any

import pytest
import test_recipes
import test_recipes_revive
import torch
from test_recipes import project  # noqa: F401  # a fixture
from torch import nn

import recipes.run as runner
from pipeline import methods, models
from pipeline.channels import follow
from pipeline.compress.diet import diet
from pipeline.removal import choose, filters_of
from pipeline.surgery import Shape, drop, shrink
from recipes import tables

pytestmark = pytest.mark.usefixtures("project")

# Table -> cells that the paper's tables have: the rest of its rows are controls of ours.
CELLS = {"selective_cifar10": 8, "selective_cifar100": 8, "selective_fashion_mnist": 8, "selective_tiny_imagenet": 8}
CELLS |= {"selective_imagenet": 4, "condensenet_cifar10": 2}
CELLS |= {"diet_imagenette": 12, "diet_unet": 0, "diet_cifar10": 0, "diet_fashion_mnist": 0, "compress_cifar10": 0}
# Errors in % and their deviations, as selective convolution's paper prints them: base, select.
ERRORS: dict[str, dict[str, tuple[tuple[float, float | None], tuple[float, float | None]]]] = {
    "selective_cifar10": {
        "densenet_40": ((6.62, 0.15), (6.09, 0.10)),
        "densenet_100": ((4.51, 0.04), (4.29, 0.08)),
        "resnet_164": ((4.23, 0.15), (3.92, 0.14)),
        "resnext_29": ((3.62, 0.12), (3.39, 0.14)),
    },
    "selective_cifar100": {
        "densenet_40": ((29.9, 0.1), (28.8, 0.1)),
        "densenet_100": ((22.8, 0.3), (22.2, 0.1)),
        "resnet_164": ((21.3, 0.2), (20.9, 0.2)),
        "resnext_29": ((18.1, 0.1), (17.6, 0.1)),
    },
    "selective_fashion_mnist": {
        "densenet_40": ((5.03, 0.07), (4.73, 0.06)),
        "densenet_100": ((4.70, 0.06), (4.58, 0.05)),
        "resnet_164": ((4.53, 0.04), (4.37, 0.03)),
        "resnext_29": ((4.40, 0.07), (4.27, 0.06)),
    },
    "selective_tiny_imagenet": {
        "densenet_40": ((45.8, 0.2), (44.4, 0.2)),
        "densenet_100": ((41.0, 0.1), (39.9, 0.3)),
        "resnet_164": ((37.7, 0.4), (37.5, 0.2)),
        "resnext_29": ((31.7, 0.3), (31.4, 0.3)),
    },
    "selective_imagenet": {
        "densenet_121": ((24.7, None), (24.4, None)),
        "resnet_50": ((23.9, None), (23.4, None)),
    },
}
# Top-1 in % of the thesis: full, diet, diet with distillation, the small network from fresh weights.
DIETS = {
    "rednet_26": (93.9, 87.1, 89.7, 60.2),
    "resnet_18": (97.4, 90.2, 90.8, 75.9),
    "vgg16": (98.2, 90.2, 90.8, 79.6),
}
# Parameters of the thesis, whole and on a diet.
SIZES = {
    ("diet_imagenette", "rednet_26"): (7_204_656, 1_835_542),
    ("diet_imagenette", "resnet_18"): (11_181_642, 2_937_546),
    ("diet_imagenette", "vgg16"): (134_309_962, 33_593_386),
    ("diet_unet", "carvana"): (31_037_633, 7_763_041),
    ("diet_unet", "nyu_v2"): (31_037_633, 7_763_041),
}
# Slots that may read one channel, in the authors' code; null wherever it is not named.
LIMITED = {("selective_cifar10", "densenet_100"): 32, ("selective_tiny_imagenet", "densenet_100"): 32}
LIMITED |= {(f"selective_{data}", "resnext_29"): 32 for data in ("cifar10", "cifar100", "tiny_imagenet")}
# Of each data set: channels, pixels a side before a crop, and how many numbers the network answers with.
DATA = {
    "cifar10": (3, 32, 10), "cifar100": (3, 32, 100), "fashion_mnist": (1, 28, 10), "tiny_imagenet": (3, 64, 200),
    "imagenet": (3, 224, 1000), "imagenette": (3, 224, 10), "carvana": (3, 256, 1), "nyu_v2": (3, 256, 1),
}  # fmt: skip


table = cache(tables.read_table)


def of(name: str, network: str, method: str) -> dict[str, Any]:
    return tables.parameters(table(name), (network, method))


def built(params: dict[str, Any]) -> tuple[nn.Module, Shape]:
    """A row's network on the meta device, and the shape of its images."""
    channels, size, classes = DATA[params["data"]["name"]]
    assert (params["data"]["crop"] or {"size": params["data"]["image_size"] or size})["size"] == size
    return build(json.dumps(params["model"]), (channels, size, size), classes), (channels, size, size)


@cache
def build(model: str, shape: Shape, classes: int) -> nn.Module:
    network = json.loads(model)
    with torch.device("meta"):
        return models.build(network.pop("name"), input_shape=shape, classes=classes, **network)


def method_of(params: dict[str, Any]) -> tuple[Any, list[str]]:
    """The hook of the row's compress method, as the first training makes it, and what it says on coverage of the row's network."""
    block = {**params["train"]["compress"], "fit": params["train"]["fit"]}
    return covered(json.dumps(block), *built(params))


@cache
def covered(block: str, model: nn.Module, shape: Shape) -> tuple[Any, list[str]]:
    chosen = json.loads(block)
    hook = methods.load("compress", chosen["method"]).create(methods.options("compress", "block", chosen))
    return hook, hook.coverage(model, shape)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def kernels(model: nn.Module) -> dict[tuple[int, int], list[str]]:
    """The ungrouped convolutions but for the first, by the size of their kernels."""
    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    found: dict[tuple[int, int], list[str]] = {(1, 1): [], (3, 3): []}
    for name, module in convolutions[1:]:
        if module.groups == 1:
            found[module.kernel_size].append(name)  # type: ignore[index]
    return found


def test_every_table_is_tested() -> None:
    assert set(tables.tables()) == test_recipes.CELLS.keys() | test_recipes_revive.CELLS.keys() | CELLS.keys()


def test_every_cell_of_the_papers_tables_has_a_row() -> None:
    own = {name: table(name).expected for name in CELLS}
    assert {name: sum(cell is not None for row in rows.values() for cell in row.values()) for name, rows in own.items()} == CELLS


def test_expected_figures_are_the_papers() -> None:
    for name, errors in ERRORS.items():
        expected = table(name).expected
        for network, cells in errors.items():
            wanted = [(round(100 - error, 2), deviation) for error, deviation in cells]
            assert [expected[network]["base"], expected[network]["select"]] == wanted, (name, network)
    condensed = table("condensenet_cifar10").expected
    assert condensed["condensenet_182"]["lgc"] == (100 - 3.76, None)
    assert condensed["condensenet_182_dropout"]["select"] == (100 - 3.50, None)
    expected = table("diet_imagenette").expected
    for network, cells in DIETS.items():
        found = [expected[network][method] for method in ("full", "diet", "diet_kd", "random_init")]
        assert found == [(cell, None) for cell in cells]


@pytest.mark.parametrize("name", CELLS)
def test_every_row_can_be_trained_by_a_method_that_treats_its_network(name: str) -> None:
    asked = runner._options([name, "--share", "0.1"])
    for row in tables.rows_of(table(name), ["*"]):
        short = runner.job(name, table(name), row, 0, asked).params["train"]
        params = of(name, *row)
        assert short["compress"] == params["train"]["compress"], "their schedules are shares of the training"
        assert short["fit"]["epochs"] == round(params["train"]["fit"]["epochs"] / 10)
        _, notes = method_of(params)
        assert bool(notes) is (params["train"]["compress"]["method"] != "finetune"), row  # at least the first or the last layer


@pytest.mark.parametrize(("name", "network"), [(name, network) for name, cells in ERRORS.items() for network in cells])
def test_selective_rows_redirect_every_1x1_convolution_and_close_the_3x3_ones(name: str, network: str) -> None:
    params = of(name, network, "select")
    (hook, _), layers = method_of(params), kernels(built(params)[0])
    assert hook.sources == dict.fromkeys(layers[1, 1], 3) and layers[1, 1]
    assert set(hook.units) == {*layers[1, 1], *layers[3, 3]} and not hook.measured
    assert bool(layers[3, 3]) is (network != "resnext_29")  # its own work in groups, and are left alone
    assert params["train"]["compress"]["max_pointers"] == LIMITED.get((name, network))
    assert params["train"]["compress"]["gamma"] == 0.001 and params["train"]["compress"]["until"] == 0.5
    assert of(name, network, "base") == {
        **params,
        "train": params["train"] | {"compress": of(name, network, "base")["train"]["compress"]},
    }


def test_condensenets_rows_treat_its_1x1_convolutions_alone() -> None:
    for network, method in (("condensenet_182", "lgc"), ("condensenet_182_dropout", "select")):
        params = of("condensenet_cifar10", network, method)
        (hook, _), model = method_of(params), built(params)[0]
        layers = kernels(model)[1, 1]
        assert len(layers) == 90 and count(model) == 13_792_906
        assert hook.names == layers
        assert params["model"]["dropout"] == (0.1 if method == "select" else 0.0) and params["train"]["fit"]["epochs"] == 600
        if method == "select":
            assert not hook.sources, "closed channels are to be cut out"
        else:
            assert (params["train"]["compress"]["groups"], params["train"]["compress"]["until"]) == (4, 0.5)


def test_rows_train_as_their_papers_do() -> None:
    def fit(name: str, network: str, method: str) -> list[Any]:
        found = of(name, network, method)
        keys = ("epochs", "batch_size", "optimizer", "lr", "nesterov", "weight_decay", "schedule")
        return [*(found["train"]["fit"][key] for key in keys), found["augment"]["pad"], found["augment"]["flip"]]

    nesterov = ["sgd", 0.1, True, 1e-4, "cosine"]
    assert fit("selective_cifar10", "densenet_40", "select") == [300, 64, *nesterov, 4, True]
    assert fit("selective_cifar100", "resnet_164", "select") == [300, 64, *nesterov, 4, True]
    assert fit("selective_fashion_mnist", "resnext_29", "base") == [300, 128, *nesterov, 4, True]
    assert fit("selective_tiny_imagenet", "densenet_100", "select") == [200, 128, *nesterov, 8, True]
    assert fit("condensenet_cifar10", "condensenet_182", "lgc") == [600, 64, *nesterov, 4, True]
    adam = ["adam", 1e-5, False, 0.0, "constant"]
    assert fit("diet_imagenette", "rednet_26", "diet") == [700, 32, *adam, 0, True]
    assert fit("diet_imagenette", "vgg16", "random_init") == [100, 32, *adam, 0, True]
    for network in ("densenet_40", "densenet_100", "resnet_164", "resnext_29"):
        assert of("selective_tiny_imagenet", network, "base")["model"]["stem"] == "tiny"  # a first convolution of stride 2


@cache
def on_diet(name: str, network: str) -> tuple[int, int]:
    """Parameters of the row's network, and of what a diet makes of it: by the first group, as no group has weights here."""
    params = of(name, network, "diet")
    model, shape = built(params)
    options = params["train"]["compress"]
    protect = tuple(options["protect"])
    smaller, _ = diet(model, shape, groups=options["groups"], score="first", concat=options["concat"], protect=protect)
    return count(model), count(smaller)


@pytest.mark.parametrize(("name", "network"), SIZES)
def test_diets_have_the_published_sizes(name: str, network: str) -> None:
    assert on_diet(name, network) == SIZES[name, network]
    cuts = {key: of(name, network, "diet")["train"]["compress"][key] for key in ("method", "groups", "target", "concat", "protect")}
    for method in ("diet_kd", "random_init", "random_group"):
        assert cuts.items() <= of(name, network, method)["train"]["compress"].items()


@pytest.mark.parametrize(
    ("name", "network"),
    [*SIZES, *((f"diet_{data}", network) for data in ("cifar10", "fashion_mnist") for network in ("cifar_quick", "resnet_20"))],
)
def test_the_l1_control_keeps_as_many_parameters_as_the_diet(name: str, network: str) -> None:
    params = of(name, network, "l1")
    model, shape = built(params)
    options, channels = dict(params["train"]["compress"]), follow(model, shape)
    scores = dict.fromkeys(filters_of(channels), 0.0)  # which filters go does not matter to their number
    how = {key: options[key] for key in ("share", "target", "multiple", "scope", "protect")}
    assert options["residual"] == "tied"
    gone = choose(model, shape, channels, scores, **how).channels
    assert count(shrink(model, shape, drop(channels, gone))) == on_diet(name, network)[1]


def test_the_rows_of_a_diet_differ_in_what_their_names_say() -> None:
    plain = of("diet_imagenette", "resnet_18", "diet")["train"]
    teacher = {"loss": "softmax_mse", "weight": 1.0, "temperature": 4.0}
    for method, changes in {
        "diet_kd": {"distill": teacher},
        "random_init": {"weights": "random"},
        "random_group": {"score": "random"},
    }.items():
        assert of("diet_imagenette", "resnet_18", method)["train"] == plain | {"compress": plain["compress"] | changes}
    for name in ("diet_imagenette", "diet_unet", "diet_cifar10", "diet_fashion_mnist"):
        for network, rows in table(name).expected.items():
            for method in rows:
                found = runner.job(name, table(name), (network, method), 0, runner._options([name])).sources
                wanted = [] if method == "full" else [(name, (network, "full"), 0)]
                assert [(source.table, source.row, source.seed) for source in found] == wanted

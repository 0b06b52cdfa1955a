"""The tables on reviving: their figures, that every row can be trained, and what a shorter training changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipes import project  # noqa: F401  # a fixture

import recipes.run as runner
from pipeline import methods, models
from pipeline.errors import InputError
from pipeline.revive.reactivation import eligible
from recipes import tables

pytestmark = pytest.mark.usefixtures("project")

# Table -> cells that the paper's tables have. Tiny-ImageNet's rows are there three times: the paper does not say what it shows.
CELLS = {"reactivation_cifar10": 8, "reactivation_sweeps_cifar10": 24, "reactivation_tiny_imagenet": 3 * 12, "restart_cifar10": 18}
FIGURES = [
    ("reactivation_cifar10", "resnet_32", "reactivation", (93.91, 0.06)),
    ("reactivation_cifar10", "resnet_110", "grafting", (94.73, 0.11)),
    ("reactivation_sweeps_cifar10", "resnet_32", "beta_0.7", (93.72, None)),
    ("reactivation_sweeps_cifar10", "resnet_32", "every_50", (93.56, None)),
    ("reactivation_sweeps_cifar10", "resnet_110", "alpha_0.1_gamma_0.1", (94.56, None)),
    ("reactivation_tiny_imagenet", "resnet_50", "weight_evolution", (63.23, 0.27)),
    ("reactivation_tiny_imagenet", "resnet_101_native", "reactivation", (66.72, 0.40)),
    ("restart_cifar10", "mininet", "uniform_3", (79.66, None)),
    ("restart_cifar10", "alexnet", "minmax", (80.86, None)),
    ("restart_cifar10", "alexnet_pretrained", "uniform_2", (91.60, None)),
    ("restart_cifar10", "mininet", "extra_3", None),
]


def of(name: str, network: str, method: str) -> dict[str, Any]:
    return tables.parameters(tables.read_table(name), (network, method))


def test_every_cell_of_the_papers_tables_has_a_row() -> None:
    own = {name: tables.read_table(name).expected for name in tables.tables() if name.startswith(("reactivation", "restart"))}
    found = {name: sum(cell is not None for row in expected.values() for cell in row.values()) for name, expected in own.items()}
    assert found == CELLS


@pytest.mark.parametrize(("name", "network", "method", "figure"), FIGURES)
def test_expected_figures_are_the_papers(name: str, network: str, method: str, figure: tuple[float, float | None] | None) -> None:
    assert tables.read_table(name).expected[network][method] == figure


@pytest.mark.parametrize("name", CELLS)
def test_every_row_can_be_trained_by_a_method_that_treats_its_network(name: str) -> None:
    asked = runner._options([name, "--share", "0.1"])
    for row in tables.rows_of(table := tables.read_table(name), ["*"]):
        params = runner.job(name, table, row, 0, asked).params
        tables.check(params)
        network = dict(params["model"])
        size = (params["data"]["crop"] or {"size": {"cifar10": 32, "tiny_imagenet": 64}[params["data"]["name"]]})["size"]
        classes = {"cifar10": 10, "tiny_imagenet": 200}[params["data"]["name"]]
        with torch.device("meta"):
            model = models.build(network.pop("name"), input_shape=(3, size, size), classes=classes, **network)
        revive = params["train"]["revive"]
        options = methods.options("revive", "block", {**revive, "fit": params["train"]["fit"]})
        methods.load("revive", revive["method"]).create(options).coverage(model, (3, size, size))
        if revive["method"] == "reactivation":
            assert eligible(model)
        if name.startswith("restart"):
            assert ("start_from" in of(name, *row)["train"]) is (row[1] != "baseline")


def test_rows_differ_in_what_their_names_say() -> None:
    usual = {"method": "reactivation", "alpha": 0.2, "beta": 0.3, "gamma": 0.05, "every": 10, "selection": "norm"}
    usual |= {"rounding": "floor", "max_ratio": None, "momentum": "keep"}
    revive = lambda *row: of(*row)["train"]["revive"]  # noqa: E731
    assert revive("reactivation_cifar10", "resnet_32", "reactivation") == usual
    assert revive("reactivation_cifar10", "resnet_110", "reactivation") == usual | {"gamma": 0.1}
    assert revive("reactivation_cifar10", "resnet_110", "random") == usual | {"gamma": 0.1, "selection": "random"}
    assert revive("reactivation_tiny_imagenet", "resnet_18", "reactivation") == usual | {"alpha": 0.1}
    for name in tables.read_table("reactivation_sweeps_cifar10").expected["resnet_32"]:
        words = name.split("_")
        said = {key: float(value) if key != "every" else int(value) for key, value in zip(words[::2], words[1::2], strict=True)}
        assert revive("reactivation_sweeps_cifar10", "resnet_32", name) == usual | said
    assert revive("reactivation_sweeps_cifar10", "resnet_110", "every_25") == usual | {"every": 25, "gamma": 0.1}


def test_a_share_of_the_epochs_shortens_everything_that_counts_epochs() -> None:
    def shortened(name: str, network: str, method: str) -> tuple[Any, dict[str, Any], list[int]]:
        found = runner.job(name, tables.read_table(name), (network, method), 2, runner._options([name, "--share", "0.1"]))
        train = found.params["train"]
        return train["fit"]["epochs"], train["revive"], [source.params["train"]["fit"]["epochs"] for source in found.sources]

    assert shortened("reactivation_cifar10", "resnet_32", "reactivation")[1]["every"] == 1
    epochs, evolution, _ = shortened("reactivation_cifar10", "resnet_110", "weight_evolution")
    assert (epochs, evolution["period"], evolution["steepness"], evolution["share"]) == (20, 6, 1.5, 0.2)
    assert shortened("restart_cifar10", "mininet", "uniform_2")[::2] == (4, [8])
    assert shortened("restart_cifar10", "mininet", "extra_3")[::2] == (12, [8])
    with pytest.raises(InputError, match="give one"):
        runner._options(["reactivation_cifar10", "--share", "0.1", "--epochs", "3"])
    for wrong in ("0", "1.5", "-0.1", "half"):
        with pytest.raises(SystemExit):
            runner._options(["reactivation_cifar10", "--share", wrong])


def test_a_restart_starts_from_the_baseline_of_its_seed_and_its_own_data(tmp_path: Path) -> None:
    name, data = "restart_cifar10", tmp_path / "cifar10.npz"
    data.touch()
    asked = runner._options([name, "--data", str(data)])
    found = runner.job(name, tables.read_table(name), ("mininet", "he"), 1, asked)
    (source,) = found.sources
    assert (source.table, source.row, source.seed) == (name, ("mininet", "baseline"), 1)
    assert source.params["data"]["root"] == found.params["data"]["root"] == str(data)


def test_public_weights_are_linked_and_missing_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "restart_cifar10"
    found = runner.job(name, tables.read_table(name), ("alexnet_pretrained", "baseline"), 0, runner._options([name]))
    assert found.start == Path("data/start") and found.params["train"]["start_layers"] == ["features.*"]
    monkeypatch.chdir(tmp_path)
    Path("data/start").mkdir(parents=True)
    with pytest.raises(InputError, match="data/start holds no weights that restart_cifar10 alexnet_pretrained/baseline"):
        found.networks()
    torch.save({"features.0.weight": torch.zeros(2)}, "data/start/alexnet.pth")
    found.out.mkdir(parents=True)
    folder = runner.start_folder(found)
    assert [path.name for path in folder.iterdir()] == ["000.pth"] and next(folder.iterdir()).resolve().is_file()
    torch.save({"features.0.weight": torch.ones(2)}, "data/start/alexnet.pth")
    assert runner.start_name(found) != folder.name

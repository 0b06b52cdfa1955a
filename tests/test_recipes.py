"""The tables of recipes/ are the paper's, each of their rows can be trained, and the runner trains every one once."""

import shutil
import statistics
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_chain import call, write_parameters
from small_table import out, record, run, weights, workspace, write

import recipes.run as runner
from pipeline import files, models
from pipeline.overparameterize import overparameterize
from pipeline.resume import Resume
from pipeline.sources import ROOT
from recipes import tables

__all__ = ["workspace"]  # a fixture

# Table -> the number of cells in the paper's, and some of them.
CELLS: dict[str, int] = {"kflo_cifar10": 30, "kflo_cifar100": 30}
CELLS |= {"kflo_ablation_cifar10": 20, "kflo_ablation_cifar100": 20, "kflo_transfer": 24}
FIGURES = [
    ("kflo_cifar10", "cifar_quick", "plain", 86.26, 0.22),
    ("kflo_cifar10", "vgg16", "ema", 93.87, 0.17),
    ("kflo_cifar10", "wrn_28_10", "kflo_2x4", 96.22, 0.12),
    ("kflo_cifar100", "cifar_quick", "kflo_2x4", 59.78, 0.25),
    ("kflo_cifar100", "wrn_16_8", "do_conv", 79.01, 0.28),
    ("kflo_cifar100", "wrn_28_5", "acnet", 79.64, 0.32),
    ("kflo_ablation_cifar10", "wrn_16_8", "kflo_2x1", 95.50, 0.17),
    ("kflo_ablation_cifar10", "wrn_28_2", "kflo_3x2", 91.98, 0.14),
    ("kflo_ablation_cifar100", "wrn_28_10", "kflo_2x4", 81.33, 0.20),
    ("kflo_ablation_cifar100", "wrn_28_2", "kflo_3x2", 68.21, 0.39),
    ("kflo_transfer", "wrn_16_8", "plain_tl", 71.20, 0.41),
    ("kflo_transfer", "wrn_28_5", "kflo_2x4_tl", 71.60, 0.22),
    ("kflo_transfer", "wrn_28_10", "plain", 70.79, 0.41),
]


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's root as the working directory."""
    monkeypatch.chdir(ROOT)


def interrupt_after(saves: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C after so many epochs; a list of the epochs that were trained."""
    save, epochs = Resume.save, []

    def stop(self: Resume, run: Any, hooks: Any) -> None:
        save(self, run, hooks)
        epochs.append(run.epoch)
        if len(epochs) == saves:
            raise KeyboardInterrupt

    patch.setattr(Resume, "save", stop)
    return epochs


def test_every_cell_of_the_papers_tables_has_a_row(project: None) -> None:
    found = {name: len(tables.rows_of(tables.read_table(name), ["*"])) for name in tables.tables() if name.startswith("kflo")}
    assert found == CELLS


@pytest.mark.parametrize(("name", "network", "method", "mean", "std"), FIGURES)
def test_expected_figures_are_the_papers(project: None, name: str, network: str, method: str, mean: float, std: float) -> None:
    assert tables.read_table(name).expected[network][method] == (mean, std)


@pytest.mark.parametrize("name", CELLS)
def test_every_row_can_be_trained(project: None, name: str) -> None:
    asked = runner._options([name])
    for row in tables.rows_of(table := tables.read_table(name), ["*"]):
        params = runner.job(name, table, row, 0, asked).params
        tables.check(params)
        network, expansion = dict(params["model"]), dict(params["train"]["overparameterize"])
        with torch.device("meta"):
            classes = {"cifar10": 10, "cifar100": 100}[params["data"]["name"]]
            model = models.build(network.pop("name"), input_shape=(3, 32, 32), classes=classes, **network)
            before = sum(parameter.numel() for parameter in model.parameters())
            overparameterize(model, **expansion)
        ratio = sum(parameter.numel() for parameter in model.parameters()) / before
        assert (ratio == 1) == (expansion["method"] == "none")
        if expansion["method"] == "kflo":  # W1 alone is `width` times a layer, and a mixer is at least a layer's outputs squared
            assert ratio > expansion["width"]
            assert row[1].removesuffix("_tl") == f"kflo_{expansion['depth']}x{expansion['width']}"


def test_rows_train_as_their_papers_do(project: None) -> None:
    def fit(name: str, row: str, *keys: str) -> list[Any]:
        network, _, method = row.partition("/")
        found = tables.parameters(tables.read_table(name), (network, method))["train"]["fit"]
        return [found[key] for key in ("epochs", "batch_size", "lr", "nesterov", "weight_decay", "schedule")]

    steps = {"every": 60, "factor": 0.1}
    assert fit("kflo_cifar100", "cifar_quick/ema") == [150, 128, 0.1, False, 1e-4, "cosine"]
    assert fit("kflo_cifar10", "vgg16/kflo_2x4") == [400, 128, 0.1, False, 1e-4, "cosine"]
    assert fit("kflo_ablation_cifar100", "wrn_28_10/kflo_3x2") == [200, 64, 0.1, True, 5e-4, steps]
    assert fit("kflo_transfer", "wrn_28_10/kflo_2x4") == [200, 64, 0.1, True, 5e-4, steps]
    assert fit("kflo_transfer", "wrn_28_10/kflo_2x4_tl") == [200, 64, 0.01, True, 5e-4, steps]
    data = {name: tables.read_table(name).data for name in CELLS}
    assert {name: (data[name]["name"], data[name]["per_class"]) for name in CELLS} == {
        "kflo_cifar10": ("cifar10", None),
        "kflo_cifar100": ("cifar100", None),
        "kflo_ablation_cifar10": ("cifar10", None),
        "kflo_ablation_cifar100": ("cifar100", None),
        "kflo_transfer": ("cifar100", 200),
    }
    acnet = tables.parameters(tables.read_table("kflo_cifar10"), ("wrn_28_5", "acnet"))["train"]["overparameterize"]
    assert acnet == {"method": "acnet", "layers": ["*"], "gamma": 1.0, "norms": "add"}


def test_transfer_starts_from_as_many_cifar10_networks_as_kflo_is_wide(project: None) -> None:
    def sources(method: str, seed: int) -> list[tuple[str, tuple[str, str], int, str]]:
        found = runner.job("kflo_transfer", table, ("wrn_28_2", method), seed, asked).sources
        return [(job.table, job.row, job.seed, job.params["data"]["name"]) for job in found]

    asked, table = runner._options(["kflo_transfer"]), tables.read_table("kflo_transfer")
    there = [("kflo_cifar10", ("wrn_28_2", "plain"), seed, "cifar10") for seed in range(4)]
    assert sources("plain_tl", 0) == there[:1] and sources("plain_tl", 2) == there[2:3]
    assert sources("kflo_2x1_tl", 1) == there[1:2]
    assert sources("kflo_2x4_tl", 0) == there
    assert sources("kflo_2x4_tl", 3) == [there[3], *there[:3]]
    assert sources("kflo_2x4", 0) == sources("plain", 0) == []


@pytest.mark.parametrize(("epochs", "every"), [(200, 60), (100, 30), (30, 9), (1, 1)])
def test_steps_of_the_learning_rate_move_with_the_epochs(project: None, epochs: int, every: int) -> None:
    params = tables.parameters(tables.read_table("kflo_cifar10"), ("wrn_28_2", "plain"))
    fit = tables.shorten(params, epochs)["train"]["fit"]
    assert fit == params["train"]["fit"] | {"epochs": epochs, "schedule": {"every": every, "factor": 0.1}}


@pytest.mark.parametrize("row", ["cifar_quick/acnet", "vgg16/ema", "wrn_28_10/do_conv", "wrn_16_8/kflo_2x4"])
def test_a_row_as_params_yaml_builds_the_chain(row: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "recipes", "recipes", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    write_parameters(workspace, yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert run("kflo_cifar10", "--params", row, "--epochs", "3") == 0
    written = capsys.readouterr().out
    (workspace / "params.yaml").write_text(written)
    Path("data/start").mkdir(parents=True)
    assert call("check") == 0
    network, _, method = row.partition("/")
    wanted = tables.shorten(tables.parameters(tables.read_table("kflo_cifar10"), (network, method)), 3)
    found = yaml.safe_load(written)
    assert {key: found[key] for key in tables.SECTIONS} == wanted | {"train": wanted["train"] | {"start": "data/start"}}


def test_ours_stand_beside_the_papers_and_are_trained_once(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("small", "quick/plain", "quick/kflo", "--seeds", "0", "2", "--epochs", "1") == 0
    said = capsys.readouterr().out
    scores = {
        row: [100 * record(row, seed)["metrics"]["test_accuracy"] for seed in (0, 2)] for row in ("quick/plain", "quick/kflo")
    }
    assert scores["quick/plain"][0] != scores["quick/plain"][1]
    for row, paper, reported in (("quick/plain", 50, "50.00 ± 0.50"), ("quick/kflo", 60, "60.00")):
        mean = statistics.fmean(scores[row])
        spread = abs(scores[row][0] - scores[row][1]) / 2**0.5  # of two, the sample deviation
        line = f"| {row} | 1 of 2 | 0 2 | {mean:.2f} ± {spread:.2f} | {reported} | {mean - paper:+.2f} | "
        assert line in said and line in Path("outputs/recipes/small/table.md").read_text()
    assert said.count(" seed ") == 4

    before = {path: path.stat().st_mtime_ns for path in Path("outputs/recipes/small").rglob("*/*/*/*/model/*")}
    assert len(before) == 8 and run("small", "quick/plain", "quick/kflo", "--seeds", "0", "2", "--epochs", "1") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = capsys.readouterr().out
    assert " seed " not in again and said.endswith(again)
    assert record("quick/plain")["parameters"]["train"]["fit"]["schedule"] == {"every": 1, "factor": 0.1}


def test_transfer_trains_what_is_missing_and_each_seed_puts_another_network_first(workspace: Path) -> None:
    assert run("small", "quick/transfer", "--seeds", "1", "--epochs", "1") == 0
    (start,) = out("quick/transfer", 1).glob("start-*")
    plain = [out("quick/plain", seed) / "model" for seed in (1, 0)]
    assert [path.resolve() for path in sorted(start.iterdir())] == [path.resolve() for path in plain]
    assert record("quick/transfer", 1)["parameters"]["train"]["start"] == str(start)
    assert "not taken over" not in " ".join(record("quick/transfer", 1)["notes"])  # same classes: all fits
    assert weights("quick/plain", 0) != weights("quick/plain", 1)

    card = files.read_json(plain[1] / "model.json")  # as if it had been trained again, into something else
    files.write_json(plain[1] / "model.json", card | {"weights_sha256": "0" * 64})
    assert run("small", "quick/transfer", "--seeds", "1", "--epochs", "1") == 2
    shutil.rmtree(out("quick/plain", 0))
    assert run("small", "quick/transfer", "--seeds", "1", "--epochs", "1") == 0
    assert not out("quick/plain", 0).exists(), "what a finished row started from is not trained again"


def test_an_interrupted_row_goes_on_where_it_was(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("small", "quick/transfer", "--seeds", "0") == 0
    undisturbed = weights("quick/transfer", 0, "full")
    shutil.rmtree(out("quick/transfer", 0, "full"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        assert run("small", "quick/transfer", "--seeds", "0") == 130
    assert "goes on where it was saved last" in capsys.readouterr().err
    assert run("small", "quick/transfer", "--seeds", "0", "--epochs", "1") == 0, "another length does not touch it"
    with pytest.MonkeyPatch.context() as patch:
        epochs = interrupt_after(-1, patch)
        assert run("small", "quick/transfer", "--seeds", "0") == 0
    assert epochs == [2]
    assert weights("quick/transfer", 0, "full") == undisturbed
    assert [epoch["epoch"] for epoch in record("quick/transfer", 0, "full")["history"]] == [1, 2]
    assert not list(Path("outputs").rglob("resume"))


def test_runners_that_want_the_same_data_prepare_it_once(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, calls, found = runner.prepare, [], []
    monkeypatch.setattr(runner, "prepare", lambda *words: (calls.append(words), prepare(*words)))
    data = tables.read_table("small").data
    threads = [threading.Thread(target=lambda: found.append(runner.prepared(data))) for _ in range(3)]
    with runner.alone(Path("outputs/recipes/data")):
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert threads[0].is_alive() and not calls, "another runner was in the folder"
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(set(found)) == 1 and len(found) == 3
    assert not [path for path in found[0].parent.iterdir() if path.name not in (".lock", found[0].name)]


def test_a_table_takes_over_from_its_base_what_it_does_not_change(workspace: Path) -> None:
    kflo = {"overparameterize": {"method": "expandnet", "ratio": 4}}
    write(
        {"base": "small", "paper": "Another", "train": {"fit": {"lr": 0.2}}, "methods": {"kflo": kflo}, "expected": {"quick": {}}},
        "other",
    )
    first, second = tables.read_table("small"), tables.read_table("other")
    assert second.model_dump(exclude={"paper", "expected", "train", "methods"}) == first.model_dump(
        exclude={"paper", "expected", "train", "methods"}
    )
    assert (second.paper, second.expected) == ("Another", {"quick": {}})
    assert second.train == first.train | {"fit": first.train["fit"] | {"lr": 0.2}}
    assert second.methods == first.methods | {"kflo": kflo}, "options of KFLO are none of ExpandNet's"

"""What the runner of recipes/ refuses: mistakes on its command line and in tables, and trainings made with something else."""

from pathlib import Path
from typing import Any

import pytest
from mistakes import CUT
from small_table import changed, out, run, weights, workspace, write

__all__ = ["workspace"]  # a fixture


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.fit.lr", 0.05, "was trained with train.fit.lr = 0.1, now 0.05: move it away to train again"),
        ("methods.plain", {"ema": 0.9}, "was trained with train.ema = None, now 0.9: "),
        ("data.validation", 0.6, "was trained with other data than raw holds: "),
    ],
)
def test_a_row_trained_with_something_else_is_not_reused(
    workspace: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, message: str
) -> None:
    assert run("small", "quick/plain", "--seeds", "3", "--epochs", "1") == 0
    before = weights("quick/plain", 3)
    write(changed(key, value))
    capsys.readouterr()
    assert run("small", "--seeds", "3", "--epochs", "1") == 2
    said = capsys.readouterr()
    assert f"recipes.run: {out('quick/plain', 3)} {message}" in said.err and len(said.err.splitlines()) == 1
    assert " seed " not in said.out and weights("quick/plain", 3) == before
    if not key.startswith("data"):
        assert run("small", "quick/kflo", "--seeds", "0", "--epochs", "1") == 0
        table = Path("outputs/recipes/small/table.md").read_text()
        assert "| quick/plain" not in table and "- quick/plain/1-epochs/3: " in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "there is no table 'tiny'; tables are small"),
        (["../params"], "there is no table '../params'; tables are small"),
        (["small", "plain"], "no row fits 'plain'; rows are quick/plain, quick/kflo, quick/transfer"),
        (["small", "quick/plain", "quick/*_tl"], "no row fits 'quick/*_tl'; rows are"),
        (["small", "--seeds", "0", "0"], "--seeds 0 0: each must be there once"),
        (["small", "--seeds", "-1"], "argument --seeds: '-1' is no whole number from 0 up"),
        (["small", "--epochs", "0"], "argument --epochs: '0' is no whole number from 1 up"),
        (["small", "--data", "none.npz"], "--data none.npz does not exist: give the folder or the .npz file"),
        (["small", "--params"], "--params prints one row; give one of quick/plain, quick/kflo, quick/transfer"),
    ],
)
def test_mistakes_on_the_command_line_are_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert message in said and said.splitlines()[-1].startswith(("recipes.run: ", "python -m recipes.run: error: "))
    assert not Path("outputs").exists()


PLACE = "recipes/small.yaml, quick/transfer: "


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("paper", CUT, "recipes/small.yaml: paper is missing"),
        ("speed", 1, "recipes/small.yaml: speed is not a parameter"),
        ("networks.quick.fit", {}, "recipes/small.yaml: networks.quick.fit is not a parameter"),
        (
            "expected.quick.plain",
            [50.0],
            "recipes/small.yaml: expected.quick.plain = [50.0]: must be [mean, standard deviation or null]",
        ),
        ("expected.slow", {"plain": [1.0, 1.0]}, "recipes/small.yaml: expected.slow is none of the networks quick"),
        ("expected.quick.ema", [1.0, 1.0], "recipes/small.yaml: expected.quick.ema is none of the methods plain, kflo, transfer"),
        ("base", "small", "recipes/small.yaml: base leads back to itself"),
        ("base", "big", "recipes/small.yaml: base = 'big': there is no table 'big'"),
        ("train.fit.lr", CUT, "recipes/small.yaml, quick/plain: train.fit.lr is missing"),
        ("data.name", "cifar", "recipes/small.yaml, quick/plain: data.name = 'cifar': must be"),
        ("networks.quick.model", {"name": "slow"}, "recipes/small.yaml, quick/plain: model.name = 'slow': must be one of"),
        ("methods.transfer.start_from.count", 3, f"{PLACE}train.start_from: must have count <= of"),
        ("methods.transfer.start_from.method", "transfer", f"{PLACE}recipes/small.yaml, quick/transfer: train.start_from: must"),
        ("methods.transfer.start_from.method", "ema", f"{PLACE}train.start_from: small has no row quick/ema"),
        ("methods.transfer.start_from.table", "big", f"{PLACE}there is no table 'big'; tables are small"),
        ("methods.transfer.start_from.seed", 3, f"{PLACE}train.start_from.seed is not a parameter"),
    ],
)
def test_mistakes_in_a_table_are_refused_by_file_and_key(
    workspace: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, message: str
) -> None:
    write(changed(key, value))
    assert run("small", "--epochs", "1") == 2
    said = capsys.readouterr().err
    assert f"recipes.run: {message}" in said and len(said.splitlines()) == 1
    assert not Path("outputs").exists()

"""The rounds of partial restart: when they end, and what happens between them."""

from typing import Any

import pytest
import torch
from test_restart import network, options
from torch import Tensor

from pipeline.evaluation import evaluate
from pipeline.hooks import Hook, Run
from pipeline.revive.restart import Restart, least_useful, taylor_scores
from pipeline.training import train


def ready(make_run: Any, **changes: Any) -> tuple[Run, Restart]:
    """A run that has finished one round, whose ranking found what the next one will find again."""
    run, restart = make_run(network()), Restart(options(**changes))
    restart.coverage(run.model, run.input_shape)
    run.rounds, run.round, run.epoch = restart.rounds(5), 2, 5
    run.history = [{"round": 1, "validation_accuracy": evaluate(run.model, run.validation).accuracy}]
    first_two = [batch for batch, _ in zip(run.train.epoch(5), range(2), strict=False)]
    scores = taylor_scores(run.model, restart.watched, first_two, criterion="per_example")
    restart.load_state({"useless": least_useful(scores, 3), "baseline": evaluate(run.model, run.validation).accuracy}, {})
    return run, restart


@pytest.mark.parametrize("final_epochs", [0, 7])
@pytest.mark.parametrize("why", ["same filters", "below", "target", ""])
def test_restarts_end_when_they_repeat_themselves_lose_too_much_or_reach_the_target(
    make_run: Any, why: str, final_epochs: int
) -> None:
    run, restart = ready(make_run, final_epochs=final_epochs, max_drop=0.02, target=0.9 if why == "target" else None)
    if why != "same filters":
        restart.load_state({**restart.state(), "useless": {"conv1": [0]}}, {})
    run.history[0]["validation_accuracy"] += {"below": -0.0201, "target": 0.9, "": -0.0199}.get(why, 0)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    goes_on = restart.begin_round(run)
    kept = all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert run.rounds == ([5] if why else [5, 5]) + [7] * (final_epochs > 0)
    assert goes_on is (not why or final_epochs > 0) and kept is bool(why)
    assert run.events[-1]["kind"] == ("stop" if why else "restart") and why in run.events[-1].get("reason", "")


class Optimisers(Hook):
    """Keeps every optimiser that makes a step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def penalty(self, run: Run, *tensors: Tensor) -> None:
        self.seen += [run.optimizer] * (run.optimizer not in self.seen)


def test_each_round_resets_and_trains_with_a_fresh_optimiser_and_final_epochs_reset_nothing(make_run: Any) -> None:
    trained = []
    for _ in range(2):
        run, restart, optimisers = (
            make_run(network(expanded=True), lr=0.01, epochs=2),
            Restart(options(final_epochs=1)),
            Optimisers(),
        )
        trained.append(train(run, [restart, optimisers]).state_dict())
        resets = [event for event in run.events if event["kind"] == "restart"]
        assert [(event["round"], event["epoch"], event["filters"]) for event in resets] == [(1, 0, 19), (2, 2, 19)]
        assert [row["round"] for row in run.history] == [1, 1, 2, 2, 3] and len(optimisers.seen) == 3
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_a_round_ends_when_its_training_loss_has_not_fallen_for_as_long_as_patience(make_run: Any) -> None:
    run, restart = make_run(network()), Restart(options(patience=2))
    run.round = 2
    ended = []
    for loss in (1.0, 0.8, 0.9, 0.79, 0.79, 0.8):
        run.history += [{"round": 1, "train_loss": 0.0}, {"round": 2, "train_loss": loss}]
        ended.append(restart.after_epoch(run))
    assert ended == [False] * 5 + [True]


def test_the_authors_loop_goes_on_where_algorithm_1_stops(make_run: Any) -> None:
    run, restart = ready(make_run, stop_on_repeat=False)
    assert restart.begin_round(run) and run.events[-1]["kind"] == "restart" and run.rounds == [5, 5]


def test_algorithm_1_trains_until_the_loss_stalls_before_it_resets_anything(make_run: Any) -> None:
    run = make_run(network(), epochs=8, lr=1e-9)  # the loss falls by chance alone
    restart = Restart(options(train_first=True, patience=1, restarts=1, fit={"epochs": 8}))
    train(run, [restart])
    first = [row for row in run.history if row["round"] == 1]
    losses = [row["train_loss"] for row in first]
    assert 1 < len(losses) < 8 and losses[-1] >= losses[-2] and losses[:-1] == sorted(losses[:-1], reverse=True)
    assert [(event["kind"], event["epoch"]) for event in run.events] == [("restart", len(losses))]
    assert restart.baseline == pytest.approx(first[-1]["validation_accuracy"])


def test_the_random_control_resets_as_many_filters_of_the_same_layers_together_but_others(make_run: Any) -> None:
    found = []
    for criterion, seed in (("per_example", 0), ("random", 0), ("random", 0), ("random", 1)):
        run, restart = make_run(network()), Restart(options(criterion=criterion))
        run.seed = seed
        restart.coverage(run.model, run.input_shape)
        run.rounds, run.round = restart.rounds(5), 1
        assert restart.begin_round(run)
        found.append(restart.useless)
        assert run.events[-1]["filters"] == sum(map(len, restart.useless.values())) == 19
    assert found[0] != found[1] == found[2] != found[3]

"""The rule that chooses what is shipped, against tables worked out by hand and against a plain search."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sample_records
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.champion import choose, figures
from pipeline.deployment import Champion
from pipeline.errors import InputError
from pipeline.files import read_json
from pipeline.lineage import chains

ABSENT = {"kind": "absent", "provider": "cuda", "reason": "no device"}
COST = "latency_cpu_b1_p50_ms"


def rule(best: str = "accuracy", at_most: dict[str, float] | None = None, at_least: dict[str, float] | None = None) -> Champion:
    return Champion(best=best, at_most=at_most or {}, at_least=at_least or {})


def variant(name: str, score: float, precision: str = "fp32", headline: str = "accuracy", **profile: float) -> list[dict[str, Any]]:
    """The records of export and profile of one variant; its score on the test split is the opposite of the one that counts."""
    identity: dict[str, Any] = {"revive": name, "compress": "none", "seed": 0, "precision": precision}
    scores = {f"validation_{headline}": score, f"test_{headline}": 1 - score, "loss": 0.0}
    asked = {"profile": {"providers": ["cpu", "cuda"], "batch_sizes": [1, 32]}}
    export = sample_records.record("export", f"{name}-none-0", metrics=scores, **identity)
    profiled = sample_records.record("profile", f"{name}-none-0", metrics=profile, parameters=asked, events=[ABSENT], **identity)
    return [export, profiled]


def table(*variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for records in variants for record in records]


THREE = table(
    variant("a", 0.989, size_mb=1.5, **{COST: 1.0}),
    variant("b", 0.986, size_mb=0.9, **{COST: 1.9}),
    variant("b", 0.985, "int8", size_mb=0.3, **{COST: 0.7}),
)


def test_the_best_validation_score_within_the_limits_is_chosen_and_the_reason_has_the_figures():
    found = choose(THREE, rule(at_most={COST: 2, "size_mb": 1}))
    assert (found["champion"], found["revive"], found["seed"], found["precision"]) == ("b-none-0", "b", 0, "fp32")
    assert found["reason"] == (
        "highest validation accuracy (98.6 %) of the 2 of 3 that keep latency_cpu_b1_p50_ms <= 2 and size_mb <= 1; "
        "next: b-none-0-int8 (98.5 %)"
    )
    assert (found["feasible"], found["candidates"], found["within"], found["nearest"], found["missed"]) == (True, 3, 2, None, {})
    assert found["values"] == {"accuracy": 0.986, COST: 1.9, "size_mb": 0.9}
    assert choose(THREE, rule())["champion"] == "a-none-0"
    assert choose(THREE, rule(at_most={COST: 0.8}))["reason"] == (
        "the only one of 3 that keeps latency_cpu_b1_p50_ms <= 0.8; its validation accuracy is 98.5 %"
    )
    json.dumps(found, allow_nan=False)


def test_a_cost_is_best_where_it_is_lowest_and_a_gain_where_it_is_highest():
    assert choose(THREE, rule("size_mb", at_least={"accuracy": 0.986}))["champion"] == "b-none-0"
    assert choose(THREE, rule("size_mb"))["reason"] == "lowest size_mb (0.3) of all 3; next: b-none-0 (0.9)"
    sped = table(variant("a", 0.9, speedup_cpu_b1=1.0), variant("b", 0.8, speedup_cpu_b1=3.0))
    assert choose(sped, rule("speedup_cpu_b1"))["champion"] == "b-none-0"


def test_a_limit_that_is_met_exactly_is_kept():
    assert choose(THREE, rule(at_most={"size_mb": 0.9}))["champion"] == "b-none-0"
    assert choose(THREE, rule(at_least={"accuracy": 0.989}))["within"] == 1


def test_of_equal_scores_the_faster_then_the_smaller_then_the_first_is_chosen():
    by_time = table(variant("a", 0.9, size_mb=1, **{COST: 2}), variant("b", 0.9, size_mb=2, **{COST: 1}))
    found = choose(by_time, rule())
    assert found["champion"] == "b-none-0" and found["reason"].endswith("next: a-none-0 (equal, but not faster or smaller)")
    by_size = table(variant("a", 0.9, size_mb=2, **{COST: 1}), variant("b", 0.9, size_mb=1, **{COST: 1}))
    assert choose(by_size, rule())["champion"] == "b-none-0"
    same = table(variant("b", 0.9, size_mb=1), variant("a", 0.9, size_mb=1))
    assert choose(same, rule())["champion"] == "b-none-0"
    # Times of two processes say less than the speed-ups measured in pairs.
    paired = table(variant("a", 0.9, speedup_cpu_b1=3.0, **{COST: 1.1}), variant("b", 0.9, speedup_cpu_b1=2.0, **{COST: 1.0}))
    assert choose(paired, rule())["champion"] == "a-none-0"


def test_where_none_is_within_the_limits_the_nearest_is_named_with_what_it_misses():
    found = choose(THREE, rule(at_most={"size_mb": 0.25, COST: 0.5}))
    assert found["champion"] is found["revive"] is found["seed"] is found["precision"] is None and not found["feasible"]
    assert found["nearest"] == "b-none-0-int8"
    assert found["missed"]["size_mb"] == {"value": 0.3, "limit": 0.25, "excess": pytest.approx(0.2), "why": None}
    assert found["missed"][COST]["excess"] == pytest.approx(0.4)
    assert found["reason"] == (
        "none of the 3 keeps size_mb <= 0.25 and latency_cpu_b1_p50_ms <= 0.5; nearest: b-none-0-int8, whose size_mb of 0.3 "
        "misses the limit by 20 % and whose latency_cpu_b1_p50_ms of 0.7 misses the limit by 40 %"
    )
    json.dumps(found, allow_nan=False)


def test_a_figure_that_was_not_measured_keeps_a_variant_out_and_the_reason_is_said():
    found = choose(THREE, rule(at_most={"latency_cuda_b1_p50_ms": 1}))
    assert found["champion"] is None and found["nearest"] == "a-none-0"
    assert "whose latency_cuda_b1_p50_ms is unknown (cuda is absent: no device)" in found["reason"]
    half = THREE[:1] + THREE[2:]  # a was not profiled
    assert choose(half, rule(at_most={"size_mb": 9}))["champion"] == "b-none-0"
    assert choose(half[:1] + half[3:], rule(COST))["champion"] == "b-none-0-int8"
    only = choose(half, rule(at_most={"size_mb": 0.2}))
    assert only["nearest"] == "b-none-0-int8"  # an unknown figure is farther away than any known one


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (rule("test_accuracy"), "test_accuracy is of the test split"),
        (rule(at_most={"loss": 0.1}), "loss is of the test split"),
        (rule(at_most={"latency_cpu_b1_p05_ms": 1}), "names 'latency_cpu_b1_p05_ms'.*there are accuracy, .*latency_cpu_b1_p50_ms"),
        (rule("latency_cuda_b2_p50_ms"), "names 'latency_cuda_b2_p50_ms'"),
        (rule(at_most={"size_mb": 1}, at_least={"size_mb": 2}), "at_least.size_mb is above at_most.size_mb"),
    ],
)
def test_names_and_limits_that_cannot_be_are_refused(bad, said):
    with pytest.raises(InputError, match=said):
        choose(THREE, bad)


def test_no_records_are_a_mistake():
    with pytest.raises(InputError, match="dvc repro"):
        choose([], rule())


def test_accuracy_is_the_headline_of_the_task():
    masks = table(variant("a", 0.7, headline="iou", size_mb=1), variant("b", 0.8, headline="iou", size_mb=1))
    assert choose(masks, rule())["reason"] == "highest validation IoU (80.0 %) of all 2; next: a-none-0 (70.0 %)"
    assert choose(masks, rule("iou"))["champion"] == choose(masks, rule("validation_iou"))["champion"] == "b-none-0"


def test_no_figure_of_the_test_split_can_be_named():
    for chain in chains(sample_records.grid((0,), precisions=("fp32", "int8"))):
        known = figures(chain)
        assert (
            not any("test" in name for name in known) and "loss" not in known and known["accuracy"] == known["validation_accuracy"]
        )


NUMBER = st.integers(1, 4).map(float)
ROWS = st.lists(st.tuples(NUMBER, NUMBER, NUMBER, st.booleans()), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.one_of(st.none(), NUMBER), st.one_of(st.none(), NUMBER), st.booleans())
def test_the_choice_is_what_a_plain_search_finds(rows, size, score, cheapest):
    records = []
    for index, (accuracy, latency, megabytes, timed) in enumerate(rows):
        records += variant(f"v{index}", accuracy / 10, size_mb=megabytes, **({COST: latency} if timed else {}))
    limits = rule(
        "size_mb" if cheapest else "accuracy",
        {} if size is None else {"size_mb": size},
        {} if score is None else {"accuracy": score / 10},
    )
    found = choose(records, limits)
    inside = [
        index
        for index, (accuracy, _, megabytes, _) in enumerate(rows)
        if megabytes <= (size or math.inf) and accuracy / 10 >= (score or 0) / 10
    ]
    assert found["within"] == len(inside)
    if not inside:
        misses = {
            index: max((megabytes - size) / size if size else 0, (score - accuracy) / score if score else 0)
            for index, (accuracy, _, megabytes, _) in enumerate(rows)
        }
        assert found["champion"] is None
        assert misses[int(found["nearest"][1])] == pytest.approx(min(misses.values()))
        return
    order = []
    for index in inside:
        accuracy, latency, megabytes, timed = rows[index]
        order.append((megabytes if cheapest else -accuracy, latency if timed else math.inf, megabytes, index))
    assert found["champion"] == f"v{min(order)[-1]}-none-0"


def test_the_stage_writes_the_decision_and_says_it_in_a_sentence(tmp_path, monkeypatch, capsys):
    from stages import champion

    records = sample_records.grid((0,), ("finetune",), ("none", "diet"), ("fp32", "int8"))
    sample_records.write(records, tmp_path / "outputs")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params |= {"variants": {"revive": ["finetune"], "compress": ["none", "diet"]}}
    params["champion"] = {"best": "accuracy", "at_most": {"size_mb": 0.1}, "at_least": {}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    champion.main()
    written = read_json(Path("outputs/champion/champion.json"))
    assert written == choose(records, rule(at_most={"size_mb": 0.1})) and written["champion"] == "finetune-none-0-int8"
    assert capsys.readouterr().out == f"champion: finetune-none-0-int8: {written['reason']}\n"

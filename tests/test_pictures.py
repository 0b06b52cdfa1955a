"""Pictures of predictions: what they show is what was answered, they stay small, and the page shows them with what is true."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import sample_records
from PIL import Image

from pipeline import report
from pipeline.lineage import chains
from pipeline.pictures import MASK, MISTAKES, Pictures, _depth_colours
from pipeline.report import page, predictions, rows, table
from pipeline.tracking import final_metrics

COUNT = 50


def card(task: str, shape: tuple[int, int, int] = (1, 8, 12)) -> dict[str, Any]:
    half = [0.5] * shape[0]
    classes = [f"kind {n}" for n in range(4)] if task == "classify" else ["thing"]
    return {"task": task, "classes": classes, "input": {"shape": list(shape), "mean": half, "std": half, "crop": None}}


def drawn(task: str, shape: tuple[int, int, int] = (1, 8, 12)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 pixels, targets and outputs of COUNT test images."""
    draw = np.random.default_rng(1)
    pixels = draw.integers(0, 256, (COUNT, *shape), dtype=np.uint8)
    if task == "classify":
        targets = draw.integers(0, 4, COUNT)
        outputs = np.eye(4, dtype=np.float32)[np.where(draw.random(COUNT) < 0.6, targets, (targets + 1) % 4)]
        return pixels, targets, outputs
    size = COUNT, *shape[1:]
    if task == "segment":
        return pixels, (draw.random(size) < 0.4).astype(np.float32), draw.standard_normal((COUNT, 1, *shape[1:]), np.float32)
    targets = (1 + 4 * draw.random(size)).astype(np.float32)
    outputs = targets[:, None] * (1 + 0.2 * draw.standard_normal((COUNT, 1, *shape[1:]), np.float32))
    targets[:, 0, 0] = 0
    return pixels, targets, outputs


def watched(task: str, batch: int = 16, **changes: Any) -> dict[str, Any]:
    described = card(task, **changes)
    pixels, targets, outputs = drawn(task, **changes)
    pictures = Pictures(described, COUNT)
    images = ((pixels / 255 - 0.5) / 0.5).astype(np.float32)
    for start in range(0, COUNT, batch):
        part = slice(start, start + batch)
        pictures.add(images[part], targets[part], outputs[part])
    return pictures.event()


def decoded(content: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image.convert("RGB"))


def test_classes_show_images_from_all_over_and_the_first_mistakes() -> None:
    pixels, targets, outputs = drawn("classify")
    said, event = outputs.argmax(1), watched("classify")
    wrong = np.flatnonzero(said != targets)
    spread = [one["number"] for one in event["shown"] if one["spread"]]
    assert len(spread) == 12 and np.diff(spread).max() - np.diff(spread).min() <= 1 and spread[0] < 4 and spread[-1] >= COUNT - 4
    assert event["mistakes"] == len(wrong) > MISTAKES and event["images"] == COUNT
    assert [one["number"] for one in event["shown"] if one["mistake"]] == wrong[:MISTAKES].tolist()
    assert {one["number"] for one in event["shown"]} == {*spread, *wrong[:MISTAKES].tolist()}
    for one in event["shown"]:
        number = one["number"]
        assert (one["target"], one["answer"]) == (f"kind {targets[number]}", f"kind {said[number]}")
        assert one["right"] == (targets[number] == said[number])
        assert np.array_equal(decoded(one["image"])[..., 0], pixels[number, 0])


def test_masks_show_what_was_missed_and_what_is_not_there() -> None:
    pixels, targets, outputs = drawn("segment")
    event = watched("segment")
    for one in event["shown"]:
        true, found = targets[one["number"]] > 0, outputs[one["number"], 0] > 0
        assert np.array_equal(decoded(one["image"])[..., 0], pixels[one["number"], 0])
        assert np.array_equal(decoded(one["target"]), np.array(MASK)[true.astype(int)])
        for value, where in enumerate((~true & ~found, true & found, ~true & found, true & ~found)):
            assert (decoded(one["answer"])[where] == MASK[value]).all()
        assert one["score"] == pytest.approx((true & found).sum() / (true | found).sum())
    assert len(event["shown"]) == 6 and not {"mistakes", "range_m"} & event.keys()


def test_depths_share_one_scale_from_the_nearest_to_the_farthest_true_one() -> None:
    _, targets, outputs = drawn("depth")
    event, colours = watched("depth"), np.array(_depth_colours())
    shown = np.stack([targets[one["number"]] for one in event["shown"]])
    low, high = event["range_m"]
    assert (low, high) == (pytest.approx(shown[shown > 0].min(), abs=0.006), pytest.approx(shown.max(), abs=0.006))
    for one in event["shown"]:
        for key, depth in (("target", targets[one["number"]]), ("answer", outputs[one["number"], 0])):
            picture = decoded(one[key])
            level = np.argmin(np.abs(picture[..., None, :].astype(int) - colours).sum(-1), -1)
            assert np.array_equal(level == 0, depth <= 0)
            wanted = (np.clip(depth, low, high) - low) / (high - low)
            assert np.abs((level - 1) / 63 - wanted)[depth > 0].max() < 0.6 / 63
    assert len({tuple(color) for color in colours.tolist()}) == 65


@pytest.mark.parametrize("task", ["classify", "segment", "depth"])
def test_pictures_of_large_images_stay_below_the_limit(task: str) -> None:
    event = watched(task, shape=(3, 150, 200))  # random pixels, which no format makes smaller
    assert len(json.dumps(event)) < 100_000
    first = decoded(event["shown"][0]["image"])
    assert first.shape[1] in (64, 48, 32, 24) and first.shape[0] == round(first.shape[1] * 0.75)
    assert watched(task, batch=50) == watched(task, batch=7)


class Images(HTMLParser):
    """The pictures of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "img":
            self.found.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


NAMES = {"classify": ("accuracy", "top1_agreement"), "segment": ("iou", "mask_agreement"), "depth": ("delta1", "depth_agreement")}
BESIDE = {"classify": {}, "segment": {"test_dice": 0.75}, "depth": {"test_rmse_m": 0.321, "test_abs_rel": 0.0625}}


def records(task: str) -> list[dict[str, Any]]:
    """A small grid as a chain of this task writes it, with pictures."""
    made = sample_records.grid((0,), ("finetune", "restart"), ("none", "diet"))
    headline, agreement = NAMES[task]
    text = json.dumps(made).replace("accuracy", headline).replace("top1_agreement", agreement)
    made = json.loads(text)
    for entry in made:
        if entry["stage"] == "export":
            entry["events"] = [watched(task)]
            entry["metrics"] |= BESIDE[task]
    return made


@pytest.mark.parametrize("task", NAMES)
def test_the_page_shows_pictures_beside_those_of_the_control(task: str) -> None:
    made = rows.build(records(task))
    text = page.render(made)
    parsed = Images(text)
    assert all(
        re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", image["src"] or "") and image["alt"] for image in parsed.found
    )
    event = watched(task)
    shown = len(event["shown"])
    if task == "classify":
        assert len(parsed.found) == 4 * (12 + 12)
        assert f"the first 12 of {event['mistakes']} on 50 test images" in parsed.text and "kind 1 (kind 0)" in parsed.text
    else:
        assert len(parsed.found) == shown * (3 + 3 * 4)  # the control has no row for the control
        assert "control, finetune-none-0" in parsed.text and "this variant, restart-diet-0" in parsed.text
        assert f"{table.columns(made)[0].title} {100 * event['shown'][0]['score']:.1f} %" in parsed.text
    without = page.render(rows.build([entry | {"events": []} for entry in records(task)]))
    assert not Images(without).found and "predictions on test images" not in without


def test_only_pictures_of_the_same_images_stand_beside_each_other() -> None:
    one, two = (chain for chain in chains(records("segment")) if chain.compress == "none")
    assert "control, finetune-none-0" in predictions.render(two, one)
    one.records["export"]["events"][0]["shown"][0]["number"] += 1
    assert "control" not in predictions.render(two, one) and predictions.render(two, None)


def test_names_of_classes_are_shown_and_never_run() -> None:
    made = records("classify")
    text = json.dumps(made).replace("kind 1", "<script>alert(1)</script>")
    drawn_page = predictions.render(chains(json.loads(text))[0], None)
    assert "<script" not in drawn_page and "&lt;script&gt;" in drawn_page


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_a_report_calls_the_score_by_its_own_name_everywhere(task: str, tmp_path: Any) -> None:
    made = report.write(records(task), tmp_path)
    headline, title = NAMES[task][0], {"segment": "IoU", "depth": "δ1"}[task]
    texts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".html", ".csv", ".md", ".json", ".svg")}
    for name, text in texts.items():
        assert "accuracy" not in text.lower(), name
    assert f"{title} against cost" in texts["index.html"] and f"Highest {title}" in texts["index.html"]
    assert f"test {title}, %" in texts["tradeoff-macs.svg"] and f"validation {title}, %" in texts["curves-0.svg"]
    assert f"{headline}_onnx" in texts["table.csv"] and headline in json.loads(texts["metrics.json"])["restart-diet-0"]
    shown = report.format_table(made)
    assert title in shown and ("75.00 %" if task == "segment" else "0.321 m") in shown
    metrics = final_metrics(made.chains[0])
    assert metrics[headline] == made.rows[0].values["accuracy_onnx"] and metrics["error_percent"] == 100 * (1 - metrics[headline])
    assert {name.removeprefix("test_"): value for name, value in BESIDE[task].items()}.items() <= metrics.items()
    assert "98.05 %" in shown and "validation_" + headline in json.dumps(records(task))

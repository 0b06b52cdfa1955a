"""What the scores of each task are called, in records and in words. Nothing here computes: `pipeline.tasks` does.

Every task has a headline: a share in [0, 1], higher is better. Methods select, certify and compare by it as "accuracy"; records,
MLflow and the report call it by its own name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Names:
    """A task's names: `headline` as in `test_HEADLINE` of a record's metrics, `title` in words, `meaning` in a sentence."""

    task: str
    headline: str
    title: str
    meaning: str
    agreement: str  # metric: the share of answers in which two networks agree
    agree: str  # the same in words
    beside: dict[str, tuple[str, str]] = field(default_factory=dict)  # scores beside the headline: title, and how it is written

    def rename(self, key: str) -> str:
        """A name that holds "accuracy" as this task's records and tables write it."""
        return key.replace("accuracy", self.headline)


NAMES = {
    names.task: names
    for names in (
        Names("classify", "accuracy", "accuracy", "Accuracy on the test split", "top1_agreement", "same class"),
        Names(
            "segment",
            "iou",
            "IoU",
            "IoU on the test split: intersection over union of the foreground, over the pixels of all images together; "
            "Dice is twice the intersection over the sum of both areas",
            "mask_agreement",
            "same mask",
            {"dice": ("Dice", "percent")},
        ),
        Names(
            "depth",
            "delta1",
            "δ1",
            "δ1 on the test split: the share of pixels whose depth is off by a factor below 1.25; RMSE and the mean absolute error "
            "relative to the true depth over the same pixels, those of known depth",
            "depth_agreement",
            "same depth",
            {"rmse_m": ("RMSE", "metres"), "abs_rel": ("rel. error", "percent")},
        ),
    )
}
PERCENT = {names.headline for names in NAMES.values()} | {"dice"}


def of_metrics(metrics: Iterable[Mapping[str, Any]]) -> Names:
    """The names of the task whose headline the records' metrics hold; classification's where they hold none."""
    for found in metrics:
        for names in NAMES.values():
            if f"test_{names.headline}" in found:
                return names
    return NAMES["classify"]


def is_share(key: str) -> bool:
    """Whether a fact of an event called `key` is a headline score, as validation_iou_after."""
    return "accurac" in key or not PERCENT.isdisjoint(key.split("_"))

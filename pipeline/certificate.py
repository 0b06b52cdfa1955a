"""Proof that two networks compute the same, on real images."""

import torch
from torch import nn

from pipeline.data.batches import Batches
from pipeline.errors import InputError

TOLERANCE = 1e-4  # of the largest |logit|: fp32 sums in another order differ by about 1e-6


@torch.no_grad()
def certify(before: nn.Module, after: nn.Module, batches: Batches) -> dict[str, float]:
    """Compare the logits of two networks in evaluation mode on every image of `batches`, in fp32.

    Returns the accuracy of `after`, the largest absolute difference and the share of images with the same top class.
    `InputError` where a logit differs by more than TOLERANCE times the largest one.
    """
    before.eval()
    after.eval()
    worst, largest = torch.zeros(()), torch.zeros(())  # torch's maximum, unlike Python's, keeps a NaN
    agree, correct, count = 0, 0, 0
    for images, labels in batches.epoch(0):
        old, new = before(images), after(images)
        worst, largest = worst.maximum((old - new).abs().max().cpu()), largest.maximum(old.abs().max().cpu())
        agree += int((old.argmax(1) == new.argmax(1)).sum())
        correct += int((new.argmax(1) == labels).sum())
        count += len(labels)
    if not (worst.isfinite() and worst <= TOLERANCE * largest.clamp(min=1.0)):
        raise InputError(
            f"collapse: the merged network differs by {worst:.3g} from the trained one (largest logit {largest:.3g}); "
            "its kernels may be too large for fp32: lower the learning rate or the depth of the over-parameterisation"
        )
    return {"test_accuracy": correct / count, "max_abs_difference": float(worst), "top1_agreement": agree / count}

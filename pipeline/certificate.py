"""Proof that two networks compute the same, on real images."""

import torch
from torch import nn

from pipeline.data.batches import Batches
from pipeline.errors import InputError
from pipeline.tasks import TASKS, Tally

TOLERANCE = 1e-4  # of the largest |output|: fp32 sums in another order differ by about 1e-6


@torch.no_grad()
def certify(before: nn.Module, after: nn.Module, batches: Batches) -> dict[str, float]:
    """Compare the outputs of two networks in evaluation mode on every image of `batches`, in fp32.

    Returns the scores of `after`, the largest absolute difference and the share of answers that agree (of images, or of pixels
    where each has its answer), by the names that the task of the data has for them. `InputError` where an output differs by more
    than TOLERANCE times the largest one.
    """
    before.eval()
    after.eval()
    task = TASKS[batches.prepared.task]
    worst, largest = torch.zeros(()), torch.zeros(())  # torch's maximum, unlike Python's, keeps a NaN
    tally, agree, count = Tally(task), 0, 0
    for images, targets in batches.epoch(0):
        old, new = before(images), after(images)
        worst, largest = worst.maximum((old - new).abs().max().cpu()), largest.maximum(old.abs().max().cpu())
        same, of = task.agreement(old, new)
        agree, count = agree + int(same), count + of
        tally.add(new, targets)
    if not (worst.isfinite() and worst <= TOLERANCE * largest.clamp(min=1.0)):
        raise InputError(
            f"collapse: the merged network differs by {worst:.3g} from the trained one (largest output {largest:.3g}); "
            "its kernels may be too large for fp32: lower the learning rate or the depth of the over-parameterisation"
        )
    return {**tally.metrics(), "max_abs_difference": float(worst), task.names.agreement: agree / count}

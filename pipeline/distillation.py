"""A teacher as a hook: the network as it enters the stage teaches the one that leaves it.

Source: Lee 2022, "A Novel Filter Pruning Algorithm for Vision Tasks based on Kernel Grouping" (JAIST, hdl.handle.net/10119/17665),
"with KD". Its formulas are garbled; hard labels and the squared difference of softened outputs is what the text means.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import hooks
from pipeline.config import Distill
from pipeline.overparameterize import collapse
from pipeline.tasks import check_options


class Distillation(hooks.Hook):
    """Adds weight * D(student, teacher) to the loss. It stands before the method that changes the network, so the teacher is
    the parent; it runs in evaluation mode, without gradients."""

    def __init__(self, options: Distill) -> None:
        self.options = options

    def prepare(self, run: hooks.Run) -> None:
        check_options(run.task, run.stage, run.fit, self.options)
        self.teacher = collapse(copy.deepcopy(run.model)).eval().requires_grad_(False).to(run.device)

    def penalty(self, run: hooks.Run, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(images).float()
        return self.options.weight * distance(logits.float(), target, self.options.loss, self.options.temperature)


def distance(student: Tensor, teacher: Tensor, loss: str, temperature: float) -> Tensor:
    """How far logits (B, K) are apart, or outputs (B, 1, H, W): there a pixel counts as an image that has two classes, the logit of
    the second one 0, so that softmax is the sigmoid; `logit_mse` is the only one for depths, which are no logits.

    softmax_mse   mean over all elements of (softmax(s / t) - softmax(t' / t))^2: the thesis's loss as its text means it
    logit_mse     mean over all elements of (s - t')^2
    kl            t^2 * KL(softmax(t' / t) || softmax(s / t)), mean over images (Hinton et al.)
    """
    if loss == "logit_mse":
        return F.mse_loss(student, teacher)
    if student.ndim > 2:
        student, teacher = (torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, -2) for logits in (student, teacher))
    if loss == "softmax_mse":
        return F.mse_loss((student / temperature).softmax(1), (teacher / temperature).softmax(1))
    log_student, log_teacher = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

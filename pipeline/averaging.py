"""The moving average of weights (EMA) as a training option: what is kept in the end is the average, not the last step.

Source: Polyak and Juditsky 1992; the exponential form, and as a rival of KFLO, in "Utilizing Excess Resources in Training Neural
Networks", which states no decay. Statistics of batch norms are the last ones of training. Each round (of restarts) has an average
of its own; edits between two epochs come into it as slowly as training
does (with selective convolution the average of a slot that was opened again mixes what it read before: leave epochs after the last
event).
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.hooks import Hook, Run


class Averaging(Hook):
    """average <- decay * average + (1 - decay) * weights after every step; the first step is the first average."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: AveragedModel | None = None
        self.kept: dict[str, Tensor] = {}
        self.begins = False

    def begin_round(self, run: Run) -> bool:
        self.begins = True  # with an edit: the weights before it are no part of the average, once there is a step
        return True

    def after_step(self, run: Run) -> None:
        if self.begins:
            self.average, self.kept, self.begins = None, {}, False
        self._of(run).update_parameters(run.model)

    def finish(self, run: Run) -> None:
        if self.average is not None or self.kept:  # kept alone: this process only finishes what another trained
            with torch.no_grad():
                for own, mean in zip(run.model.parameters(), self._of(run).module.parameters(), strict=True):
                    own.copy_(mean)

    def _of(self, run: Run) -> AveragedModel:
        if self.average is None:
            self.average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
            if self.kept:
                self.average.load_state_dict(self.kept)
        return self.average

    def tensors(self) -> dict[str, Tensor]:
        return self.average.state_dict() if self.average else self.kept

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.kept = tensors

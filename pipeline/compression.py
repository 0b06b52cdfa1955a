"""What a compress block brings to a training, in the chain's stage and in the first training alike."""

from typing import Any

from pipeline import methods
from pipeline.distillation import Distillation
from pipeline.hooks import Hook
from pipeline.sensitivity import around


def compress_hooks(options: Any) -> list[Hook]:
    """The hooks of a compress block: its teacher, which is taken before the method makes the network smaller, the method, and
    around it what tells how sensitive the layers are."""
    teacher: list[Hook] = [Distillation(options.distill)] if options.distill else []
    return around([*teacher, methods.load("compress", options.method).create(options)], options.sensitivity)

"""In which numbers a forward pass computes: bf16, fp16 or fp32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context of a forward pass: bf16 or fp16 where asked, or, for "auto", bf16 where the hardware multiplies in it."""
    if precision == "fp32" or (precision == "auto" and not has_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

"""Redirected channels: a slot that was freed reads another channel, moved by a fraction of a pixel.

Source: Jeong and Shin 2019, "Training CNNs with Selective Allocation of Channels" (ICML), and its code,
github.com/jh-jeong/selective-convolution at 8aafd93. While a network trains, the shift is learnt through a bilinear sampler
(`Distribute`). Once it is constant, the sampler is a gather and one small depthwise convolution of at most four taps a channel
that are not 0 (`Redirect`).

output(y, x) = input(y + down, x + right), bilinear, coordinates clamped to the image. A shift is counted in pixels. Theirs is, but
for the 1/W that `align_corners=True` takes away, where the image is square; elsewhere it is scaled by the mean of both sides.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Redirect(nn.Module):
    """(B, C, H, W) -> (B, S, H, W): slot i reads channel `index[i]`; those after the first `len(still)` are moved by their taps.

    still: (S - M,) channels read as they are; moved: (M,) channels that are moved; taps: (M, 1, 2P + 1, 2P + 1), P >= 1, over the
    image with its border repeated P times.
    """

    still: Tensor
    moved: Tensor
    taps: Tensor

    def __init__(self, still: Tensor, moved: Tensor, taps: Tensor) -> None:
        super().__init__()
        self.register_buffer("still", still.clone())
        self.register_buffer("moved", moved.clone())
        self.register_buffer("taps", taps.clone())

    @property
    def index(self) -> Tensor:
        """(S,): the channel that each slot reads."""
        return torch.cat([self.still, self.moved])

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.moved):
            return x.index_select(1, self.still)
        reach = self.taps.shape[-1] // 2
        moved = F.pad(x.index_select(1, self.moved), (reach, reach, reach, reach), mode="replicate")
        moved = F.conv2d(moved, self.taps.to(moved.dtype), groups=len(self.moved))
        return torch.cat([x.index_select(1, self.still), moved], 1) if len(self.still) else moved

    def keep(self, slots: Tensor, there: Tensor) -> None:
        """Keep these slots, by their positions in order, where of the input the channels `there`, in order, are left."""
        slots, there = slots.to(self.still.device), there.to(self.still.device)
        first = slots[slots < len(self.still)]
        rest = slots[slots >= len(self.still)] - len(self.still)
        self.still = torch.searchsorted(there, self.still[first])
        self.moved, self.taps = torch.searchsorted(there, self.moved[rest]), self.taps[rest].clone()

    def described(self) -> list[int]:
        """What `blank` needs: slots that are not moved, slots that are, the side of the taps."""
        return [len(self.still), len(self.moved), self.taps.shape[-1]]

    @staticmethod
    def blank(still: int, moved: int, side: int, **like: Any) -> "Redirect":
        """One of these sizes, with arbitrary values."""
        index = {"dtype": torch.long, **{key: value for key, value in like.items() if key == "device"}}
        return Redirect(torch.zeros(still, **index), torch.zeros(moved, **index), torch.zeros(moved, 1, side, side, **like))

    def extra_repr(self) -> str:
        return f"{len(self.still)} still, {len(self.moved)} moved"


class Distribute(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): slot i reads channel `pointer[i]`, moved by `shift[i]`; with pointer -1, channel i as it is.

    pointer: (C,); shift: (C, 2) in pixels, right and down. Only redirected slots are computed; only their shifts have gradients.
    """

    pointer: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("pointer", torch.full((channels,), -1))
        self.shift = nn.Parameter(torch.zeros(channels, 2))
        self._known: tuple[Any, Tensor] | None = None

    def redirected(self) -> Tensor:
        """The slots that read another channel. Looked up again only where the pointers were written: it waits for the device."""
        version = (self.pointer.data_ptr(), self.pointer._version)
        if self._known is None or self._known[0] != version:
            self._known = (version, (self.pointer >= 0).nonzero().flatten())
        return self._known[1]

    def forward(self, x: Tensor) -> Tensor:
        slots = self.redirected()
        if not len(slots):
            return x
        # Indexing does not keep a memory order of channels last, but for the axis that is last in memory.
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        x, axis = (x.permute(0, 2, 3, 1), 3) if last else (x, 1)
        read = x.index_select(axis, self.pointer[slots])
        new = shifted(read.permute(0, 3, 1, 2) if last else read, self.shift[slots])
        x = x.index_copy(axis, slots, new.permute(0, 2, 3, 1) if last else new)
        return x.permute(0, 3, 1, 2) if last else x

    def deployed(self) -> tuple[Tensor, "Redirect"]:
        """The order of the slots, (C,), in which a `Redirect` has those that are not moved first; and that `Redirect`."""
        slots = self.redirected()
        still = (self.pointer < 0).nonzero().flatten()
        return torch.cat([still, slots]), Redirect(still, self.pointer[slots], taps_of(self.shift.detach()[slots]))


def shifted(x: Tensor, shifts: Tensor) -> Tensor:
    """Channels (B, M, H, W), each moved by its shift (M, 2) in pixels, right and down: bilinear, coordinates clamped.

    Along either axis this is a product with a band matrix. Its gradient with respect to a shift is that of `grid_sample`, which
    takes longer on a CPU, rounds coordinates, and on CUDA adds up in an order that changes from run to run.
    """
    batch, channels, height, width = x.shape
    with torch.autocast(x.device.type, enabled=False):
        right, down = (_hats(shifts[:, axis].float(), size) for axis, size in ((0, width), (1, height)))  # (M, W, W), (M, H, H)
        rows = x.float().transpose(0, 1).reshape(channels, -1, width) @ right  # (M, B * H, W)
        columns = rows.reshape(channels, batch, height, width).transpose(2, 3).reshape(channels, -1, height) @ down
        result = columns.reshape(channels, batch, width, height).permute(1, 0, 3, 2)
    return result.to(x.dtype)


def _hats(shifts: Tensor, size: int) -> Tensor:
    """(M, size, size): the weight of the input pixel (axis 1) in the output pixel (axis 2)."""
    places = torch.arange(size, device=shifts.device)
    read = (places + shifts[:, None]).clamp(0, size - 1)
    return (1 - (read[:, None, :] - places[:, None]).abs()).clamp(min=0)


def taps_of(shifts: Tensor) -> Tensor:
    """Bilinear shifts (M, 2) in pixels, right and down, as kernels (M, 1, 2P + 1, 2P + 1), P = the largest |shift|, rounded up.

    With the border repeated P times: output(y, x) = input(y + shifts[:, 1], x + shifts[:, 0]), bilinear, coordinates clamped.
    """
    reach = max(1, math.ceil(float(shifts.abs().max()))) if len(shifts) else 1
    places = torch.arange(-reach, reach + 1, device=shifts.device)
    along = (1 - (places - shifts[..., None]).abs()).clamp(min=0)  # (M, 2, 2P + 1): the hat function around the shift
    return (along[:, 1, :, None] * along[:, 0, None, :])[:, None]

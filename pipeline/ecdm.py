"""Expected channel damage: what the outputs of a convolution lose without one of its input channels, and what follows from that.

Source: Jeong and Shin 2019, "Training CNNs with Selective Allocation of Channels" (ICML), and its code,
github.com/jh-jeong/selective-convolution at 8aafd93 (selective_convolution.py).

    ECDM      D[o, i] = m_i * g_i * sum over the kernel of W[o, i]        g: the gate, 0 for a closed channel
    m_i       mean activity of input channel i; behind a batch norm (shift b, scale s) and ReLU, with input ~ N(0, 1):
              E[ReLU(s x + b)] = |s| phi(b / |s|) + b Phi(b / |s|)
    shares    |D| with each row divided by its sum
    dealloc   sort channels by their largest share, and close the longest prefix whose shares sum to at most gamma for every output
    realloc   let every closed slot read one of the K channels with the largest norm of their shares, moved by up to 1.5 pixels

Functions of tensors, in fp32 (the activity, in which large numbers cancel, in fp64 inside), without gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

REACH = 1.5  # pixels: the largest first shift of a slot along an axis, as published


class Ranking(NamedTuple):
    """Channels in the order in which they would be closed, and what is lost by then."""

    order: Tensor  # (I,): channels, the least missed one first; those closed already before all others
    lost: Tensor  # (I,): the largest share of any output's activity that closing the first n + 1 of them takes away


class Refill(NamedTuple):
    """Slots that are opened again, and what they become."""

    slots: Tensor  # (S,)
    sources: Tensor  # (S,): the slot whose normalisation each copies
    channels: Tensor  # (S,): the channel that each reads: the one that its source reads
    shifts: Tensor  # (S, 2): pixels, right and down


@torch.no_grad()
def activity(scale: Tensor, shift: Tensor) -> Tensor:
    """E[ReLU(y)] for y ~ N(shift, scale^2), elementwise; at scale 0 it is ReLU(shift)."""
    spread, mean = scale.double().abs(), shift.double()
    ratio = mean / spread.clamp(min=1e-30)
    density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    return (spread * density + mean * torch.special.ndtr(ratio)).clamp(min=0).float()


@torch.no_grad()
def ecdm(weight: Tensor, mean: Tensor, gate: Tensor) -> Tensor:
    """The expected channel damage matrix (O, I) of kernels (O, I, kh, kw), activities (I,) and gates (I,)."""
    return weight.float().sum((2, 3)) * (mean * gate)


@torch.no_grad()
def shares(matrix: Tensor) -> Tensor:
    """What each channel contributes to each output, of all that reaches it: |D| with rows that sum to 1 (or to 0)."""
    return matrix.abs() / (matrix.abs().sum(1, keepdim=True) + 1e-8)


@torch.no_grad()
def rank(matrix: Tensor, closed: Tensor | None = None) -> Ranking:
    """The order of deallocation for a damage matrix (O, I) of which the channels `closed` (I,) are closed already. On the CPU,
    where sums always come out the same."""
    parts = shares(matrix.cpu())
    peak = parts.amax(0)
    order = (peak if closed is None else peak.masked_fill(closed.cpu(), -1.0)).argsort(stable=True)
    return Ranking(order, parts[:, order].cumsum(1).amax(0))


def prefix(lost: Tensor, gamma: float, multiple: int = 1) -> int:
    """How many channels of a ranking go: as many as lose at most `gamma`, or none where all could.

    With `multiple`, no more than leave a multiple of it: odd widths cost more time than they save.
    """
    channels, allowed = len(lost), int((lost <= gamma).sum())
    allowed = allowed if allowed < channels else 0
    return max(channels - -(-(channels - allowed) // multiple) * multiple, 0)


def deallocate(matrix: Tensor, gamma: float, multiple: int = 1, closed: Tensor | None = None) -> Tensor:
    """The channels to close, those that are `closed` among them: a mask (I,) for a damage matrix (O, I)."""
    order, lost = rank(matrix, closed)
    count = prefix(lost, gamma, multiple)
    mask = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True).to(matrix.device)
    return mask if closed is None else mask | closed


@torch.no_grad()
def reallocate(matrix: Tensor, gate: Tensor, pointer: Tensor, count: int, most: int | None, generator: torch.Generator) -> Refill:
    """What every closed slot becomes: a copy, moved by a random shift, of one of the `count` open ones with the largest norm.

    matrix: (O, I), damage; gate: (I,), 0 where closed; pointer: (I,), the channel that a slot reads, -1 for its own. Channels with
    more than `most` slots that read them come last, and so do these slots. Fewer open slots than `count` are all candidates. With
    `count` 0, or where nothing is closed, no slot is opened. Random numbers are drawn on the CPU.
    """
    free = (gate == 0).nonzero().flatten()
    count = min(count, len(gate) - len(free))
    if not count or not len(free):
        free, best = free[:0], free[:0]
    else:
        score = shares(matrix).norm(dim=0)
        if most is not None:
            score = score.masked_fill(crowded(pointer, most), -0.5)  # theirs is 0, as that of a slot just filled
        best = score.masked_fill(gate == 0, -1.0).argsort(descending=True, stable=True)[:count]
    drawn = torch.randint(max(len(best), 1), (len(free),), generator=generator)
    moves = (2 * torch.rand(len(free), 2, generator=generator) - 1) * REACH
    sources = best[drawn.to(best.device)]
    channels = torch.where(pointer[sources] >= 0, pointer[sources], sources)
    return Refill(free, sources, channels, moves.to(matrix.device))


def crowded(pointer: Tensor, most: int) -> Tensor:
    """A mask (I,) of the channels that more than `most` other slots read, and of these slots."""
    redirected = pointer >= 0
    over = torch.bincount(pointer[redirected], minlength=len(pointer)) > most
    return over | (redirected & over[pointer.clamp(min=0)])

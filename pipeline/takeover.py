"""What the channels that stay can take over from those that go, and what is lost even so.

A layer reads channels x with mean m and covariance C, over images and pixels. Of a closed channel r the best linear guess from
those that stay, k, is m_r + C_rk C_kk^-1 (x_k - m_k). So the layer loses least when its kernels take the guess over, at every tap
alike:

    W_k <- W_k + W_r C_rk C_kk^-1        and the constant   sum over taps of W_r (m_r - C_rk C_kk^-1 m_k)   becomes a bias,

and what it loses is the energy of W_r (x_r - guess). Channels are ranked by removing again and again the one whose going costs
least, given that all others took over what went before. This is optimal brain surgery (Hassibi and Stork 1993, "Second order
derivatives for network pruning", equations 5 to 8) of a layer's own outputs, by whole channels, and the reconstruction step of He
et al. 2017, "Channel pruning for accelerating very deep neural networks", in closed form. It extends the expected channel damage of
selective convolution (pipeline/ecdm.py), which knows means alone. Padding is passed over, as there, and so is what a kernel's taps
have in common: for kernels larger than 1x1 the loss told is that of pixels without a relation to their neighbours, and in smooth
images the true one can be larger.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.ecdm import Ranking
from pipeline.layers import edit

RIDGE = 1e-3  # of the mean variance, added to every variance: so many guesses rest on few images
FINEST = 64  # channels above which several are removed at a time: a 1/FINEST of them


class Moments(NamedTuple):
    """Of what a layer reads."""

    mean: Tensor  # (I,), fp64
    covariance: Tensor  # (I, I), fp64


@torch.no_grad()
def moments(model: nn.Module, names: Sequence[str], batches: Iterable[Any], limit: int) -> dict[str, Moments]:
    """Of what the named convolutions read in evaluation mode, over the images and pixels of at most `limit` batches."""
    sums: dict[str, list[Any]] = {}

    def watch(name: str) -> Any:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float().transpose(0, 1).flatten(1)  # (I, images * pixels)
            first, second, count = sums.get(name, (0, 0, 0))
            sums[name] = [first + x.sum(1).double(), second + (x @ x.T).double(), count + x.shape[1]]

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    model.eval()
    for images, _ in (batch for batch, _ in zip(batches, range(limit), strict=False)):
        model(images)
    for handle in handles:
        handle.remove()
    found = {}
    for name, (first, second, count) in sums.items():
        mean = first / count
        found[name] = Moments(mean, second / count - torch.outer(mean, mean))
    return found


@torch.no_grad()
def rank(weight: Tensor, covariance: Tensor, closed: Tensor | None = None) -> Ranking:
    """The order in which channels go, those that are `closed` (I,) already before all others, and which share of the energy of the
    outputs' variation is lost by then. weight: (O, I, kh, kw); covariance: (I, I)."""
    gram = torch.einsum("oit,ojt->ij", *[weight.double().flatten(2)] * 2)  # of kernels, over outputs and taps
    shut = torch.zeros(len(gram), dtype=torch.bool, device=gram.device) if closed is None else closed
    left = ~shut
    inverse = torch.zeros_like(gram)
    inside = left.nonzero().flatten()
    inverse[inside[:, None], inside] = torch.linalg.inv(_ridged(covariance[inside][:, inside]))
    whole = float((gram * covariance)[inside][:, inside].sum().clamp(min=1e-30))
    order, lost, total = [shut.nonzero().flatten()], [0.0] * int(shut.sum()), 0.0
    chunk = max(1, len(gram) // FINEST)
    while left.any():
        costs = (gram.diagonal() / inverse.diagonal()).masked_fill(~left, float("inf"))
        gone = costs.argsort(stable=True)[: min(chunk, int(left.sum()))]
        among = torch.linalg.inv(inverse[gone][:, gone])  # (S, S): the covariance of what is lost
        total += float((gram[gone][:, gone] * among).sum())
        given = among @ inverse[gone]  # (S, I): what each of the others takes over, with its sign turned
        part = gram[:, gone] @ given
        gram = gram - part - part.T + given.T @ gram[gone][:, gone] @ given
        inverse = inverse - inverse[:, gone] @ given
        left[gone] = False
        order.append(gone)
        lost += [total / whole] * len(gone)
    return Ranking(torch.cat(order), torch.tensor(lost, device=gram.device))


@torch.no_grad()
def taken(weight: Tensor, known: Moments, closed: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels (O, I, kh, kw) after those of open channels took over what `closed` ones (I,) gave, and the constant (O,) that
    the outputs lack then. The kernels of closed channels are as they were."""
    kernels, gone, staying = weight.double(), closed.nonzero().flatten(), (~closed).nonzero().flatten()
    among = _ridged(known.covariance[staying][:, staying])
    share = torch.linalg.solve(among, known.covariance[staying][:, gone])  # (K, R)
    moved = torch.einsum("orhw,kr->okhw", kernels[:, gone], share)
    missing = kernels[:, gone].sum((2, 3)) @ (known.mean[gone] - share.T @ known.mean[staying])
    return kernels.index_add(1, staying, moved).to(weight.dtype), missing.to(weight.dtype)


def take_over(layer: nn.Conv2d, known: Moments, closed: Tensor) -> Tensor:
    """Let the kernels of the layer's open channels take over what closed ones gave, in place; the constant (O,) that is missing."""
    kernels, missing = taken(layer.weight.detach(), known, closed)
    edit(layer, "weight", lambda _: kernels)
    return missing


def _ridged(covariance: Tensor) -> Tensor:
    return covariance + RIDGE * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance)).to(covariance)

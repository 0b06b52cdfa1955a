"""How strong the filters of a network are: the picture behind every revive method, taken after each epoch.

A filter's norm is the sum of the absolute values of its effective weights. Meng et al. 2020, "Filter Grafting for Deep Neural
Networks", section 3, call a filter invalid whose norm is below a threshold; its code (github.com/fxmeng/filter-grafting at ce4b88c)
counts those below 0.01.
"""

import torch
from torch import Tensor, nn

from pipeline.layers import convolutions

DEAD = 0.01
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def filter_norms(weight: Tensor) -> Tensor:
    """The L1 norm of each filter, in fp32: (O, I, kh, kw) -> (O,)."""
    return weight.detach().float().abs().sum((1, 2, 3))


def strength(model: nn.Module) -> dict[str, float]:
    """Percentiles of the norms of all convolutions' filters, and the share of dead ones; empty where there is no convolution."""
    norms = [filter_norms(layer.weight) for _, layer in convolutions(model)]
    if not norms:
        return {}
    every = torch.cat(norms)
    levels = torch.tensor(PERCENTILES, dtype=torch.float32, device=every.device) / 100
    values = torch.cat([every.quantile(levels), (every < DEAD).float().mean()[None]]).tolist()
    return {**{f"filter_norm_p{p}": value for p, value in zip(PERCENTILES, values, strict=False)}, "dead_filters": values[-1]}

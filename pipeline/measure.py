"""Parameters, multiply-adds and bytes of a network.

MAC: one multiply-add counts one. Counted are the multiply-adds of convolutions, linear layers, matrix products and involutions,
without biases; normalisation, activations, pooling and additions are not multiply-adds of filters and count nothing.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.expansion import collapse

Handle = Callable[[list[Any], list[Any]], int]

# Operations without a multiply-add of a filter, beside those that fvcore passes over (copies, comparisons and so on).
UNCOUNTED = (
    "batch_norm group_norm layer_norm instance_norm upsample_nearest2d upsample_bilinear2d grid_sampler add add_ sub "
    "mean avg_pool2d adaptive_avg_pool2d max_pool2d adaptive_max_pool2d relu6 hardtanh hardtanh_ leaky_relu_ pad "
    "index_select clone alias feature_dropout unflatten"
).split()


def count(model: nn.Module, input_shape: Sequence[int], handles: Mapping[str, Handle | None] | None = None) -> dict[str, Any]:
    """Parameters and MACs of `model` for one image of `input_shape` (C, H, W), counted by fvcore on a trace.

    Returns
      "parameters"   numbers that are trained, in the model as it is: an over-parameterised layer counts all its tensors
      "macs"         of the network as it is deployed: an over-parameterised layer counts as the layer it collapses to,
                     because a kernel is composed once a step and not at all in the deployed network
      "by_module"    MACs of every module that has any, by qualified name, containers included
      "unsupported"  how often each operation was met that nothing counts, by name: `macs` lacks whatever those do
      "uncalled"     modules with parameters that the trace never entered

    `handles` counts further operations: from an operation's name in the trace ("aten::im2col") to a function of its
    inputs and outputs (`torch.Value`) that returns its MACs; None in place of a function says the operation has none.
    An involution written with unfold ("aten::im2col", "aten::mul", "aten::sum") is named under "unsupported" until handles are
    given; `pipeline.involution` is counted.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # fvcore traces with torch.jit, which torch deprecates
        from fvcore.nn import FlopCountAnalysis, jit_handles

        deployed = collapse(copy.deepcopy(model)).eval()
        device = next((parameter.device for parameter in deployed.parameters()), torch.device("cpu"))
        analysis = FlopCountAnalysis(deployed, torch.zeros(1, *input_shape, device=device))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counted = {
            "_convolution": jit_handles.conv_flop_jit,
            "linear": jit_handles.linear_flop_jit,
            "addmm": jit_handles.addmm_flop_jit,
            "matmul": jit_handles.matmul_flop_jit,
            "mm": jit_handles.matmul_flop_jit,
            "bmm": jit_handles.bmm_flop_jit,
            "einsum": jit_handles.einsum_flop_jit,
            "addcmul": one_each,
            "addcmul_": one_each,
        }
        known = {f"aten::{name}": handle for name, handle in (dict.fromkeys(UNCOUNTED) | counted).items()}
        analysis.clear_op_handles().set_op_handle(**{**known, **(handles or {})})
        total = int(analysis.total())
    own = {name for name, module in deployed.named_modules() if any(True for _ in module.parameters(recurse=False))}
    return {
        "parameters": parameters(model),
        "macs": total,
        "by_module": {name: int(macs) for name, macs in analysis.by_module().items() if name and macs},
        "unsupported": dict(sorted(analysis.unsupported_ops().items())),
        "uncalled": sorted(analysis.uncalled_modules() & own),
    }


def one_each(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of a + b * c: one for each element, as for each tap of an involution."""
    return math.prod(outputs[0].type().sizes())


def parameters(model: nn.Module) -> int:
    """Trained numbers in the model as it is; a tensor used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_mb(path: Path) -> float:
    """Size of a file in 10^6 bytes."""
    return path.stat().st_size / 1e6

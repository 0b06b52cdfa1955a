"""The library examples of docs/library.md run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

LIBRARY = (Path(__file__).parent.parent / "docs/library.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", LIBRARY, re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_an_example_runs_and_ends_with_plain_layers(index: int) -> None:
    torch.manual_seed(0)
    loader = [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))]
    namespace: dict[str, Any] = {"loader": loader}
    exec(EXAMPLES[index], namespace)
    model: nn.Module = namespace.get("smaller", namespace["model"])
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    assert model.eval()(loader[0][0]).shape == (2, 10)


def test_timms_own_walk_merges_what_collapse_merges() -> None:
    import timm
    from timm.utils.model import reparameterize_model

    from pipeline.overparameterize import collapse, overparameterize

    x = torch.randn(2, 3, 32, 32)
    for method in ("kflo", "acnet", "do_conv", "expandnet", "dbb"):
        torch.manual_seed(0)
        model = overparameterize(timm.create_model("resnet10t", num_classes=10), method)
        model.train()(x)  # statistics of batch norms that are no defaults
        theirs = reparameterize_model(model.eval())
        ours = collapse(model)
        assert [(name, type(m)) for name, m in theirs.named_modules()] == [(name, type(m)) for name, m in ours.named_modules()]
        mine, other = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine), method
        torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=0)

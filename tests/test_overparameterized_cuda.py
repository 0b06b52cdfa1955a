"""Over-parameterised layers on CUDA: kernels in fp32 under autocast, the CPU's results, merging."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from pipeline import methods, models
from pipeline.layers import expanded, filtering_layers
from pipeline.overparameterize import collapse, kflo, overparameterize

METHODS = [name for name in methods.names("overparameterize") if name != "none"]


def steps(model: nn.Module, device: str, bf16: bool) -> nn.Module:
    """Two training steps on the same images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 16, 16, generator=generator).to(device)
    labels = torch.randint(10, (16,), generator=generator).to(device)
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    for _ in range(2):
        with parametrize.cached():
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(images).float(), labels)
                assert all(layer.weight.dtype == torch.float32 for _, layer in filtering_layers(model))
            penalty = kflo.penalty(model)
            loss = loss if penalty is None else loss + 1e-4 * penalty
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_training_on_cuda_follows_the_cpu_and_merges(method: str) -> None:
    torch.manual_seed(0)
    model = overparameterize(models.build("resnet", input_shape=(3, 16, 16), classes=10, depth=8), method)
    images = torch.randn(4, 3, 16, 16)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        cpu = steps(copy.deepcopy(model), "cpu", bf16=False)
        cuda = steps(copy.deepcopy(model), "cuda", bf16=False)
        mixed = steps(copy.deepcopy(model), "cuda", bf16=True)
        wanted = cpu(images)
        torch.testing.assert_close(cuda(images.cuda()).cpu(), wanted, atol=2e-3, rtol=2e-3)
        assert (mixed(images.cuda()).cpu() - wanted).abs().max() < 0.1 * wanted.abs().max()
        merged = collapse(copy.deepcopy(cuda))
        assert not any(expanded(layer) for _, layer in filtering_layers(merged))
        torch.testing.assert_close(merged(images.cuda()), cuda(images.cuda()), atol=1e-4, rtol=1e-4)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32

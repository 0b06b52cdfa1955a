"""Parameters and multiply-adds of the zoo against published counts; those of the networks of selective convolution and of the diet
are in test_models_dense.py, test_models_red.py and test_diet.py."""

from typing import Any

import pytest
import torch
from test_models import on_meta, parameters
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(
    ("name", "arguments", "size", "classes", "count"),
    [
        ("alexnet", {"variant": "torchvision", "dropout": 0.5}, 224, 10, 57_044_810),
        ("alexnet", {"variant": "four_convolutions", "dropout": 0.5}, 224, 10, 56_454_730),
        ("cifar_quick", {}, 32, 10, 117_034),
        ("cifar_quick", {}, 32, 100, 122_884),
        ("mininet", {"dropout": 0.5}, 224, 10, 1_322_058),
        ("resnet", {"depth": 32}, 32, 10, 464_154),
        ("resnet", {"depth": 110}, 32, 10, 1_727_962),
        ("resnet_imagenet", {"depth": 18, "stem": "imagenet"}, 224, 200, 11_279_112),
        ("resnet_imagenet", {"depth": 18, "stem": "cifar"}, 64, 200, 11_271_432),
        ("resnet_imagenet", {"depth": 34, "stem": "imagenet"}, 224, 1000, 21_797_672),
        ("resnet_imagenet", {"depth": 50, "stem": "imagenet"}, 224, 200, 23_917_832),
        ("resnet_imagenet", {"depth": 50, "stem": "cifar"}, 64, 200, 23_910_152),
        ("resnet_imagenet", {"depth": 101, "stem": "imagenet"}, 224, 200, 42_909_960),
        ("resnet_imagenet", {"depth": 101, "stem": "cifar"}, 64, 200, 42_902_280),
        ("resnet_imagenet", {"depth": 152, "stem": "imagenet"}, 224, 1000, 60_192_808),
        ("vgg16", {}, 32, 10, 14_986_698),
        ("vgg16", {}, 32, 100, 15_032_868),
        ("vgg16_bn", {"dropout": 0.5}, 224, 10, 134_309_962),
        ("wide_resnet", {"depth": 16, "width": 8, "dropout": 0.0}, 32, 10, 10_961_370),
        ("wide_resnet", {"depth": 16, "width": 8, "dropout": 0.0}, 32, 100, 11_007_540),
        ("wide_resnet", {"depth": 28, "width": 2, "dropout": 0.0}, 32, 10, 1_467_610),
        ("wide_resnet", {"depth": 28, "width": 2, "dropout": 0.0}, 32, 100, 1_479_220),
        ("wide_resnet", {"depth": 28, "width": 5, "dropout": 0.0}, 32, 10, 9_132_634),
        ("wide_resnet", {"depth": 28, "width": 5, "dropout": 0.0}, 32, 100, 9_161_524),
        ("wide_resnet", {"depth": 28, "width": 10, "dropout": 0.0}, 32, 10, 36_479_194),
        ("wide_resnet", {"depth": 28, "width": 10, "dropout": 0.0}, 32, 100, 36_536_884),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, arguments: dict[str, Any], size: int, classes: int, count: int) -> None:
    assert parameters(on_meta(name, size, classes=classes, **arguments)) == count


@pytest.mark.parametrize(
    ("name", "arguments", "size", "classes", "mega"),
    [
        ("alexnet", {"variant": "torchvision", "dropout": 0.5}, 224, 10, "710"),
        ("alexnet", {"variant": "four_convolutions", "dropout": 0.5}, 224, 10, "610"),
        ("cifar_quick", {}, 32, 10, "10.8"),
        ("resnet", {"depth": 32}, 32, 10, "68.9"),
        ("resnet", {"depth": 110}, 32, 10, "252.9"),
        ("resnet_imagenet", {"depth": 18, "stem": "imagenet"}, 224, 200, "1814"),
        ("resnet_imagenet", {"depth": 18, "stem": "imagenet"}, 64, 200, "148"),
        ("resnet_imagenet", {"depth": 18, "stem": "cifar"}, 64, 200, "2222"),
        ("resnet_imagenet", {"depth": 50, "stem": "imagenet"}, 224, 200, "4088"),
        ("resnet_imagenet", {"depth": 50, "stem": "imagenet"}, 64, 200, "334"),
        ("resnet_imagenet", {"depth": 50, "stem": "cifar"}, 64, 200, "5192"),
        ("resnet_imagenet", {"depth": 101, "stem": "imagenet"}, 224, 200, "7800"),
        ("resnet_imagenet", {"depth": 101, "stem": "imagenet"}, 64, 200, "637"),
        ("resnet_imagenet", {"depth": 101, "stem": "cifar"}, 64, 200, "10040"),
        ("vgg16", {}, 32, 10, "313.5"),
        ("vgg16_bn", {"dropout": 0.5}, 224, 10, "15466"),
        ("wide_resnet", {"depth": 16, "width": 8, "dropout": 0.3}, 32, 10, "1548"),
        ("wide_resnet", {"depth": 28, "width": 2, "dropout": 0.3}, 32, 10, "214"),
        ("wide_resnet", {"depth": 28, "width": 5, "dropout": 0.3}, 32, 10, "1318"),
        ("wide_resnet", {"depth": 28, "width": 10, "dropout": 0.3}, 32, 10, "5243"),
    ],
)
def test_multiply_adds_are_the_published_ones(name: str, arguments: dict[str, Any], size: int, classes: int, mega: str) -> None:
    model = on_meta(name, size, classes=classes, **arguments)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(1, 3, size, size))
    digits = len(mega.partition(".")[2])
    assert f"{counter.get_total_flops() / 2e6:.{digits}f}" == mega  # counts convolutions and linear layers, a MAC as two

"""Under what terms each data set may be used: a fact for each, and where it is stated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """`title` of a data set; `terms` in words; `identifier` as SPDX and model hubs write it, None where there is none; `source`,
    where the terms stand, None for data whose origin is not known here."""

    title: str
    terms: str
    identifier: str | None
    source: str | None


_DIGITS = ("CC BY 4.0 (Alpaydin and Kaynak)", "cc-by-4.0", "https://doi.org/10.24432/C50P49")
_KRIZHEVSKY = ("no licence stated by the authors", None, "https://www.cs.toronto.edu/~kriz/cifar.html")
_IMAGENET = "non-commercial research and education only: ImageNet's terms of access"
_ACCESS = "https://www.image-net.org/download.php"

LICENCES = {  # by data.name
    "digits": Licence("Optical Recognition of Handwritten Digits, through scikit-learn", *_DIGITS),
    "fashion_mnist": Licence("Fashion-MNIST", "MIT (Zalando SE)", "mit", "https://github.com/zalandoresearch/fashion-mnist"),
    "cifar10": Licence("CIFAR-10", *_KRIZHEVSKY),
    "cifar100": Licence("CIFAR-100", *_KRIZHEVSKY),
    "tiny_imagenet": Licence("Tiny ImageNet", _IMAGENET, None, _ACCESS),
    "imagenette": Licence("Imagenette", f"the selection Apache 2.0 (fast.ai); the images {_IMAGENET}", None, _ACCESS),
    "imagenet": Licence("ImageNet", _IMAGENET, None, _ACCESS),
    "folder": Licence("images of the user", "not known here: ask who gave the images", None, None),
    "scenes_segment": Licence("scenes made from the digits through scikit-learn", *_DIGITS),
    "scenes_depth": Licence("scenes made from the digits through scikit-learn", *_DIGITS),
    "carvana": Licence(
        "Carvana Image Masking Challenge",
        "for the competition and for non-commercial research and education: its rules",
        None,
        "https://www.kaggle.com/c/carvana-image-masking-challenge/rules",
    ),
    "nyu_v2": Licence(
        "NYU Depth V2", "no licence stated by the authors", None, "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
    ),
}

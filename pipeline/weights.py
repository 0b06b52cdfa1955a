"""What a network can start from: folders of other trainings, and weight files that others publish, which are state dicts in
PyTorch's and in the safetensors format. No code in them is run."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import InputError

SUFFIXES = (".safetensors", ".pth", ".pt")
NESTED = ("state_dict", "model")  # where checkpoints of other projects hold the state dict
DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")  # torchvision's published files are older than its names
PREFIX = "module."  # of every name, where DataParallel saved


@dataclass(frozen=True)
class Weights:
    """The tensors of a weight file on the CPU by their names: as much of a network as another one needs to start from it."""

    path: Path
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """As a module's."""
        return self.tensors


def read(path: Path) -> Weights:
    """The file's state dict, also one inside a checkpoint. `InputError` where there is none, or where it takes more than
    tensors to read it."""
    try:
        content = _content(path)
    except Exception as error:  # what a foreign file leads to inside torch and safetensors has no common class
        raise _refused(path, f"cannot be read as one ({type(error).__name__})") from None
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    entries = content if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise _refused(path, "holds no tensors by name")
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise _refused(path, f"has {name} without plain values")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite: no network can start from it")
    if all(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return Weights(path, {DENSENET.sub(r"\1\2.", name): tensor for name, tensor in tensors.items()})


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings(action="ignore"):  # TorchScript is warned of before it is refused
        return torch.load(path, map_location="cpu", weights_only=True)


def start_paths(folder: Path) -> list[Path]:
    """What `folder` holds to start from, by name: model folders among its sub-folders (or their `model`), and weight files.

    `InputError` for anything else there but hidden files: it would silently not be started from.
    """
    if not folder.is_dir():
        raise InputError(
            f"params.yaml: train.start = {str(folder)!r}: must be a folder, of model folders and weight files to start from"
        )
    found = []
    for child in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        models = [path for path in (child, child / "model") if (path / "model.json").is_file()]
        if not models and (child.is_dir() or child.suffix not in SUFFIXES):
            known = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
            raise InputError(
                f"params.yaml: train.start: {child} is neither a folder with a model.json nor a weight file ({known}): "
                "move it away or rename it"
            )
        found += models or [child]
    return found


def chosen(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The tensors of `model` whose name, or the name of whose layer, fits one of the patterns `layers` of `train.start_layers`.

    `InputError` where nothing fits one of them.
    """
    there = {name: (name, name.rpartition(".")[0]) for name in model.state_dict()}
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for names in there.values() for name in names):
            known = ", ".join(dict.fromkeys(layer for _, layer in there.values()))
            raise InputError(
                f"params.yaml: train.start_layers: no layer of this {type(model).__name__} fits {pattern!r}; there are {known}"
            )
    return [name for name, names in there.items() if any(fnmatchcase(n, pattern) for n in names for pattern in layers)]


def _refused(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} must be a state dict, and {why}: give what torch.save(model.state_dict(), FILE) or safetensors write; "
        "a whole pickled module is not opened, because that would run code from the file"
    )

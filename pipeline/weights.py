"""Weight files that others publish: state dicts in PyTorch's and in the safetensors format. No code in them is run."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import InputError

SUFFIXES = (".safetensors", ".pth", ".pt")
NESTED = ("state_dict", "model")  # where checkpoints of other projects hold the state dict
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
    if all(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return Weights(path, tensors)


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings(action="ignore"):  # TorchScript is warned of before it is refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _refused(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} must be a state dict, and {why}: give what torch.save(model.state_dict(), FILE) or safetensors write; "
        "a whole pickled module is not opened, because that would run code from the file"
    )

"""The state of an unfinished training, kept after every epoch so that a killed run continues exactly.

One safetensors file: tensors of the model, the optimiser, the hooks and the best model so far; as metadata the rest in JSON.
Its name carries a fingerprint of everything that decides the result, so a changed parameter, input or source never resumes.
Random numbers need no state: every epoch draws its own from the seed.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from pipeline import distributed, files
from pipeline.hooks import Hook, Run

POSITION = ("rounds", "round", "round_epoch", "epoch", "lr", "history", "events", "notes", "best_accuracy")
SOURCES = Path(__file__).parent


def fingerprint(decisive: Any, inputs: Iterable[Path]) -> str:
    """A hash of parameters (JSON values), of input files, of this library's sources and of torch's version."""
    digest = hashlib.sha256(json.dumps([decisive, torch.__version__], sort_keys=True).encode())
    for path in [*inputs, *sorted(SOURCES.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Resume:
    """Saves and loads the state of one training in `folder`/`name`-FINGERPRINT.safetensors."""

    def __init__(self, folder: Path, name: str, fingerprint: str) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}-{fingerprint}.safetensors"
        self._tensors: dict[str, torch.Tensor] = {}

    def save(self, run: Run, hooks: Sequence[Hook]) -> None:
        """Keep the state after an epoch and its edits."""
        assert run.optimizer is not None
        tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (run.best or {}).items()}
        for index, hook in enumerate(hooks):
            tensors |= {f"hook.{index}.{name}": tensor for name, tensor in hook.tensors().items()}
        for index, state in run.optimizer.state_dict()["state"].items():
            # A momentum that SGD has not set yet is None.
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None}
        rest = {name: getattr(run, name) for name in POSITION} | {"hooks": [hook.state() for hook in hooks]}
        if distributed.rank():
            return
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        files.write_bytes(self.path, safetensors.torch.save(stored, metadata={"run": json.dumps(rest)}))

    def load(self, run: Run, hooks: Sequence[Hook]) -> bool:
        """Take up the state of a killed run, but for its optimiser; False where there is none (or a damaged one)."""
        try:
            content = distributed.bytes_of_first(lambda: self.path.read_bytes() if self.path.is_file() else b"")
            self._tensors = safetensors.torch.load(content)
            rest = json.loads(_metadata(content)["run"])
        except (SafetensorError, KeyError, ValueError):
            return False
        for name in POSITION:
            setattr(run, name, rest[name])
        for index, (hook, state) in enumerate(zip(hooks, rest["hooks"], strict=True)):
            hook.load_state(state, self._part(f"hook.{index}."))
        run.model.load_state_dict(self._part("model."))
        run.best = {name: tensor.to(run.device) for name, tensor in self._part("best.").items()} or None
        return True

    def load_optimizer(self, run: Run) -> None:
        """Give the fresh optimiser of `run` the state that `load` read."""
        assert run.optimizer is not None
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in self._part("optimizer.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
        for parameter, averages in run.optimizer.state.items():
            for key, average in averages.items():
                if average.shape == parameter.shape:
                    # In the parameter's memory order: fused optimisers walk through memory, not through indices.
                    averages[key] = torch.empty_like(parameter).copy_(average)
        self._tensors = {}

    def clear(self) -> None:
        """Remove every kept state of this name: its training has ended."""
        if distributed.rank():
            return
        for path in self.folder.glob(f"{self.name}-{'[0-9a-f]' * 16}.safetensors"):
            path.unlink(missing_ok=True)

    def _part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self._tensors.items() if name.startswith(prefix)}


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, which the library reads from paths alone: a JSON header behind its length."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]

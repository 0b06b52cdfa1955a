"""The state of an unfinished training, kept after every epoch and now and then within one, so that a killed run continues exactly.

One safetensors file: tensors of the model, the optimiser, the hooks and the best model so far; as metadata the rest in JSON.
Its name carries a fingerprint of everything that decides the result, so a changed parameter, input or source never resumes.
Every epoch draws its random numbers from the seed: their state is kept within an epoch alone, with what else each of several
processes has to itself there (sums over its part of the batches; on CPUs the running statistics of batch norms).
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from pipeline import distributed, files
from pipeline.errors import InputError
from pipeline.hooks import Hook, Run

POSITION = ("rounds", "round", "round_epoch", "epoch", "step", "lr", "history", "events", "notes", "best_accuracy")
SOURCES = Path(__file__).parent


def fingerprint(decisive: Any, inputs: Iterable[Path]) -> str:
    """A hash of parameters (JSON values), of input files, of this library's sources and of torch's version."""
    digest = hashlib.sha256(json.dumps([decisive, torch.__version__], sort_keys=True).encode())
    for path in [*inputs, *sorted(SOURCES.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Resume:
    """Saves and loads the state of one training in `folder`/`name`-FINGERPRINT.safetensors, within an epoch every `save_s` s."""

    def __init__(self, folder: Path, name: str, fingerprint: str, save_s: float = math.inf) -> None:
        self.folder, self.name, self.save_s = folder, name, save_s
        self.path = folder / f"{name}-{fingerprint}.safetensors"
        self._tensors: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] = {}
        self._scaler: dict[str, Any] = {}
        self._saved = self._asked = time.monotonic()

    def keep(self, run: Run, hooks: Sequence[Hook], steps: int) -> int:
        """Within an epoch, `steps` steps after this was called last: save if it is time to. Returns in how many steps it will be
        time again. All processes do alike."""
        due, pause = distributed.of_first(lambda: self._plan(steps))
        if due:
            self.save(run, hooks)
        self._asked = time.monotonic()
        return pause

    def _plan(self, steps: int) -> tuple[bool, int]:
        now = time.monotonic()
        due = now - self._saved >= self.save_s
        left = self.save_s if due else self._saved + self.save_s - now
        return due, int(min(max(left * steps / (now - self._asked), 1), 1e9))

    def save(self, run: Run, hooks: Sequence[Hook]) -> None:
        """Keep the state after an epoch and its edits, or after a step."""
        assert run.optimizer is not None
        tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (run.best or {}).items()}
        for index, hook in enumerate(hooks):
            tensors |= {f"hook.{index}.{name}": tensor for name, tensor in hook.tensors().items()}
        for index, state in run.optimizer.state_dict()["state"].items():
            # A momentum that SGD has not set yet is None.
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None}
        rest = {name: getattr(run, name) for name in POSITION} | {"hooks": [hook.state() for hook in hooks]}
        rest["scaler"] = run.scaler.state_dict() if run.scaler else None
        for rank, content in enumerate(distributed.bytes_of_each(safetensors.torch.save(_own(run)))) if run.step else ():
            tensors |= {f"own.{rank}.{name}": tensor for name, tensor in safetensors.torch.load(content).items()}
        if distributed.rank():
            return
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if not all(tensor.isfinite().all() for name, tensor in stored.items() if name.startswith("model.")):
            return  # the next loss will not be finite either: a state from which to try again is the one before
        metadata = {"run": json.dumps(rest), "sha256": files.BLANK.decode()}
        files.write_bytes(self.path, files.sealed(safetensors.torch.save(stored, metadata=metadata)))
        self._saved = time.monotonic()

    def load(self, run: Run, hooks: Sequence[Hook]) -> bool:
        """Take up the state of a killed run, but for its optimiser and random numbers. False: there is no whole one."""
        try:
            content = distributed.bytes_of_first(lambda: self.path.read_bytes() if self.path.is_file() else b"")
            metadata = _metadata(content)
            if not files.intact(content, metadata["sha256"]):  # a flipped bit is a number like any other
                return False
            self._tensors = safetensors.torch.load(content)
            rest = json.loads(metadata["run"])
            if rest["step"]:
                run.sums = self._tensors[f"own.{distributed.rank()}.sums"].tolist()
        except (SafetensorError, KeyError, TypeError, ValueError):
            return False
        for name in POSITION:
            setattr(run, name, rest[name])
        for index, (hook, state) in enumerate(zip(hooks, rest["hooks"], strict=True)):
            hook.load_state(state, self._part(f"hook.{index}."))
        try:
            run.model.load_state_dict(self._part("model."))
        except RuntimeError:  # a target of latency measured other times and chose other widths
            self.clear()
            raise InputError(
                f"{self.path}: the state of the killed training is of a network of other widths than what was chosen now; it is "
                "removed: run the same again, from the stage's beginning"
            ) from None
        self._own, self._scaler = self._part(f"own.{distributed.rank()}."), rest["scaler"]
        for index, statistic in enumerate(distributed.statistics(run.model) if self._own else ()):
            statistic.copy_(self._own[f"statistics.{index}"])
        run.best = {name: tensor.to(run.device) for name, tensor in self._part("best.").items()} or None
        return True

    def load_optimizer(self, run: Run) -> None:
        """Give the fresh optimiser of `run`, and its scaler, the state that `load` read."""
        assert run.optimizer is not None
        if run.scaler:
            run.scaler.load_state_dict(self._scaler)
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

    def load_random(self, run: Run) -> None:
        """Draw on as in the epoch within which the state was saved, at its next step."""
        torch.set_rng_state(self._own["random"])
        if run.device.type == "cuda":
            torch.cuda.set_rng_state(self._own["random_cuda"], run.device)

    def settle(self) -> None:
        """Its training has ended: states of this name with other parameters or inputs go. Its own stays until `forget`, as whoever
        started this process may be killed before it knows of the end."""
        forget(self.folder, self.name, but=self.path)

    def clear(self) -> None:
        """Remove every kept state of this name."""
        forget(self.folder, self.name)

    def _part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self._tensors.items() if name.startswith(prefix)}


def forget(folder: Path, name: str, but: Path | None = None) -> None:
    """Remove every kept state of the training `name`, except the file `but`: what it led to is kept elsewhere."""
    if distributed.rank() == 0:
        for path in folder.glob(f"{name}-{'[0-9a-f]' * 16}.safetensors"):
            if path != but:
                path.unlink(missing_ok=True)


def _own(run: Run) -> dict[str, torch.Tensor]:
    """What a process has to itself within an epoch."""
    own = {"sums": torch.tensor(run.sums, dtype=torch.float64), "random": torch.get_rng_state()}
    if run.device.type == "cuda":
        own["random_cuda"] = torch.cuda.get_rng_state(run.device)
    return own | {f"statistics.{index}": value for index, value in enumerate(distributed.statistics(run.model))}


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, which the library reads from paths alone: a JSON header behind its length."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]

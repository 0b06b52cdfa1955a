"""The models of a grid as a folder that NVIDIA Triton serves: repository/NAME/VERSION/model.onnx and what describes them.

A version comes to stand there whole and is never changed: a file with other bytes becomes the next version, and the old ones
stay. Beside model.onnx it has MODEL_CARD.md and version.json, which says what it was made of. config.pbtxt, configs/cpu.pbtxt
and labels.txt are those of the newest version; of the versions before it Triton loads those with the same inputs and outputs.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import files, records, triton_config
from pipeline.deployment import Repository
from pipeline.errors import InputError
from pipeline.lineage import Chain
from pipeline.triton_config import LABELS, Graph

CHAMPION = "champion"
CARD = "MODEL_CARD.md"
FORMS = {"pictures": "pictures.onnx", "tensors": "model.onnx"}
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
NUMBER = re.compile("[1-9][0-9]{0,17}")  # Triton passes over other folders


@dataclass(frozen=True)
class Model:
    """What one model of the repository shall be: a form of a chain's ONNX file."""

    name: str
    chain: Chain
    form: str
    path: Path


@dataclass(frozen=True)
class Written:
    """Where a model stands now; `added` is False where its newest version was the same already."""

    name: str
    version: int
    variant: str
    precision: str
    form: str
    sha256: str
    added: bool


def write(
    chains: list[Chain], champion: dict[str, Any], outputs: Path, folder: Path, options: Repository
) -> tuple[list[Written], list[str]]:
    """Bring the repository at `folder` up to date with the ONNX files of `chains` below `outputs`, and with `champion`
    (champion.json). Returns its models, and the names of others that are there: they are left as they are.

    All is checked before anything is written. Raises `InputError` for a name that is no safe one for a folder, a file that is
    missing or was not exported by Winnow, a `folder` that is no model repository, and a model there that is damaged or was not
    written here. A second writer waits for the first.
    """
    wanted = _plan(chains, champion, outputs, options)
    graphs = {model.name: Graph(model.path) for model in wanted}
    cards = {model.name: _card(model, champion, chains) for model in wanted}
    _refuse_foreign(folder)
    with _lock(folder):
        before = {model.name: _versions(folder / model.name) for model in wanted}
        done = []
        for model in wanted:
            place = folder / model.name
            done.append(_add(place, model, graphs[model.name], before[model.name], cards[model.name], options))
        names = {model.name for model in wanted}
        others = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in {*names, ".partial"})
    return done, others


def as_json(done: list[Written]) -> list[dict[str, Any]]:
    """The models as they are listed in written.json."""
    return [asdict(model) for model in done]


def _plan(chains: list[Chain], champion: dict[str, Any], outputs: Path, options: Repository) -> list[Model]:
    found: list[Model] = []
    for chain in chains:
        for form in options.forms if options.models == "all" else ():
            found.append(Model(chain.name + ("-tensors" if form == "tensors" else ""), chain, form, _source(chain, form, outputs)))
    if champion["champion"] is not None:
        chosen = next((chain for chain in chains if chain.name == champion["champion"]), None)
        if chosen is None:
            raise InputError(f"the champion {champion['champion']} is no variant of the present grid: run `dvc repro champion`")
        found.append(Model(CHAMPION, chosen, "pictures", _source(chosen, "pictures", outputs)))
    names: dict[str, Model] = {}
    for model in found:
        if not SAFE.fullmatch(model.name):
            told = "letters, digits, '.', '_' and '-', a letter or digit first, at most 128 characters"
            raise InputError(
                f"{model.name!r} is no name for a folder of the model repository, which may have {told}: rename the block"
            )
        if model.name in names:
            raise InputError(f"two models of the repository are called {model.name}: rename a block under revive: or compress:")
        names[model.name] = model
    return found


def _source(chain: Chain, form: str, outputs: Path) -> Path:
    record = chain.records.get("export")
    if record is None:
        raise InputError(f"{chain.name} has not been exported: run `dvc repro`")
    path = records.place(outputs, record) / FORMS[form]
    if not path.is_file():
        raise InputError(f"{path} is missing: run `dvc checkout`, or `dvc repro`")
    return path


def _refuse_foreign(folder: Path) -> None:
    """A folder with anything but models, hidden files apart, was not meant."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file where the model repository should be: move it away, or change repository.folder")
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and not (path / "config.pbtxt").is_file():
            what = "has no config.pbtxt" if path.is_dir() else "is a file"
            raise InputError(
                f"{path} {what}, so {folder} is no model repository of ours: move {path.name} away, or change repository.folder"
            )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine writes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a crash
        _sweep(folder)
        try:
            yield
        finally:
            _sweep(folder)


def _staging(folder: Path) -> Path:
    """Where versions are made, to be moved to their place in one step: beside the repository, because Triton does not start with
    half a model in it; within it where nothing can be moved in from beside, as into a mount of its own."""
    beside, within = _places(folder)
    probe, target = beside.with_suffix(".probe"), folder / ".probe"  # Triton passes over files
    try:
        probe.touch()
        probe.rename(target)
    except OSError:
        return within
    finally:
        for path in (probe, target):
            path.unlink(missing_ok=True)
    return beside


def _places(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.partial"), folder / ".partial"


def _sweep(folder: Path) -> None:
    """Remove what writers have left, this one or one that was killed."""
    for path in _places(folder):
        shutil.rmtree(path, ignore_errors=True)


def _versions(place: Path) -> dict[int, dict[str, Any]]:
    """The versions of a model that are there, with what their version.json says, the newest first."""
    if not place.exists():
        return {}
    try:
        written = triton_config.parse(place / "config.pbtxt")
    except InputError as error:
        raise InputError(f"{place} is damaged: {error}; move the folder away") from None
    if written.name != place.name:
        raise InputError(f"{place}/config.pbtxt is that of the model {written.name!r}: move the folder away")
    found = {}
    for path in place.iterdir():
        if path.is_dir() and NUMBER.fullmatch(path.name):
            found[int(path.name)] = _version(path)
    return dict(sorted(found.items(), reverse=True))


def _version(path: Path) -> dict[str, Any]:
    if not (path / "version.json").is_file():
        raise InputError(f"{path} was not written by this stage, which puts a version.json there: move the model's folder away")
    said = files.read_json(path / "version.json")
    file = path / "model.onnx"
    if not isinstance(said, dict) or not file.is_file() or files.sha256(file) != said.get("sha256"):
        raise InputError(
            f"{file} is not what version.json says: the version is damaged; delete {path}, or restore it from a backup"
        )
    return said


def _add(place: Path, model: Model, graph: Graph, before: dict[int, dict[str, Any]], card: bytes, options: Repository) -> Written:
    """The newest version of a model, added where its bytes or what it was made of are new, and its description."""
    content = model.path.read_bytes()
    sums = hashlib.sha256(content).hexdigest()
    told = {"variant": model.chain.name, "precision": model.chain.precision, "form": model.form, "sha256": sums}
    newest = next(iter(before), 0)
    added = not newest or before[newest] != told
    version = newest + 1 if added else newest
    alike = _alike(place, graph, [number for number in before if number != version], options.versions)
    described = _described(place.name, model, graph, alike, options)
    if added:
        made = {"model.onnx": content, CARD: card, "version.json": files.as_json(told, summed=True)}
        _put(place, version, made, described if not place.exists() else {})
    present = described | {f"{version}/{CARD}": card}  # a card also tells of what became of its model: whether it is the champion
    changed = {place / name: text for name, text in present.items() if _content(place / name) != text}
    if changed:
        files.write_together(changed)
    return Written(place.name, version, **told, added=added)


def _alike(place: Path, graph: Graph, older: list[int], most: int) -> int:
    """How many of the newest versions Triton can load beside each other: they must have one configuration."""
    count = 1
    for number in older[: most - 1]:
        if Graph(place / str(number) / "model.onnx").interface != graph.interface:
            break
        count += 1
    return count


def _described(name: str, model: Model, graph: Graph, versions: int, options: Repository) -> dict[str, bytes]:
    """The files of a model that are the same for its versions."""
    described = {LABELS: triton_config.labels(graph)} if graph.labels else {}
    for path, gpu in (("configs/cpu.pbtxt", False), ("config.pbtxt", True)):
        made = triton_config.config(name, graph, options, precision=model.chain.precision, versions=versions, gpu=gpu)
        described[path] = triton_config.as_text(made)
    return described


def _put(place: Path, version: int, content: dict[str, bytes], described: dict[str, bytes]) -> None:
    """Make a version, or a new model with its first one, and move it to its place in one step."""
    staging = _staging(place.parent)
    made = staging / place.name
    files.write_together({made / str(version) / name: text for name, text in content.items()})
    files.write_together({made / name: text for name, text in described.items()})
    source, target = (made, place) if described else (made / str(version), place / str(version))
    for folder in (made / str(version), made):
        _sync(folder)
    source.rename(target)
    _sync(target.parent)
    _sweep(place.parent)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _card(model: Model, champion: dict[str, Any], chains: list[Chain]) -> bytes:
    from pipeline import model_card

    kin = lambda chain: (chain.revive, chain.compress, chain.precision)  # noqa: E731
    siblings = [chain for chain in chains if kin(chain) == kin(model.chain) and chain.seed != model.chain.seed]
    return model_card.text(model.chain, champion, {"model.onnx": model.path}, siblings).encode()

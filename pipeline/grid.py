"""The grid of variants, and the checks that need all of params.yaml at once."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline import methods
from pipeline.config import Augment, Data, Runtime, Section, Train, Variants, lookup, parse, read_params
from pipeline.deployment import Champion, Export, Profile, Repository, Tracking
from pipeline.errors import InputError
from pipeline.weights import start_paths

SECTIONS: dict[str, type[Section]] = {
    "data": Data,
    "augment": Augment,
    "runtime": Runtime,
    "train": Train,
    "variants": Variants,
    "export": Export,
    "profile": Profile,
    "champion": Champion,
    "repository": Repository,
    "tracking": Tracking,
}
FROM_FILES = ("folder", "tiny_imagenet", "imagenette", "imagenet", "carvana", "nyu_v2")  # data that nothing here downloads
OTHERS = ("seed", "model", "revive", "compress")
BLOCK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # a point would divide a key, here and in DVC


def check() -> dict[str, Any]:
    """Check every section, every block and the grid; `InputError` has one line for each mistake."""
    params = read_params()
    mistakes: list[str] = []

    def attempt(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except InputError as error:
            mistakes.append(str(error))
            return None

    for key in params:
        if key not in (*SECTIONS, *OTHERS):
            mistakes.append(f"params.yaml: {key} is not a section; sections are {', '.join((*SECTIONS, *OTHERS))}")
    parsed = {key: attempt(lambda key=key, kind=kind: parse(key, lookup(params, key), kind)) for key, kind in SECTIONS.items()}
    if parsed["data"]:
        attempt(lambda: _check_root(parsed["data"]))
    attempt(lambda: seeds(params))
    attempt(lambda: methods.options("models", "model", lookup(params, "model"), by="name"))
    if parsed["train"]:
        attempt(lambda: methods.options("overparameterize", "train.overparameterize", parsed["train"].overparameterize))
        attempt(lambda: methods.inside("revive", parsed["train"]))
        attempt(lambda: methods.inside("compress", parsed["train"]))
        attempt(lambda: start_paths(Path(parsed["train"].start)))
    blocks = {family: attempt(lambda family=family: _blocks(params, family)) for family in ("revive", "compress")}
    for family, found in blocks.items():
        for name, value in (found or {}).items():
            attempt(lambda family=family, name=name, value=value: methods.options(family, f"{family}.{name}", value))
    if parsed["variants"] and parsed["profile"] and all(blocks.values()):
        attempt(lambda: _check_grid(parsed["variants"], parsed["profile"], blocks))
    if mistakes:
        raise InputError("\n".join(mistakes))
    return params


def _check_root(data: Data) -> None:
    """The raw data is there, or has a folder to be downloaded to: DVC watches it."""
    root = Path(data.root)
    if not root.exists() and (data.name in FROM_FILES or root.suffix == ".npz"):
        raise InputError(f"params.yaml: data.root = {data.root!r} does not exist: {data.name} is read from there")
    if not root.exists():
        root.mkdir(parents=True)


def seeds(params: dict[str, Any]) -> list[int]:
    """The seeds of the grid."""
    try:
        found = TypeAdapter(list[int]).validate_python(lookup(params, "seed"), strict=True)
    except ValueError:
        raise InputError(f"params.yaml: seed = {lookup(params, 'seed')!r}: must be a list of whole numbers, as [0, 1, 2]") from None
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise InputError(f"params.yaml: seed = {found}: must be at least one number, each from 0 up and there once")
    return found


def _blocks(params: dict[str, Any], family: str) -> dict[str, Any]:
    blocks = lookup(params, family)
    if not isinstance(blocks, dict) or not blocks:
        raise InputError(f"params.yaml: {family} must hold named blocks, as `name: {{method: ..., ...}}`, not {blocks!r}")
    for name in blocks:
        if not isinstance(name, str) or not BLOCK_NAME.fullmatch(name):
            raise InputError(f"params.yaml: {family}.{name}: a block's name is letters, digits, '_' and '-'")
    return blocks


def _check_grid(variants: Variants, profile: Profile, blocks: dict[str, dict[str, Any]]) -> None:
    unknown = [
        f"params.yaml: variants.{family} names {name!r}, but {family} has only {', '.join(blocks[family])}"
        for family, chosen in (("revive", variants.revive), ("compress", variants.compress))
        for name in chosen
        if name not in blocks[family]
    ]
    if unknown:
        raise InputError("\n".join(unknown))
    names = [f"{revive}-{compress}" for revive, compress in product(variants.revive, variants.compress)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"params.yaml: variants gives {', '.join(twice)} more than once; rename or remove blocks")
    if profile.control not in names:
        raise InputError(f"params.yaml: profile.control = {profile.control!r} is not in the grid: {', '.join(names)}")

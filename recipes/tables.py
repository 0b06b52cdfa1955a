"""A paper's table as one file recipes/NAME.yaml: settings by network and by method, and what the paper reports for each pair.

    paper      what is reproduced
    runs       over how many runs the paper's figures are
    base       another table to take over everything from but `paper` and `expected`; the keys below then change it
    data, augment, runtime, model, train      as in params.yaml, for every row
    methods    NAME: what the method adds to `train`
    networks   NAME: the same sections for this network, and `methods`, NAME: what it changes in one method's `train`
    expected   NETWORK: METHOD: [mean, standard deviation] of the accuracy in %; null where the paper gives no deviation, and null
               in the place of both where it does not have the row: a control of ours, or another network

A row is a pair under `expected`. Its parameters are merged in this order, the later one wins: the table's sections, the network's,
the method's, the network's own of the method. Mappings are merged key by key, and everything else is replaced; so is a mapping
whose `method` changes, because the options of one method say nothing to another.

`train.start` names a folder with public weights to start from, as in params.yaml. `train.start_from` names networks of our own:
`table` and `method` (of the same network there), `count` of them out of `of` that are trained, with the seeds 0 to `of` - 1. The
row's seed s takes s, s + 1, ..., beginning again at 0 after the last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from pipeline import methods
from pipeline.config import Augment, Data, Runtime, Section, Train, lookup, parse, read_params
from pipeline.errors import InputError

RECIPES = Path("recipes")
SECTIONS = ("data", "augment", "runtime", "model", "train")
Row = tuple[str, str]  # network, method


def _cell(value: Any) -> Any:
    if not isinstance(value, list) or len(value) != 2:
        raise PydanticCustomError("cell", "must be [mean, standard deviation or null]")
    return tuple(value)


Cell = Annotated[tuple[float, float | None], BeforeValidator(_cell)]


class Settings(Section):
    """Sections of params.yaml, each perhaps only a part of it, and what methods change in `train`."""

    data: dict[str, Any] = {}
    augment: dict[str, Any] = {}
    runtime: dict[str, Any] = {}
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}


class Table(Settings):
    """One file."""

    paper: str
    runs: str
    networks: dict[str, Settings]
    expected: dict[str, dict[str, Cell | None]] = Field(min_length=1)


class StartFrom(Section):
    """The trained networks that a row starts from."""

    table: str
    method: str
    count: int = Field(ge=1)
    of: int = Field(ge=1)


def tables() -> list[str]:
    """The names that `read_table` takes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if "\nexpected:" in path.read_text())


def read_table(name: str) -> Table:
    """The table recipes/NAME.yaml; `InputError` names the file and the key that is wrong."""
    path, keys = RECIPES / f"{name}.yaml", _keys(name, ())
    with naming(f"{path}: ", "params.yaml: table."):
        table = parse("table", keys, Table)
    for network, there in table.expected.items():
        if network not in table.networks:
            raise InputError(f"{path}: expected.{network} is none of the networks {', '.join(table.networks)}")
        if strangers := [method for method in there if method not in table.methods]:
            raise InputError(f"{path}: expected.{network}.{strangers[0]} is none of the methods {', '.join(table.methods)}")
    return table


def _keys(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """The file's keys, after those of its base."""
    if name not in tables():
        where = f"recipes/{above[-1]}.yaml: base = {name!r}: " if above else ""
        there = f"tables are {', '.join(tables())}" if tables() else "run from the project's root"
        raise InputError(f"{where}there is no table {name!r}; {there}")
    if name in above:
        raise InputError(f"recipes/{name}.yaml: base leads back to itself, by {' and '.join(above)}")
    own = read_params(RECIPES / f"{name}.yaml")
    if "base" not in own:
        return own
    base = _keys(own.pop("base"), (*above, name))
    return merge({key: value for key, value in base.items() if key not in ("paper", "expected")}, own)


def rows_of(table: Table, patterns: list[str]) -> list[Row]:
    """The rows that fit any of the patterns NETWORK/METHOD, in the table's order; `InputError` where one of them fits none."""
    there = [(network, method) for network, reported in table.expected.items() for method in reported]
    for pattern in patterns:
        if not any(fnmatchcase("/".join(row), pattern) for row in there):
            raise InputError(f"no row fits {pattern!r}; rows are {', '.join('/'.join(row) for row in there)}")
    return [row for row in there if any(fnmatchcase("/".join(row), pattern) for pattern in patterns)]


def parameters(table: Table, row: Row) -> dict[str, Any]:
    """The sections of params.yaml that make the row, `train` perhaps with `start_from`."""
    network = table.networks[row[0]]
    parts = [table.model_dump(include=set(SECTIONS)), network.model_dump(include=set(SECTIONS))]
    parts += [{"train": table.methods[row[1]]}, {"train": network.methods.get(row[1], {})}]
    merged: dict[str, Any] = {}
    for part in parts:
        merged = merge(merged, part)
    return merged


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """`first` with the values of `second`, mapping by mapping; {method: ...} of another method replaces the whole mapping."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("method", old.get("method")) == old.get("method"):
            value = merge(old, value)
        merged[key] = value
    return merged


def shorten(params: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The row with another number of epochs; what its schedule and its methods count in epochs moves in proportion."""
    fit = params["train"]["fit"]

    def share(value: Any) -> Any:
        moved = value * epochs / fit["epochs"]
        return value if not value else moved if isinstance(value, float) else max(1, round(moved))

    schedule = fit["schedule"]
    if isinstance(schedule, dict):
        schedule = {**schedule, "every": share(schedule["every"])}
    moved = {}
    for family in ("revive", "compress"):
        chosen = params["train"][family]
        counted = getattr(methods.load(family, chosen["method"]), "IN_EPOCHS", ())
        moved[family] = {key: share(value) if key in counted else value for key, value in chosen.items()}
    return merge(params, {"train": {"fit": {"epochs": epochs, "schedule": schedule}, **moved}})


def decisive(params: dict[str, Any]) -> dict[str, Any]:
    """What decides a training besides data, seed and the networks it starts from, checked and in the form of its record."""
    train = parse("train", lookup(params, "train"), Train)
    expansion = methods.options("overparameterize", "train.overparameterize", train.overparameterize).model_dump()
    network = methods.options("models", "model", lookup(params, "model"), by="name").model_dump()
    chosen = {family: methods.inside(family, train).model_dump(exclude={"fit"}) for family in ("revive", "compress")}
    augment = parse("augment", lookup(params, "augment"), Augment).model_dump()
    trained = {**train.model_dump(), "start": "", "overparameterize": expansion, **chosen}
    return {"model": network, "train": trained, "augment": augment}


def check(params: dict[str, Any]) -> None:
    """Refuse a row whose sections params.yaml could not hold."""
    for key, section in (("data", Data), ("runtime", Runtime)):
        parse(key, lookup(params, key), section)
    decisive(params)


def differences(first: dict[str, Any], second: dict[str, Any], key: str = "") -> list[str]:
    """The dotted keys whose values differ, with both values."""
    found = []
    for part in [*first, *(part for part in second if part not in first)]:
        old, new, name = first.get(part), second.get(part), f"{key}{part}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} = {old!r}, now {new!r}")
    return found


@contextmanager
def naming(place: str, instead: str = "params.yaml: ") -> Iterator[None]:
    """Let an `InputError` name the place where the mistake stands."""
    try:
        yield
    except InputError as error:
        said = str(error)
        raise InputError(said.replace(instead, place) if instead in said else place + said) from None

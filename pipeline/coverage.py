"""What surgery can do to a network, before any training: layer by layer what may go, what stays and why, and how far the whole can
shrink. Works on the "meta" device, where nothing has a value."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from pipeline.channels import Channels, follow
from pipeline.errors import InputError
from pipeline.families import Families
from pipeline.surgery import Shape


@dataclass(frozen=True)
class Row:
    """One layer: its outputs, how many of them may go at most, the layers whose outputs go with its own, and why the rest stays."""

    name: str
    type: str
    outputs: int
    removable: int
    tied: tuple[str, ...]
    stays: str


@dataclass(frozen=True)
class Coverage:
    """Of a network. `least`: the shares of its multiply-adds and parameters that are left when all that may goes; `untreated`: the
    operators that were not understood, and layers that are not called."""

    rows: tuple[Row, ...]
    least: dict[str, float]
    untreated: tuple[str, ...]

    def __str__(self) -> str:
        """A table."""
        lines = [f"{'layer':40} {'outputs':>8} {'may go':>8}  stays because"]
        lines += [f"{row.name:40} {row.outputs:8} {row.removable:8}  {row.stays}" for row in self.rows]
        least = ", ".join(f"{share:.1%} of {kind}" for kind, share in self.least.items())
        return "\n".join([*lines, f"at the least {least} are left", *self.untreated])


def coverage(model: nn.Module, input_shape: Shape, *, protect: Sequence[str] = (), multiple: int = 1) -> Coverage:
    """For images of (C, H, W). Layers named in `protect` (* for any text) keep their outputs; widths stay multiples of `multiple`
    where layers are that wide. `InputError` where torch.fx cannot trace the network, or a pattern fits no layer."""
    channels = follow(model, input_shape)
    families = Families(model, channels, protect=protect, multiple=multiple)
    free: dict[str, int] = {}
    tied: dict[str, set[str]] = {}
    for family in families.all:
        for name, outputs in family.layers.items():
            free[name] = free.get(name, 0) + (len(family.units) - family.allowed[0]) * outputs
            tied.setdefault(name, set()).update(family.layers)
    rows = []
    for name, made in channels.outputs.items():
        others = tuple(other for other in channels.outputs if other != name and other in tied.get(name, ()))
        kind = type(model.get_submodule(name)).__name__.removeprefix("Parametrized")
        rows.append(Row(name, kind, len(made), free.get(name, 0), others, _why(channels, name, free.get(name, 0))))
    whole, least = families.sizes, families.sizes * 0 + [family.allowed[0] for family in families.all]
    shares = {kind: float(families.amounts(kind, least) / families.amounts(kind, whole)) for kind in ("macs", "params")}
    return Coverage(tuple(rows), shares, (*channels.untreated, *channels.uncalled))


def described(model: nn.Module, input_shape: Shape) -> tuple[list[str], list[dict[str, Any]]]:
    """What to tell of a network, and its rows as JSON. One that cannot be traced has a reason and no rows."""
    try:
        told = coverage(model, input_shape)
    except InputError as error:
        return [str(error)], []
    shares = f"{told.least['macs']:.1%} of the multiply-adds and {told.least['params']:.1%} of the parameters"
    return [f"can leave {shares} at the least", *told.untreated], [asdict(row) for row in told.rows]


def _why(channels: Channels, name: str, free: int) -> str:
    """Why a layer's outputs stay, or those of them that do."""
    reasons = dict.fromkeys(channels.pinned[channel] for channel in channels.outputs[name] if channel in channels.pinned)
    if reasons:
        return "; ".join(reasons)
    return "a layer has at least one output" if free else "protected, or too narrow for the multiple"

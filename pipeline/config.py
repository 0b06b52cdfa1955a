"""params.yaml as typed, frozen sections: unknown keys are refused and nothing has a default hidden in code."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from yaml.constructor import ConstructorError

from pipeline.errors import InputError

PARAMS = Path("params.yaml")

Fraction = Field(gt=0, lt=1)


class _Loader(yaml.SafeLoader):
    """YAML that has no key twice in one mapping, and the numbers of YAML 1.2 (1e-4), as DVC reads them."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)  # type: ignore[misc]
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789"))


class Section(BaseModel):
    """A part of params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)


class Crop(Section):
    """What a network sees of an image: the shorter side resized, and of that the middle."""

    resize: int = Field(ge=1, le=16384)  # pixels of the shorter side
    size: int = Field(ge=1)  # pixels a side of the square in the middle

    @model_validator(mode="after")
    def _the_middle_is_within(self) -> Self:
        if self.size > self.resize:
            raise PydanticCustomError("crop", "size must be at most resize: of so many pixels the middle is kept")
        return self


class Data(Section):
    """What `prepare` reads."""

    name: Literal[
        "digits", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenette", "imagenet", "folder",
        "scenes_segment", "carvana",
        "scenes_depth", "nyu_v2",
    ]  # fmt: skip
    root: str  # folder (or, for cifar10 and cifar100, also an .npz file) that holds the raw data
    download: bool  # fetch what is missing
    image_size: int | None = Field(ge=1, le=16384)  # resize to a square of so many pixels; null keeps the size
    crop: Crop | None  # what networks see of the images, which are stored at their own size or image_size; null: all
    storage: Literal["auto", "memory", "stream"]
    validation: float = Fraction  # share of the training images held out for every selection
    test: float = Fraction  # share held out for the test where the data has no test split of its own
    per_class: int | None = Field(ge=1)  # training images of each class (of all, without classes), drawn with split_seed; null: all
    split_seed: int
    mean: Literal["auto"] | list[float]  # per channel of pixels in [0, 1]; auto: measured on the training images
    std: Literal["auto"] | list[float]


class Augment(Section):
    """Random changes of training images."""

    pad: int = Field(ge=0)  # pixels added on each side before a random crop back to size; 0: no crop
    pad_mode: Literal["zero", "reflect"]
    flip: bool  # left-right, with probability 1/2
    # Of a random box, resized to what networks see: the least and the largest share of the image's area; null: no box.
    scale: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)] | None

    @model_validator(mode="after")
    def _one_kind_of_crop(self) -> Self:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise PydanticCustomError("scale", "scale must give the least share before the largest, as [0.08, 1.0]")
        if self.scale is not None and self.pad:
            raise PydanticCustomError("scale", "scale needs pad: 0, pad needs scale: null: an image is cropped in one way")
        return self


Launch = Literal["eager", "graph", "compile"]  # how a step's kernels are launched: pipeline/step.py


class Runtime(Section):
    """Where and how the computing is done."""

    device: Literal["auto", "cpu", "cuda"]
    threads: int = Field(ge=1)  # CPU threads; results repeat bit for bit only at the same number
    workers: int = Field(ge=0)  # processes that decode streamed images, for each that trains
    processes: int = Field(ge=1)  # that train together on each host, on CUDA each on its own device
    hosts: int = Field(ge=1)  # machines that train together
    save_s: float = Field(gt=0)  # seconds between two saves within an epoch
    launch: Launch

    @model_validator(mode="after")
    def _a_graph_is_of_one_process(self) -> Self:
        if self.launch == "graph" and (self.device == "cpu" or self.processes * self.hosts > 1):
            raise PydanticCustomError(
                "launch", "launch must be eager or compile on a cpu, or where several processes train together"
            )
        return self


class Steps(Section):
    """A learning rate that falls in steps."""

    every: int = Field(ge=1)  # epochs
    factor: float = Field(gt=0, le=1)


class Fit(Section):
    """How a stage trains."""

    epochs: int = Field(ge=0)
    batch_size: int = Field(ge=2)
    optimizer: Literal["sgd", "adam"]
    lr: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    nesterov: bool
    weight_decay: float = Field(ge=0)
    schedule: Literal["cosine", "constant"] | Steps  # cosine falls to 0 at each step; the others at each epoch
    label_smoothing: float = Field(ge=0, lt=1)
    select: Literal["last", "best"]  # keep the last epoch or the one with the best validation accuracy
    precision: Literal["auto", "fp32", "bf16", "fp16"]

    @model_validator(mode="after")
    def _nesterov_has_a_momentum(self) -> Self:
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise PydanticCustomError("nesterov", "nesterov must be false unless optimizer is sgd and momentum above 0")
        return self


class Distill(Section):
    """A teacher: the network as it enters the stage, before it is made smaller."""

    loss: Literal["softmax_mse", "logit_mse", "kl"]
    weight: float = Field(gt=0)  # of the teacher's term beside the cross-entropy
    temperature: float = Field(gt=0)  # logits are divided by it; larger is softer


class Block(Section):
    """A block under `revive:`, named by the user; each method adds its own options."""

    method: str
    fit: Fit


class Target(Section):
    """How small a network shall become, instead of a method's own threshold: a share of what it is as it enters the stage."""

    of: Literal["keep", "macs", "params", "latency"]  # outputs of layers, multiply-adds, parameters, measured time on the CPU
    fraction: float = Fraction


class CompressBlock(Block):
    """A block under `compress:`, named by the user; each method adds its own options."""

    distill: Distill | None
    sensitivity: (
        Literal["ecdm", "measured"] | None
    )  # how what each layer's channels are worth is found, before and after; null: not


class Train(Section):
    """The first training, over-parameterised."""

    start: str = Field(min_length=1)  # folder of networks to start from; an empty one: fresh weights
    start_layers: list[str] = Field(min_length=1)  # patterns of the layers or tensors taken over from there; ["*"]: all
    overparameterize: dict[str, Any]  # `method` and its options
    revive: dict[str, Any]  # a method at work from the first epoch: as a block under `revive:`, without its fit
    compress: dict[str, Any]  # the same: as a block under `compress:`, without its fit
    bias_lr: float = Field(gt=0)  # learning rate of biases, as a multiple of the others'
    ema: float | None = Field(gt=0, lt=1)  # decay of the moving average of weights that is kept in their place; null: none
    fit: Fit

    @model_validator(mode="after")
    def _an_average_is_of_all_epochs(self) -> Self:
        if self.ema is not None and self.fit.select == "best":
            raise PydanticCustomError("ema", "ema averages to the end: with it, fit.select must be last")
        return self


class Variants(Section):
    """The grid: every revive block with every compress block."""

    revive: list[str] = Field(min_length=1)
    compress: list[str] = Field(min_length=1)


def read_params(path: Path = PARAMS) -> dict[str, Any]:
    """The whole of params.yaml as plain values."""
    try:
        with path.open("rb") as file:
            params = yaml.load(file, _Loader)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run from the project's root") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 13th month in a date
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(params, dict):
        raise InputError(f"{path} must hold sections (seed, data, model, ...), not {type(params).__name__}")
    return params


def parse(key: str, value: Any, model: type[SectionType]) -> SectionType:
    """`value`, found in params.yaml under `key`, as a typed section; `InputError` has one line a mistake."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InputError("\n".join(_explain(key, value, error.errors()))) from None


def section(key: str, model: type[SectionType], path: Path = PARAMS) -> SectionType:
    """The section of params.yaml at the dotted `key`."""
    return parse(key, lookup(read_params(path), key), model)


def lookup(params: dict[str, Any], key: str) -> Any:
    """The value at the dotted `key`; `InputError` says which part is missing and what stands there."""
    value: Any = params
    for depth, part in enumerate(parts := key.split(".")):
        if not isinstance(value, dict) or part not in value:
            where = f"params.yaml: {'.'.join(parts[:depth])}" if depth else "params.yaml"
            there = (", ".join(map(str, value)) or "nothing") if isinstance(value, dict) else repr(value)
            raise InputError(f"{where} has no {part!r}; it has {there}")
        value = value[part]
    return value


def _explain(key: str, value: Any, mistakes: list[Any]) -> list[str]:
    """One line for each place in `value` where something is wrong."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for mistake in mistakes:
        found.setdefault(_place(mistake, value), []).append(mistake)
    lines = []
    for place, there in found.items():
        if any(len(deeper) > len(place) and deeper[: len(place)] == place for deeper in found):
            continue  # of several forms that are allowed here, the value has the one in which there is a mistake further down
        where = f"params.yaml: {'.'.join(map(str, (key, *place)))}"
        wrong, kinds = there[0]["input"], {mistake["type"] for mistake in there}
        if "missing" in kinds:
            lines.append(f"{where} is missing; every parameter must be given")
        elif "extra_forbidden" in kinds:
            lines.append(f"{where} is not a parameter; remove it or correct its name")
        else:
            shown = "" if isinstance(wrong, dict) else f" = {wrong!r}"
            lines.append(f"{where}{shown}: {' or '.join(dict.fromkeys(map(_wanted, there)))}")
    return lines


def _place(mistake: Any, value: Any) -> tuple[Any, ...]:
    """The keys and indices that lead to a mistake, without the names of the forms that were tried on the way."""
    place = []
    for depth, part in enumerate(mistake["loc"]):
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            value = value[part]
        elif mistake["type"] != "missing" or depth + 1 < len(mistake["loc"]):
            continue
        place.append(part)
    return tuple(place)


def _wanted(mistake: Any) -> str:
    if mistake["type"] in ("model_type", "dict_type"):
        return "must hold parameters, as {name: value, ...}"
    return mistake["msg"].lower().replace("input should be", "must be", 1)

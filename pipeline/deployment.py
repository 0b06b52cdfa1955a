"""The sections of params.yaml for what comes after training: export, profile, champion, repository, tracking."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config import Section


class Int8(Section):
    """How int8 is calibrated, and what of a network stays in fp32."""

    images: int = Field(ge=1)  # training images behind the ranges of what layers read and give
    calibration: Literal["minmax", "percentile"]
    keep: list[str]  # patterns of layers that are never quantised
    least: float = Field(ge=0, le=1)  # share of the multiply-adds that must end in int8


class Export(Section):
    """How the ONNX files are written and proven."""

    opset: Literal[18, 20]
    atol: float = Field(gt=0)  # largest |ONNX - torch| allowed on logits: atol + rtol * |torch|
    rtol: float = Field(ge=0)
    precisions: list[Literal["fp32", "fp16", "int8"]] = Field(min_length=1)
    max_loss: float = Field(ge=0, le=1)  # largest loss of the headline score, on the test split, of a precision below fp32
    resize: bool  # the form for pictures takes any size and resizes it itself
    int8: Int8

    @model_validator(mode="after")
    def _fp32_is_the_first(self) -> Self:
        if self.precisions[0] != "fp32" or len(set(self.precisions)) < len(self.precisions):
            raise PydanticCustomError("precisions", "precisions must begin with fp32, the measure of the others; each once")
        if self.resize and self.opset < 20:
            raise PydanticCustomError("resize", "resize needs opset 20: on CUDA ONNX Runtime has no such resizing below it")
        return self


class Profile(Section):
    """What is timed."""

    control: str  # the variant, REVIVE-COMPRESS, against which every speed-up is measured
    providers: list[Literal["tensorrt", "cuda", "cpu"]] = Field(min_length=1)
    threads: int = Field(ge=1)  # of ONNX Runtime on the CPU
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    warmup_s: float = Field(gt=0)
    repeats: int = Field(ge=20)  # timed calls of each model in one measurement
    stability: float = Field(gt=0)  # repeat while the median's interval is wider than this share of it
    attempts: int = Field(ge=1)  # measurements at most before it is reported as unstable
    idle_ms: float | None = Field(gt=0)  # also at batch size 1 with such a pause before each call; null: not
    copies: bool  # on a GPU also with the copies from and to the host
    cuda_graph: bool  # on CUDA also as a CUDA graph


class Champion(Section):
    """Which variant is chosen: of those within every limit the one with the best figure. Names of figures are those of the records
    of export and profile, as latency_cpu_b1_p50_ms; "accuracy" is the headline score on the validation split."""

    best: str = Field(min_length=1)  # highest for a score, a speed-up or a throughput, lowest for a cost
    at_most: dict[str, float]
    at_least: dict[str, float]


class Repository(Section):
    """The folder of models that Triton serves."""

    folder: str = Field(min_length=1)  # relative to the project's root
    models: Literal["all", "champion"]
    forms: list[Literal["pictures", "tensors"]] = Field(min_length=1)  # of the variants; the champion has pictures alone
    max_batch: int = Field(ge=1)  # images that a model is given at once, at most
    queue_delay_us: int = Field(ge=0)  # how long a request may wait for others that are answered together with it
    tensorrt: bool  # let TensorRT compute on GPUs
    versions: int = Field(ge=1)  # the newest versions of a model, which are loaded beside each other


class Tracking(Section):
    """Where MLflow keeps the runs when MLFLOW_TRACKING_URI does not say otherwise."""

    experiment: str = Field(min_length=1)
    timeout_s: int = Field(ge=1)  # how long one request to a tracking server may take

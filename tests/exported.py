"""Surgery's law after ONNX export, over every network: longer than the test suite may take (about ten minutes on one core).

    python -m tests.exported [--drawn 20]

Each network of the zoo and of tests/test_surgery_families.py, plain and over-parameterised, and networks drawn at random are cut,
merged and exported; ONNX Runtime and OpenVINO must compute what the whole network computes with the unread channels at zero, to
1e-5 and 1e-4 of the largest output. Prints one line each and exits with 1 where one differs by more.
"""

import argparse
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import openvino
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from networks import KINDS, ZOO, build, draw_reads, drawn, masked, plain, shape_of  # noqa: E402
from test_surgery_families import FAMILIES, network  # noqa: E402

from pipeline.surgery import Shape, shrink  # noqa: E402

CLOSE, ELSEWHERE = 1e-5, 1e-4  # of ONNX Runtime, of OpenVINO, which sums in other orders
IMAGES = 2


def all_of_them(count: int) -> Iterator[tuple[str, nn.Module, Shape]]:
    """A name, the network, the shape of its images."""
    for expand in (False, True):
        for name in ZOO:
            yield f"{name}{' kflo' * expand}", build(name, expand), shape_of(name)
        for name in FAMILIES:
            yield f"torchvision {name}{' kflo' * expand}", network(name, expand), (3, 64, 64)
    draw = random.Random(0)
    for number in range(count):
        blocks = [(draw.choice(KINDS), draw.choice([2, 4, 6, 8])) for _ in range(draw.randint(1, 4))]
        program = {"blocks": blocks, "head": draw.choice(["flatten", "average"]), "expand": number % 2 == 1, "seed": number}
        yield f"drawn {number}: {' '.join(kind for kind, _ in blocks)}", drawn(program), (3, 8, 8)


def differences(model: nn.Module, shape: Shape, folder: Path) -> tuple[float, float]:
    """Of ONNX Runtime, and of OpenVINO, from the masked whole network, as shares of the largest output."""
    reads = draw_reads(model, shape, seed=3)
    smaller = plain(shrink(model, shape, reads)).eval()
    x = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(1))
    path = folder / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(smaller, (x,), path, dynamo=True, external_data=False, verbose=False)
        wanted = masked(model, reads).eval()(x)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    other = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy()])[0]
    first, second = (float((wanted - torch.from_numpy(answer)).abs().max() / wanted.abs().max()) for answer in (found, other))
    return first, second


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--drawn", type=int, default=20)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    worst, elsewhere, count = 0.0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, model, shape in all_of_them(asked.drawn):
            found, other = differences(model, shape, Path(folder))
            print(f"{found:.1e}  {other:.1e}  {name}", flush=True)
            worst, elsewhere, count = max(worst, found), max(elsewhere, other), count + 1
    good = worst < CLOSE and elsewhere < ELSEWHERE
    print(f"{count} networks, largest difference {worst:.1e}, of OpenVINO {elsewhere:.1e}: {'PASS' if good else 'FAIL'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()

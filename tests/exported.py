"""Surgery's law after ONNX export, over every network: longer than the test suite may take (about ten minutes on one core).

    python -m tests.exported [--drawn 20]

Each network of the zoo and of tests/test_surgery_families.py, plain and over-parameterised, and networks drawn at random are cut,
merged and exported; ONNX Runtime must compute what the whole network computes with the unread channels at zero, to 1e-5 of the
largest output. Prints one line each and exits with 1 where one differs by more.
"""

import argparse
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from networks import KINDS, ZOO, build, draw_reads, drawn, masked, plain, shape_of  # noqa: E402
from test_surgery_families import FAMILIES, network  # noqa: E402

from pipeline.surgery import Shape, shrink  # noqa: E402

CLOSE = 1e-5
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


def difference(model: nn.Module, shape: Shape, folder: Path) -> float:
    """Of ONNX Runtime from the masked whole network, as a share of the largest output."""
    reads = draw_reads(model, shape, seed=3)
    smaller = plain(shrink(model, shape, reads)).eval()
    x = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(1))
    path = folder / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(smaller, (x,), path, dynamo=True, external_data=False, verbose=False)
        wanted = masked(model, reads).eval()(x)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return float((wanted - torch.from_numpy(found)).abs().max() / wanted.abs().max())


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--drawn", type=int, default=20)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    worst, count = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, model, shape in all_of_them(asked.drawn):
            found = difference(model, shape, Path(folder))
            print(f"{found:.1e}  {name}", flush=True)
            worst, count = max(worst, found), count + 1
    print(f"{count} networks, largest difference {worst:.1e}: {'PASS' if worst < CLOSE else 'FAIL'}")
    sys.exit(worst >= CLOSE)


if __name__ == "__main__":
    main()

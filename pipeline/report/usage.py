"""How to load and serve an exported network, as text to copy: ONNX Runtime with both forms, Triton over HTTP, MLflow."""

from html import escape
from pathlib import Path
from urllib.parse import quote

from pipeline.lineage import BASE, Chain, name_of
from pipeline.records import place
from pipeline.report.rows import Report

PICTURES = """\
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
# pictures: uint8 (N, H, W, C), as np.asarray(PIL.Image.open(...)) has them; the graph resizes and normalises
"""
TENSORS = """\
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
mean, std = (np.float32(json.loads(facts[name])).reshape(-1, 1, 1) for name in ("mean", "std"))
images = (pixels.astype(np.float32) / 255 - mean) / std  # pixels: uint8 (N, C, H, W), C, H, W as facts["shape"] says
# where facts["crop"] is not null, pixels are the middle of an image whose shorter side was resized to facts["crop"]["resize"]
"""
SEEN = {
    "classify": """\
(probabilities,) = session.run(["probabilities"], {"pictures": pictures})  # (N, classes)
answers = [json.loads(facts["classes"])[index] for index in probabilities.argmax(1)]
""",
    "segment": """\
(probabilities,) = session.run(["probabilities"], {"pictures": pictures})  # (N, 1, H, W)
answers = probabilities[:, 0] > 0.5  # masks (N, H, W)
""",
    "depth": """\
(depth,) = session.run(["depth"], {"pictures": pictures})  # (N, 1, H, W)
answers = depth[:, 0]  # metres (N, H, W)
""",
}
ANSWERS = {
    "classify": """\
(logits,) = session.run(["logits"], {"images": images})  # (N, classes)
answers = [json.loads(facts["classes"])[index] for index in logits.argmax(1)]
""",
    "segment": """\
(logits,) = session.run(["logits"], {"images": images})  # (N, 1, H, W)
answers = logits[:, 0] > 0  # masks (N, H, W)
""",
    "depth": """\
(depth,) = session.run(["depth"], {"images": images})  # (N, 1, H, W)
answers = depth[:, 0]  # metres (N, H, W)
""",
}
REQUEST = """\
import json, sys
import numpy as np
from PIL import Image

pixels = np.atleast_3d(Image.open(sys.argv[1]).convert(sys.argv[2]))[None]  # L for networks of one channel, or RGB
pictures = {"name": "pictures", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.ravel().tolist()}
outputs = [{"name": "probabilities", "parameters": {"classification": 1}}]
triton = {"inputs": [pictures], "outputs": outputs}
print(json.dumps(triton if sys.argv[3] == "triton" else {"inputs": {"pictures": pixels.tolist()}}))
"""
TRITON = """\
# repository/ holds a model for every variant and precision, and, once one was chosen, `champion`
tritonserver --model-repository repository --disable-auto-complete-config --http-address 127.0.0.1 --grpc-address 127.0.0.1
python request.py picture.png {mode} triton > request.json  # without a GPU: --model-config-name=cpu in the line above
curl -s http://127.0.0.1:8000/v2/models/{served}/infer -H 'Content-Type: application/json' -d @request.json
"""
MLFLOW = """\
# the champion ({alias}) out of the registry, and a picture in words: in Winnow's folder
python -m stages.serve
python -m stages.ask picture.png
# the same with MLflow alone; the registered model is called as tracking.experiment in params.yaml
mlflow models serve --model-uri models:/winnow@champion --env-manager local --host 127.0.0.1 --port 5001
python request.py picture.png {mode} mlflow > request.json
curl -s http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d @request.json
"""


CLASS = '{"name": "probabilities", "parameters": {"classification": 1}}'  # of Triton: the likeliest by its name, as "0.98:4:four"
WANTED = {
    "classify": CLASS,
    "segment": '{"name": "probabilities"}',
    "depth": '{"name": "depth"}',
}


def guide(report: Report) -> str:
    """What is the same for all networks: a fold for each way to use one; the first stands open."""
    task, first = report.names.task, next((chain for chain in report.chains if "export" in chain.records), None)
    chosen = (report.champion or {}).get("champion")
    served = "champion" if chosen else first.name if first else "NAME"
    mode = "RGB" if first is None or _channels(first) == 3 else "L"
    parts = {
        "ONNX Runtime, pictures as they are: pictures.onnx": PICTURES + SEEN[task],
        "ONNX Runtime, normalised tensors: model.onnx": TENSORS + ANSWERS[task],
        "Triton": TRITON.format(served=served, mode=mode),
        "MLflow": MLFLOW.format(alias=chosen or "not set, for nothing was chosen", mode=mode),
        "request.py, which writes a picture as JSON for both servers": REQUEST.replace(CLASS, WANTED[task]),
    }
    folds = [
        f"<details{'' if index else ' open'}><summary>{escape(title)}</summary><pre tabindex=0>{escape(text)}</pre></details>"
        for index, (title, text) in enumerate(parts.items())
    ]
    return "".join(folds)


def snippets(chain: Chain) -> str:
    """What one exported chain is called: its files, its models in Triton, its tags in MLflow."""
    record = chain.records["export"]
    paths = [str(place(Path(), record) / name) for name in record["artifacts"] if name.endswith(".onnx")]
    links = ", ".join(f'<a href="../{escape(quote(path))}"><code>outputs/{escape(path)}</code></a>' for path in paths)
    variant = name_of(chain.revive, chain.compress, chain.seed, BASE)
    lines = [f'path = "outputs/{path}"' for path in paths if "pictures" in path or len(paths) == 1]
    lines.append(f"curl -s http://127.0.0.1:8000/v2/models/{chain.name}/infer -d @request.json  # Triton, pictures")
    lines.append(f"curl -s http://127.0.0.1:8000/v2/models/{chain.name}-tensors  # Triton, tensors: what it wants to be given")
    lines.append(f"mlflow models serve -m models:/winnow/VERSION  # with the tags variant {variant}, precision {chain.precision}")
    inside = f"<p>{links}</p><pre tabindex=0>{escape(chr(10).join(lines))}</pre>"
    return f"<details><summary>{escape(chain.precision)}: files and names</summary>{inside}</details>"


def _channels(chain: Chain) -> int:
    """How many channels pictures have: what the network's first layer reads."""
    layers = chain.records.get("collapse", {}).get("layers") or [{}]
    return layers[0].get("full_inputs", 3)

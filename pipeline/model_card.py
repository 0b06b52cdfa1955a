"""A model card: what a shipped network is, what it was made of, how good and how fast it was, and what nobody has tried.

Markdown with the YAML block at its head that model hubs read (https://huggingface.co/docs/hub/model-cards). It holds what the
records and the files say, and no path of the machine it was written on.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline import files as disk
from pipeline.card_figures import costs, scores, table
from pipeline.data.licences import LICENCES
from pipeline.errors import InputError
from pipeline.lineage import BASE, Chain

PIPELINES = {"classify": "image-classification", "segment": "image-segmentation", "depth": "depth-estimation"}
PRIVATE = {"root", "start"}  # parameters that are places on a disk


def text(chain: Chain, champion: dict[str, Any], files: dict[str, Path], siblings: Sequence[Chain] = ()) -> str:
    """The card of one variant in one precision.

    `champion` is what champion.json holds, or empty where nothing shall be said of the choice. `files`: the ONNX files it speaks
    of, by the names they are shipped under. `siblings`: the same variant and precision of other seeds, for the spread.
    """
    forms = {name: _graph(path) for name, path in files.items() if path.suffix == ".onnx"}
    sums = [[name, f"{path.stat().st_size:,}", disk.sha256(path)] for name, path in files.items()]
    parts = [
        f"---\n{yaml.safe_dump(_head(chain), sort_keys=False, allow_unicode=True)}---\n",
        f"# {chain.name}\n\n{_what(chain, champion)}",
        f"## Data\n\n{_data(chain)}",
        f"## How it was made\n\n{_lineage(chain)}",
        f"## How good it is\n\n{scores(chain, siblings)}",
        f"## How fast and how large it is\n\n{costs(chain)}",
        f"## How to use it\n\n{_use(chain, forms)}",
        f"## Limits\n\n{_limits(chain, siblings)}",
        f"## Licence\n\n{_licences(chain)}",
        f"## Files\n\n{table(['file', 'bytes', 'SHA-256'], sums)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def code_licence(root: Path) -> str | None:
    """What pyproject.toml below `root` or a file LICENSE says of the code; None where neither says anything."""
    project = root / "pyproject.toml"
    stated = tomllib.loads(project.read_text())["project"].get("license") if project.is_file() else None
    if isinstance(stated, dict):
        stated = stated.get("text") or f"see {stated['file']}"
    named = sorted(path.name for path in root.glob("LICEN[CS]E*"))
    return stated or (f"see {named[0]}" if named else None)


def read_onnx(path: Path) -> Any:
    """The graph in a file, new at each call; `InputError` where it is no ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_model(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path} is no ONNX file ({error}): delete its folder and run `dvc repro`") from None


def _head(chain: Chain) -> dict[str, Any]:
    """The YAML block."""
    names, score = chain.names, chain.metric("export", f"test_{chain.names.headline}")
    data, licence = _name(chain), code_licence(Path(__file__).resolve().parents[1])
    methods = [f"{stage}-{record['parameters'].get(stage, {}).get('method')}" for stage, record in chain.records.items()]
    head: dict[str, Any] = {
        "license": "other" if licence else "unknown",
        **({"license_name": licence} if licence else {}),
        "library_name": "onnx",
        "pipeline_tag": PIPELINES[names.task],
        "tags": ["winnow", "onnx", chain.precision, *(name for name in methods if not name.endswith("-None"))],
        "datasets": [data],
        "metrics": [names.headline],
    }
    if score is not None:
        measured = {"type": names.headline, "name": f"{names.title} on the test split", "value": score}
        task = {"type": PIPELINES[names.task]}
        result = {"task": task, "dataset": {"type": data, "name": data, "split": "test"}, "metrics": [measured]}
        head["model-index"] = [{"name": chain.name, "results": [result]}]
    return head


def _what(chain: Chain, champion: dict[str, Any]) -> str:
    parts = {
        "classify": "A network that says which class a picture is of.",
        "segment": "A network that says of each pixel of a picture whether it belongs to what was asked for.",
        "depth": "A network that says how far away each pixel of a picture is, in metres.",
    }
    said = (
        f"{parts[chain.names.task]} Revived by `{chain.revive}`, compressed by `{chain.compress}`, seed {chain.seed}, as ONNX in "
    )
    said += f"{chain.precision}."
    chosen, rule = champion.get("champion"), champion.get("reason")
    if chosen == chain.name:
        return f"{said}\n\nIt is the champion of its grid: {rule}."
    if chosen:
        return f"{said}\n\nIt is not the champion of its grid; that is {chosen}: {rule}."
    return f"{said}\n\nIts grid has no champion: {rule}." if rule else said


def _name(chain: Chain) -> str:
    return str(chain.records.get("prepare", {}).get("parameters", {}).get("data", {}).get("name", "unknown"))


def _data(chain: Chain) -> str:
    record = chain.records.get("prepare")
    if record is None:
        return "No record of the data is known."
    counts = {key.removesuffix("_images"): value for key, value in record["metrics"].items() if key.endswith("_images")}
    lines = [f"{LICENCES[_name(chain)].title} (`{_name(chain)}`)." if _name(chain) in LICENCES else f"`{_name(chain)}`."]
    lines += [f"Images: {', '.join(f'{value:,.0f} {split}' for split, value in counts.items())}."] if counts else []
    if chain.names.task == "classify" and "classes" in record["metrics"]:
        lines[-1] = lines[-1].removesuffix(".") + f"; {record['metrics']['classes']:.0f} classes."
    return "\n".join([*lines, f"Fingerprint of the prepared data: `{record['data']}`.", *map(_placeless, record["notes"])])


def _lineage(chain: Chain) -> str:
    """Stages in their order with all their parameters, commit and versions."""
    lines = []
    for stage, record in chain.records.items():
        lines.append(
            f"- {stage}: begun {record['started']}, {record['seconds']:.0f} s"
            + "".join(f"; {_placeless(n)}" for n in record["notes"])
        )
    last = list(chain.records.values())[-1]
    stages = {stage: _portable(record["parameters"]) for stage, record in chain.records.items() if record["parameters"]}
    commit = f"Commit of the code: `{last['commit']}`." if last["commit"] else "The code was under no version control."
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    listed = yaml.safe_dump(stages, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([*lines, "", f"{commit} Versions: {versions}.", "", "Parameters of each stage:", "", f"```yaml\n{listed}```"])


def _portable(value: Any) -> Any:
    """Parameters without what names a place on a disk."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items() if key not in PRIVATE}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _placeless(note: str) -> str:
    """A note with the last part alone of every absolute path."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s:;,/]+/)+([^\s:;,/]*)", r"\1", note)


def _graph(path: Path) -> dict[str, Any]:
    """Inputs and outputs of an ONNX file, as "name: type (axes)", and its metadata."""
    from onnx import helper

    proto, lists = read_onnx(path), {}
    for key, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
        lists[key] = []
        for value in values:
            tensor = value.type.tensor_type
            axes = ", ".join(str(axis.dim_value) if axis.HasField("dim_value") else "any" for axis in tensor.shape.dim)
            kind = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
            lists[key].append(f"`{value.name}`: {kind} ({axes})")
    return lists | {"metadata": {entry.key: entry.value for entry in proto.metadata_props}}


def _use(chain: Chain, forms: dict[str, dict[str, Any]]) -> str:
    """Inputs and outputs of each file, and the lines that load it."""
    parts = []
    for name, form in forms.items():
        told, pictures = form["metadata"], form["inputs"][0].startswith("`pictures`")
        kind = "pictures as a client has them, (N, H, W, C), 0 to 255" if pictures else "images (N, C, H, W), normalised beforehand"
        lines = [f"`{name}` takes {kind}.", "", *(f"- in {entry}" for entry in form["inputs"])]
        lines += [f"- out {entry}" for entry in form["outputs"]]
        if not pictures and {"mean", "std"} <= told.keys():
            lines.append(f"- pixels are scaled to [0, 1], then (x - mean) / std, with mean {told['mean']} and std {told['std']}")
        if "classes" in told:
            classes = json.loads(told["classes"])
            lines.append(f'- key "classes" of its metadata: {", ".join(classes[:10])}{", ..." if len(classes) > 10 else ""}')
        given = "pictures" if pictures else "images"
        code = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}")\n'
        code += f'answers = session.run(None, {{"{given}": {given}}})'
        parts.append("\n".join([*lines, "", f"```python\n{code}\n```"]))
    return "\n\n".join(parts) or "No file was given."


def _limits(chain: Chain, siblings: Sequence[Chain]) -> str:
    """What the figures do not tell; each line is true of this network."""
    count, names = chain.metric("prepare", "test_images"), chain.names
    images = f"the {count:,.0f} images" if count else "the images"
    lines = [
        f"Tested on {images} of the test split of {_name(chain)} alone: nothing is known of other pictures, cameras or damage."
    ]
    if names.task == "classify":
        lines += [
            "It names one of its classes for whatever picture it is given; it was not tested on pictures of none of them.",
            "Its probabilities are a softmax: how often it is right where it says 90 % was not compared with 90 %.",
            "The score is one over all classes: single classes may fare worse.",
        ]
    lines.append("No evaluation of fairness, of robustness against attacks, or of privacy was made.")
    if not siblings:
        lines.append("Figures are of one training: what another seed would give is not stated here.")
    for event in chain.records.get("export", {}).get("events", []):
        if event["kind"] == "quantized" and chain.precision == "int8":
            kept, share = event.get("kept") or [], event.get("share_int8")
            drawn = chain.records["export"]["parameters"].get("export", {}).get("int8", {})
            text = f"Ranges of {chain.precision} were calibrated on training images"
            text += f" ({drawn['images']}, {drawn['calibration']})" if {"images", "calibration"} <= drawn.keys() else ""
            text += ": pictures brighter or of higher contrast than those may saturate."
            text += f" {100 * share:.1f} % of the multiply-adds are in {chain.precision}." if share is not None else ""
            lines.append(text + (f" In {BASE} stayed: {', '.join(kept)}." if kept else ""))
    if chain.precision != BASE:
        lines.append(f"{chain.precision} was checked on one machine; processors with other instructions may round otherwise.")
    if "profile" in chain.records:
        lines.append("Times are of the machine named above and of ONNX Runtime alone, without a server.")
    return "\n".join(f"- {line}" for line in lines)


def _licences(chain: Chain) -> str:
    code = code_licence(Path(__file__).resolve().parents[1])
    owner = "its owner must state one before others may use it"
    lines = [f"- Code and weights: {code or f'no licence is stated; {owner}'}."]
    if found := LICENCES.get(_name(chain)):
        lines.append(f"- Data, {found.title}: {found.terms}" + (f" ({found.source})." if found.source else "."))
    else:
        lines.append(f"- Data, {_name(chain)}: not known here.")
    return "\n".join(lines)

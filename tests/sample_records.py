"""Hand-made records of a whole grid, as the stages write them: plausible numbers from closed formulas, none at random."""

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pipeline.records import place

REVIVE = ("finetune", "reactivate", "restart")
COMPRESS = ("none", "diet", "dealloc")
ACCURACY = {"finetune": 0.9805, "reactivate": 0.9861, "restart": 0.9833}
LOSS = {"none": 0.0, "diet": 0.0139, "dealloc": 0.0028}
INT8 = {"loss": 0.0028, "size": 0.27, "time": 0.4}  # beside fp32: score lost, share of its bytes, share of its time
KEPT = {"none": 1.0, "diet": 0.5, "dealloc": 0.8}
LAYERS = (("conv1", 1, 32), ("conv2", 32, 32), ("conv3", 32, 64), ("fc1", 256, 64), ("fc2", 64, 10))
HARDWARE = {
    "cpu": {"name": "Sample CPU", "logical_cores": 4, "physical_cores": 2, "usable_cores": 2, "instructions": ["avx2"]},
    "memory_gib": 16,
    "system": "Linux 6.1 x86_64",
    "python": "3.11.9",
    "gpus": [],
    "packages": {"torch": "2.14.1", "onnxruntime-gpu": "1.31.1"},
}
FIT = {"epochs": 6, "batch_size": 64, "optimizer": "sgd", "lr": 0.05, "schedule": {"every": 2, "factor": 0.5}}


def record(stage: str, variant: str, **fields: Any) -> dict[str, Any]:
    """One record, complete, `fields` replacing what is usual."""
    usual: dict[str, Any] = {"format": 2, "stage": stage, "variant": variant, "revive": None, "compress": None, "seed": None}
    usual["precision"] = None
    usual |= {"parameters": {}, "metrics": {}, "history": [], "events": [], "layers": [], "notes": [], "artifacts": []}
    usual |= {"data": "7a4f1e94" * 8, "started": "2026-11-21T11:30:00+00:00", "seconds": 12.5, "hardware": HARDWARE}
    usual |= {"versions": {"torch": "2.14.1"}, "commit": "0123456789abcdef0123456789abcdef01234567"}
    return copy.deepcopy(usual | fields)


def grid(
    seeds: tuple[int, ...] = (0, 1),
    revive: tuple[str, ...] = REVIVE,
    compress: tuple[str, ...] = COMPRESS,
    precisions: tuple[str, ...] = ("fp32",),
    idle: bool = False,
) -> list[dict]:
    """The records of revive x compress x seeds x precisions ("fp32", "int8"); CUDA was asked for and absent; `finetune-none` is the
    control. With `idle`, batch 1 was also timed with a pause before each call."""
    data = {"data": {"name": "digits", "image_size": 16, "mean": "auto"}}
    images = {"train_images": 1222, "validation_images": 216, "test_images": 359, "classes": 10}
    made = [record("prepare", "data", parameters=data, metrics=images)]
    for seed in seeds:
        model = {"model": {"name": "cifar_quick", "width": 1.0}}
        own = {"overparameterize": {"method": "kflo", "depth": 2}, "fit": FIT}
        made.append(_trained("train", f"{seed}", 0.975 + 0.001 * seed, 1.0, model | {"train": own}, 250_000, seed=seed))
        for one in revive:
            options = {"revive": {"method": one, "alpha": 0.2, "fit": FIT}}
            revived = _trained(
                "revive", f"{one}-{seed}", _accuracy(one, "none", seed), 1.0, options, 250_000, revive=one, seed=seed
            )
            made.append(revived | {"events": edits(one)})
            for two in compress:
                made += variant(one, two, seed, precisions, idle)
    return made


def edits(revive: str) -> list[dict[str, Any]]:
    """What a revive method logs: a restart after epoch 2 of the six, reactivation after epochs 2 and 4, a control nothing."""
    if revive == "restart":
        sizes = (("conv1", 9, 0.004), ("conv2", 20, 0.9), ("conv3", 12, 1.1))
        rows = [{"name": n, "filters": f, "mean_norm_before": norm, "mean_norm_after": 2.25} for n, f, norm in sizes]
        facts = {"filters": sum(row["filters"] for row in rows), "validation_accuracy_after": 0.31, "layers": rows}
        return [{"kind": "restart", "epoch": 2, "round": 1, **facts}]
    made = []
    for epoch, share in ((2, 3), (4, 1)) if revive == "reactivate" else ():
        rows = [{"name": n, "filters": 2 * f, "kernels": 3 * f * share} for n, f in (("conv2", 3), ("conv3", 1))[:share]]
        rows = [row | {"mean_norm_before": 0.02 / share, "mean_norm_after": 0.125} for row in rows]
        facts = {"gamma": 0.1 * share, "kernels": sum(row["kernels"] for row in rows), "dead_filters": 2, "layers": rows}
        made.append({"kind": "reactivation", "epoch": epoch, "round": 1, **facts})
    return made


def deep(events: int, layers: int) -> dict[str, Any]:
    """A revive record with as many events as a long training of a deep network has: weight evolution after every epoch."""
    names = [f"layer{1 + 3 * i // layers}.{i // 2}.conv{1 + i % 2}" for i in range(layers)]
    history, logged = [], []
    for epoch in range(1, events + 2):
        history.append(_row(epoch, epoch / 30, 1e-6))
        places = range(epoch % 3, layers, 3)
        rows = [
            {
                "name": names[i],
                "filters": 1 + (i + epoch) % 16,
                "mean_norm_before": 0.02 * (1 + i),
                "mean_norm_after": 0.03 * (1 + i),
            }
            for i in places
        ]
        facts = {"share": 0.3, "filters": sum(row["filters"] for row in rows), "norms": {"gamma": 3, "beta": 1}, "layers": rows}
        logged.append({"kind": "weight_evolution", "epoch": epoch, "round": 1, **facts})
    widths = {"inputs": 16, "outputs": 16, "full_inputs": 16, "full_outputs": 16}
    sizes = [{"name": name, "type": "Conv2d", **widths} for name in names]
    identity = {"revive": "evolve", "seed": 0}
    return record("revive", "evolve-0", history=history, events=logged[:-1], layers=sizes, **identity)


def variant(
    revive: str, compress: str, seed: int, precisions: tuple[str, ...] = ("fp32",), idle: bool = False
) -> list[dict[str, Any]]:
    """The records that belong to one variant alone: of compress, collapse, and of export and profile in each precision."""
    kept, accuracy = KEPT.get(compress, 0.7), _accuracy(revive, compress, seed)
    identity = {"revive": revive, "compress": compress, "seed": seed}
    name, parameters = f"{revive}-{compress}-{seed}", int(77_098 * kept**1.8)
    options = {"compress": {"method": compress, "groups": 2, "protect": ["fc1", "fc2"], "fit": FIT}, "runtime": {"threads": 2}}
    compressed = _trained("compress", name, accuracy, kept, options, 3 * parameters, **identity)
    compressed["notes"] = [f"{compress} leaves fc2: the network's output"]
    before = {"kind": "batchnorm", "epoch": 0, "round": 0, "validation_accuracy_before": 0.31, "validation_accuracy_after": 0.94}
    compressed["events"] = [before] if compress != "none" else []
    proof = {"test_accuracy": accuracy, "max_abs_difference": 3.1e-6, "top1_agreement": 1.0}
    collapsed = record("collapse", name, metrics=proof | {"parameters": parameters}, layers=_layers(kept), **identity)
    collapsed["artifacts"] = compressed["artifacts"]
    exports = [_export(name, accuracy, parameters, identity | {"precision": precision}) for precision in precisions]
    return [compressed, collapsed, *exports, *(_profile(name, kept, parameters, exported, idle) for exported in exports)]


def _export(name: str, accuracy: float, parameters: int, identity: dict[str, Any]) -> dict[str, Any]:
    metrics = {"test_accuracy": accuracy, "torch_test_accuracy": accuracy, "validation_accuracy": accuracy - 0.003}
    metrics |= {"max_abs_difference": 9.5e-7, "top1_agreement": 1.0, "size_mb": parameters * 4 / 1e6 + 0.012}
    made = record("export", name, parameters={"export": {"opset": 20, "precisions": ["fp32", "int8"]}}, **identity)
    if identity["precision"] == "int8":
        loss = INT8["loss"]
        metrics |= {"test_accuracy": accuracy - loss, "validation_accuracy": accuracy - 0.003 - loss, "loss": loss}
        metrics |= {"max_abs_difference": 0.11, "top1_agreement": 0.9944, "size_mb": INT8["size"] * metrics["size_mb"]}
        made["events"] = [{"kind": "quantized", "kept": ["conv1"], "share_int8": 0.97, "images": 256, "calibration": "minmax"}]
    return made | {"metrics": metrics, "artifacts": ["model.onnx", "pictures.onnx"]}


def _profile(name: str, kept: float, parameters: int, exported: dict[str, Any], idle: bool) -> dict[str, Any]:
    asked = {"control": "finetune-none", "providers": ["cuda", "cpu"], "threads": 1, "batch_sizes": [1, 32]}
    asked["idle_ms"] = 20 if idle else None
    identity = {key: exported[key] for key in ("revive", "compress", "seed", "precision")}
    share = (0.2 + 0.8 * kept) * (INT8["time"] if identity["precision"] == "int8" else 1)
    counts = {"parameters": parameters, "macs": int(2_984_576 * kept**1.9), "size_mb": exported["metrics"]["size_mb"]}
    metrics = counts | {"peak_memory_mb": 61.5} | _latencies(share, identity["seed"], idle)
    absent = {"kind": "absent", "provider": "cuda", "reason": "onnxruntime finds no CUDA device"}
    made = record("profile", name, parameters={"profile": asked}, metrics=metrics, **identity)
    return made | {"events": [absent], "notes": ["cuda was not measured: onnxruntime finds no CUDA device"]}


def write(records: list[dict[str, Any]], root: Path) -> None:
    """The folders of `records` below `root`, with real, tiny files in the place of the models."""
    for entry in records:
        folder = place(root, entry)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").write_text(json.dumps(entry, indent=1))
        for name in entry["artifacts"]:
            (folder / name).parent.mkdir(exist_ok=True)
            made = {"model.onnx": onnx_bytes, "pictures.onnx": pictures_bytes}.get(name)
            (folder / name).write_bytes(made() if made else hashlib.sha256(f"{entry['variant']}".encode()).digest() * 8)


def onnx_bytes() -> bytes:
    """A network of one linear layer on 1 x 4 x 4 images, with three classes and the metadata of an exported model."""
    from onnx import TensorProto, helper

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 4, 4])
    return _network([helper.make_node("Flatten", ["images"], ["flat"])], images, [])


def pictures_bytes() -> bytes:
    """The same network on pictures, uint8 (N, H, W, 1) of any size, with probabilities beside the logits."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    pictures = helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["batch", "height", "width", 1])
    nodes = [
        helper.make_node("Cast", ["pictures"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Resize", ["planes", "", "", "sizes"], ["small"], axes=[2, 3], mode="linear", antialias=1),
        helper.make_node("Sub", ["small", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["images"]),
        helper.make_node("Flatten", ["images"], ["flat"]),
    ]
    numbers = {"sizes": np.array([4, 4]), "mean": np.float32([255 * 0.25]), "std": np.float32([255 * 0.5])}
    return _network(nodes, pictures, [numpy_helper.from_array(value, name) for name, value in numbers.items()])


def _network(nodes: list[Any], given: Any, numbers: list[Any]) -> bytes:
    """`nodes` make "flat" of what is given; the linear layer follows, and for pictures a softmax."""
    import numpy as np
    from onnx import TensorProto, checker, helper, numpy_helper

    weight = numpy_helper.from_array((np.arange(48, dtype=np.float32).reshape(16, 3) % 7 - 3) / 5, "weight")
    nodes = [*nodes, helper.make_node("MatMul", ["flat", "weight"], ["logits"])]
    outputs = ["logits"]
    if given.name == "pictures":
        nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
        outputs.insert(0, "probabilities")
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in outputs]
    graph = helper.make_graph(nodes, "sample", [given], told, [weight, *numbers])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"mean": "[0.25]", "std": "[0.5]", "classes": '["zero", "one", "two"]', "shape": "[1, 4, 4]"})
    checker.check_model(model)
    return model.SerializeToString()


def _accuracy(revive: str, compress: str, seed: int) -> float:
    return ACCURACY.get(revive, 0.97) - LOSS.get(compress, 0.02) + 0.0028 * seed


def _trained(stage: str, name: str, accuracy: float, kept: float, parameters: dict, count: int, **identity: Any) -> dict:
    history = [_row(epoch, 0.6 * epoch, _weakest(stage, name, epoch)) for epoch in range(1, 7)]
    metrics = {"test_accuracy": accuracy, "test_loss": 0.07, "validation_accuracy": accuracy - 0.003, "parameters": count}
    made = record(stage, name, parameters=parameters, metrics=metrics, history=history, layers=_layers(kept), **identity)
    return made | {"artifacts": ["model/model.safetensors", "model/model.json"]}


def _row(epoch: int, progress: float, weakest: float) -> dict[str, float]:
    """A row of history: the loss falls with `progress`, the weakest filter's norm is `weakest`."""
    loss = 1.6 * math.exp(-progress) + 0.05
    row = {"epoch": epoch, "round": 1, "lr": 0.05 / epoch, "train_loss": loss, "train_accuracy": 1 - 0.4 * loss}
    row |= {"validation_loss": loss + 0.03, "validation_accuracy": 1 - 0.45 * loss, "images_per_s": 900.0}
    median = 2 - loss / 2
    norms = {
        0: weakest,
        5: max(1.5 * weakest, 0.05),
        25: 0.6 * median,
        50: median,
        75: 1.35 * median,
        95: 2 * median,
        100: 3 * median,
    }
    dead = 0.005 * epoch if weakest < 0.01 else 0.0
    return row | {f"filter_norm_p{p}": value for p, value in norms.items()} | {"dead_filters": dead}


def _weakest(stage: str, name: str, epoch: int) -> float:
    """It dies in training, and stays dead where nothing revives it: in the end it is exactly 0."""
    after = {"restart": 2, "reactivate": 4}.get(name.split("-")[0], math.inf)  # the last event
    if stage == "train":
        return 0.4 * math.exp(-0.8 * epoch)
    if stage == "revive":
        return 0.0033 * math.exp(-0.5 * epoch) if epoch <= after else 0.25
    return 0.0 if math.isinf(after) else 0.2


def _layers(kept: float) -> list[dict[str, Any]]:
    rows = []
    for name, inputs, outputs in LAYERS:
        new_in, new_out = (inputs if inputs == 1 else int(inputs * kept)), (outputs if outputs == 10 else int(outputs * kept))
        row = {"name": name, "type": "Linear" if name.startswith("fc") else "Conv2d", "inputs": new_in, "outputs": new_out}
        rows.append(row | {"full_inputs": inputs, "full_outputs": outputs})
    return rows


def _latencies(share: float, seed: int, idle: bool) -> dict[str, float]:
    """Of a network that takes `share` of the control's time."""
    found = {}
    for key, batch, base in (("cpu_b1", 1, 0.21), ("cpu_b32", 32, 4.4), *([("cpu_b1_idle", 1, 0.34)] if idle else [])):
        p50, ratio = base * share * (1 + 0.01 * seed), 1 / share
        found |= {f"latency_{key}_p50_ms": p50, f"latency_{key}_p90_ms": p50 * 1.1, f"latency_{key}_p99_ms": p50 * 1.4}
        found |= {f"latency_{key}_ci_low_ms": p50 * 0.98, f"latency_{key}_ci_high_ms": p50 * 1.02}
        found |= {f"throughput_{key}_images_per_s": 1000 * batch / p50, f"speedup_{key}": ratio}
        found |= {f"speedup_{key}_ci_low": ratio * 0.97, f"speedup_{key}_ci_high": ratio * 1.03}
    return found

"""Each stage depends on what it can reach, no more and no less; imports point one way; importing does nothing."""

import ast
import functools
import graphlib
import hashlib
import importlib
import inspect
import json
import modulefinder
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import stages.code
from pipeline import methods
from pipeline.sources import FAMILIES, ROOT, reach

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
MACHINE: dict[str, Any] = yaml.safe_load((ROOT / "machine/dvc.yaml").read_text())["stages"]
COMMANDS = {name: stage["cmd"].split() for name, stage in (STAGES | MACHINE).items()}
SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").glob("*.py")])
WHOLE = ("check", "coverage")  # they ask every network and method, and list the families' folders

# How dvc.yaml names the one file of a family that a stage imports.
CHOSEN = {
    "models": "pipeline/models/${model.name}.py",
    "overparameterize": "pipeline/overparameterize/${train.overparameterize.method}.py",
    "train.revive": "pipeline/revive/${train.revive.method}.py",
    "train.compress": "pipeline/compress/${train.compress.method}.py",
    "revive": "outputs/code/revive-${item.revive}.txt",
    "compress": "outputs/code/compress-${item.compress}.txt",
}
VARIANT = "${item.revive}-${item.compress}-${item.seed}"
DATA = "outputs/prepare/data"
EVERY_RECORD = {"outputs/prepare/record.json"} | {
    f"outputs/{stage}" for stage in ("train", "revive", "compress", "collapse", "export", "profile")
}
CHAMPION = "outputs/champion/champion.json"
# What each stage takes beside source files.
TAKEN: dict[str, set[str]] = {
    "code": {"params.yaml", "pipeline", "stages"},
    "check": {"params.yaml"},
    "prepare": {"outputs/check/passed.json", "${data.root}"},
    "coverage": {f"{DATA}/data.json"},
    "train": {DATA, "outputs/coverage/passed.json", "${train.start}"},
    "revive": {DATA, "outputs/train/${item.seed}/model"},
    "compress": {DATA, "outputs/revive/${item.revive}-${item.seed}/model"},
    "collapse": {DATA, f"outputs/compress/{VARIANT}/model"},
    "export": {DATA, f"outputs/collapse/{VARIANT}/model"},
    "profile": {
        "outputs/hardware/hardware.json",
        f"outputs/collapse/{VARIANT}/model",
        f"outputs/export/{VARIANT}",
        "outputs/export/${profile.control}-${item.seed}/fp32/model.onnx",
    },
    "champion": EVERY_RECORD,
    "repository": EVERY_RECORD | {CHAMPION, "pyproject.toml"},
    "report": EVERY_RECORD | {CHAMPION, *(f"pipeline/report/page.{kind}" for kind in ("html", "css", "js"))},
    "track": EVERY_RECORD | {CHAMPION, "pyproject.toml", "outputs/report"},
}
GRID = ("seed", "variants", "export.precisions")
RUNTIME = {f"runtime.{key}" for key in ("device", "threads", "processes", "hosts", "launch")}  # not save_s and workers
PARAMETERS: dict[str, set[str]] = {
    "prepare": {"data"},
    "coverage": {"model", "train", "variants", "revive", "compress"},
    "train": {"model", "train", "augment", *RUNTIME},
    "revive": {"revive.${item.revive}", "augment", *RUNTIME},
    "compress": {"compress.${item.compress}", "augment", *RUNTIME},
    "collapse": {"augment", *RUNTIME},
    "export": {"export", "runtime.threads"},
    "profile": {"profile", "export.precisions"},
    "champion": {*GRID, "champion"},
    "repository": {*GRID, "repository"},
    "report": {*GRID, "profile.control"},
    "track": {*GRID, "tracking"},
}
# From the ground up: a module imports from its own floor and from lower ones.
GROUND = "errors files config hardware methods layers channels hooks evaluation progress resume records data models grid lineage "
GROUND += "export inference measure latency expansion branches averaging tracing filters precision weights operators involution "
GROUND += "redirect channel_ids ecdm tasks scores pictures conventions deployment precisions quantization pictures_form profiling "
GROUND += "distributed sources step gpu_sharing side_by_side "
SURGERY = "coverage surgery structure costs families budget removal grouping selection allocation latency_budget sensitivity "
SURGERY += "masking takeover"
SHIPPED = "champion shipping repository triton_config model_card card_figures asking "
SHIPPED += "report tracking tracking_model tracking_registry tracking_server"
FLOORS = [
    set(GROUND.split()),
    set(f"{SURGERY} {SHIPPED} training overparameterize revive".split()),
    {"checkpoint", "compress", "compression", "chain", "first_training", "certificate", "distillation"},
    {"stages"},
]  # fmt: skip


def test_every_stage_of_the_chain_is_compared() -> None:
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__", "ui", "serve", "ask", "build"}
    assert set(COMMANDS) == scripts == {*TAKEN, "hardware"}
    for name, command in COMMANDS.items():
        assert command[:3] == ["python", "-m", f"stages.{name}"]
        matrix = list((STAGES | MACHINE)[name].get("matrix", {}))
        assert command[3:] in ([], ["${item}"], ["${item.seed}"]) and bool(command[3:]) == bool(matrix)
        assert matrix == list(inspect.signature(importlib.import_module(f"stages.{name}").main).parameters)
    assert MACHINE["hardware"]["always_changed"] and "deps" not in MACHINE["hardware"]  # whatever it reaches, it runs


@pytest.mark.parametrize("stage", TAKEN)
def test_deps_are_what_the_stage_takes(stage: str) -> None:
    _, families = reach(f"stages/{stage}.py")
    chosen = {f"pipeline/{family}" if stage in WHOLE else CHOSEN.get(f"{stage}.{family}", CHOSEN[family]) for family in families}
    assert stage not in WHOLE or families == set(FAMILIES)
    deps = STAGES[stage]["deps"]
    assert len(deps) == len(set(deps))
    assert set(deps) == TAKEN[stage] | chosen | ({f"outputs/code/{stage}.txt"} if stage != "code" else set())


def found_by_python(stage: str) -> set[str]:
    """What the standard library's own search through bytecode finds, blind to what is imported by name."""
    finder = modulefinder.ModuleFinder([str(ROOT)])
    finder.run_script(str(ROOT / "stages" / f"{stage}.py"))
    return {str(Path(module.__file__).relative_to(ROOT)) for module in finder.modules.values() if module.__file__}


@pytest.mark.parametrize("stage", [*TAKEN, "hardware"])
def test_the_import_closure_is_what_python_finds(stage: str) -> None:
    files, families = reach(f"stages/{stage}.py")
    expected = found_by_python(stage)
    for family in families:
        for name in methods.names(family):
            finder = modulefinder.ModuleFinder([str(ROOT)])
            finder.import_hook(f"pipeline.{family}.{name}")
            expected |= {str(Path(module.__file__).relative_to(ROOT)) for module in finder.modules.values() if module.__file__}
    members = {path for path in expected if Path(path).parent.name in FAMILIES and Path(path).name != "__init__.py"}
    assert files == expected - members


def test_code_sums_up_the_closures_and_the_blocks_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `shasum` would print of each file, and parameters as JSON."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    stages.code.main()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    wanted = {stage: sorted(reach(f"stages/{stage}.py")[0]) for stage in [*TAKEN, "hardware", "ui", "serve", "ask", "build"]}
    for family in ("revive", "compress"):
        wanted |= {f"{family}-{block}": [f"pipeline/{family}/{value['method']}.py"] for block, value in params[family].items()}
    lines = {path.stem: path.read_text().splitlines() for path in (tmp_path / "outputs/code").iterdir()}
    assert set(lines) == set(wanted)
    for name, paths in wanted.items():
        assert lines[name][: len(paths)] == [f"{hashlib.sha256((ROOT / path).read_bytes()).hexdigest()}  {path}" for path in paths]
        shared = [line.split(": ", 1) for line in lines[name][len(paths) :]]
        assert [key for key, _ in shared] == list(stages.code.SHARED.get(name, ()))
        for key, value in shared:
            assert json.loads(value) == functools.reduce(lambda inside, part: inside[part], key.split("."), params)


def test_a_file_that_is_no_module_is_taken_by_a_stage() -> None:
    others = [path for path in (ROOT / "pipeline").rglob("*.*") if path.suffix not in (".py", ".pyc")]
    assert {str(path.relative_to(ROOT)) for path in others} <= set().union(*TAKEN.values())


@pytest.mark.parametrize("stage", TAKEN)
def test_parameters_are_those_that_the_stage_uses(stage: str) -> None:
    shared = stages.code.SHARED.get(stage, ())
    assert not any("item." in key for key in shared)
    assert set(STAGES[stage].get("params", [])) | set(shared) == PARAMETERS.get(stage, set())


def test_what_a_stage_takes_is_what_another_one_makes() -> None:
    made = [out for stage in (STAGES | MACHINE).values() for out in stage["outs"]]
    outs = {next(iter(out)) if isinstance(out, dict) else out for out in made}
    assert len(outs) == len(made)
    control = "outputs/export/${profile.control}-${item.seed}/fp32/model.onnx"
    for taken in {path for path in set().union(*TAKEN.values()) if path.startswith("outputs/")} - {control}:
        assert any(out == taken or out.startswith(f"{taken}/") or taken.startswith(f"{out}/") for out in outs), taken


LOADED = """
import json, sys
import pipeline.methods
found = {}
for stage in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] in ("pipeline", "stages")]:
        del sys.modules[name]
    __import__(f"stages.{stage}")
    found[stage] = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in ("pipeline", "stages")]
    foreign = {"mlflow", "sklearn", "torchvision", "onnx", "matplotlib"} & set(sys.modules)
    assert stage in ("export", "profile", "report", "track") or not foreign, (stage, foreign)
print(json.dumps(found))
"""


def test_the_closure_holds_what_python_really_imports() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *TAKEN, "hardware"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage, paths in json.loads(done.stdout).items():
        files, _ = reach(f"stages/{stage}.py")
        loaded = {str(Path(path).relative_to(ROOT)) for path in paths}
        assert f"stages/{stage}.py" in loaded and loaded <= files, (stage, loaded - files)


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, by their dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative imports hide what is meant"
            for alias in node.names:
                deeper = ROOT.joinpath(*node.module.split("."), alias.name)
                found.add(f"{node.module}.{alias.name}" if deeper.is_dir() or deeper.with_suffix(".py").is_file() else node.module)
    return found


def own(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in ("pipeline", "stages")}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(name: str) -> str:
    """The word in FLOORS that stands for a module."""
    return "stages" if name.startswith("stages") else name.split(".")[1]


def test_imports_point_one_way() -> None:
    floor = {word: height for height, words in enumerate(FLOORS) for word in words}
    assert set(floor) == {part(module(path)) for path in SOURCES if path.name != "__init__.py" or path.parent.name != "pipeline"}
    graph = {module(path): own(path) for path in SOURCES}
    for name, imported in graph.items():
        for other in imported:
            assert floor[part(name)] >= floor[part(other)], f"{name} imports {other}"
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError where modules import each other in a circle


def test_a_stage_imports_no_other_stage() -> None:
    for path in (ROOT / "stages").glob("*.py"):
        assert not {name for name in own(path) if name.startswith("stages.")}, path


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_and_methods_know_no_other_and_no_caller(family: str) -> None:
    allowed = {
        "models": {"config", "errors", "layers", "models", "involution"},
        "overparameterize": {"config", "errors", "hooks", "expansion", "branches"},
        "revive": {"config", "errors", "layers", "hooks", "channels", "evaluation", "surgery", "filters", "precision"},
        "compress": {
            "config",
            "errors",
            "layers",
            "hooks",
            "channels",
            "channel_ids",
            "evaluation",
            "ecdm",
            "expansion",
            *SURGERY.split(),
        },
    }[family]
    assert methods.names(family)
    for name in methods.names(family):
        known = {other.removeprefix("pipeline.") for other in own(ROOT / "pipeline" / family / f"{name}.py")}
        assert known <= allowed, name


@pytest.mark.parametrize(
    ("package", "where"),
    [
        ("mlflow", "pipeline/tracking"),
        ("dvc", "stages/build.py"),
        ("sklearn", "nowhere"),
        ("matplotlib", "pipeline/report/plots.py"),
    ],
)
def test_only_one_place_knows_a_package(package: str, where: str) -> None:
    for path in SOURCES:
        known = any(name.split(".")[0] == package for name in imports(path))
        assert not known or str(path.relative_to(ROOT)).startswith(where), path


QUIET = """
import logging, random, sys, warnings
import numpy, torch
before = lambda: (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads(),
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), len(logging.root.handlers),
    logging.root.level, warnings.filters[:], sys.path[:], torch.cuda.is_initialized())
for name in sys.argv[1:]:
    state = before()
    __import__(name)
    assert before() == state, f"importing {name} changes something"
assert "mlflow" not in sys.modules
"""


def test_importing_a_module_does_nothing(tmp_path: Path) -> None:
    names = [module(path) for path in SOURCES]
    command = [sys.executable, "-W", "error::UserWarning", "-c", f"import sys; sys.path.append({str(ROOT)!r})" + QUIET, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


CHECK = """
import runpy, sys
sys.argv = ["stages/check.py"]
runpy.run_module("stages.check", run_name="__main__")
print("torch" in sys.modules)
"""


def test_a_second_check_has_nothing_to_do_until_something_is_touched(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in ("data/raw", "data/start"):
        (tmp_path / name).mkdir(parents=True)

    def checked() -> str:
        command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})" + CHECK]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else f"{done.returncode}: {done.stderr}"

    assert (checked(), checked()) == ("True", "False")
    (tmp_path / "data/start/unknown.bin").touch()
    assert checked().startswith("2: stages.check: params.yaml: train.start")
    (tmp_path / "data/start/unknown.bin").unlink()
    assert (checked(), checked()) == ("True", "False")
    shutil.rmtree(tmp_path / "data/raw")
    assert (checked(), checked()) == ("True", "True") and (tmp_path / "data/raw").is_dir()  # the first one made it
    assert checked() == "False"
    path = tmp_path / "params.yaml"
    path.write_text(path.read_text().replace("epochs: 20", "epochs: many"))
    assert checked().startswith("2: stages.check: params.yaml: train.fit.epochs")


def test_sizes_stay_readable() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= (60 if path.parent.name == "stages" else 300), path
        assert not re.search(r"^\s*#.*\b(TODO|FIXME|XXX)\b", text, re.MULTILINE), path

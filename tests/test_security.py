"""No source unpickles, evaluates or calls a shell, no parameter reaches one, and servers listen to this machine alone."""

import ast
import contextlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_chain
import yaml

from pipeline import grid
from pipeline.errors import InputError

ROOT = Path(__file__).parent.parent
SHIPPED = [path for folder in ("pipeline", "stages", "recipes", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
HELPERS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if not path.name.startswith("test_")]

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN = {  # calls, by what stands before the parenthesis
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.save", "torch.jit.load", "torch.hub.load", "torch.export.load", "torch.package.PackageImporter"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all"),
    *("shutil.unpack_archive", "mlflow.pytorch.log_model", "mlflow.sklearn.log_model", "mlflow.pyfunc.log_model"),
}
ASKED_FOR = {("benchmarks/training_record.py", "torch.save")}  # what the record holder's loader reads
METHODS = {"extractall", "read_pickle", "to_pickle"}  # of whatever object
# What decides: the keyword that a call must have, and its value.
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "np.save": ("allow_pickle", False)}
IMPORTERS = {"pipeline/methods.py", "pipeline/compress/torch_pruning.py"}  # by names that they have checked
IMPORTERS |= {"tests/small_chain.py", "tests/fault_injection/warm.py"}


def mistakes(source: str, name: str) -> list[str]:
    """What a file does that none may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            found += sorted({name.split(".")[0] for name in names} & UNPICKLERS)
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if (called in FORBIDDEN and (name, called) not in ASKED_FOR) or (
            isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
        ):
            found.append(called)
        if called in NEEDED:
            key, wanted = NEEDED[called]
            given = keywords.get(key)
            helper = name.startswith("tests/") and called != "torch.load" and given is None  # numpy's default
            if not helper and not (isinstance(given, ast.Constant) and given.value is wanted):
                found.append(f"{called} without {key}={wanted}")
        if called == "yaml.load" and ast.unparse(node.args[1]) != "_Loader":
            found.append("yaml.load")
        if "shell" in keywords or (
            called.startswith("subprocess.") and isinstance(next(iter(node.args), None), ast.Constant | ast.JoinedStr)
        ):
            found.append(f"{called} through a shell")
        if called.endswith("import_module") and not isinstance(node.args[0], ast.Constant) and name not in IMPORTERS:
            found.append("import of a name that was not checked")
    return found


@pytest.mark.parametrize("path", [*SHIPPED, *HELPERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_evaluates_or_calls_a_shell(path: Path) -> None:
    assert mistakes(path.read_text(), str(path.relative_to(ROOT))) == []


def test_the_search_finds_what_it_looks_for() -> None:
    bad = [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "os.system('ls')",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
    ]
    bad += ["np.load(p)", "np.load(p, allow_pickle=True)", "np.save(p, a)", "yaml.load(f, yaml.Loader)", "tar.extractall(p)"]
    bad += [
        "subprocess.run(words, shell=True)",
        "subprocess.run('ls')",
        "subprocess.run(f'ls {x}')",
        "importlib.import_module(name)",
    ]
    bad += ["torch.save(m, p)", "__import__(name)", "frame.to_pickle(p)", "import torch, dill"]
    assert [len(mistakes(source, "pipeline/x.py")) for source in bad] == [1] * len(bad)
    good = ["torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "subprocess.run(['ls', x])", "model.eval()"]
    assert not any(mistakes(source, "pipeline/x.py") for source in good)


def test_yaml_is_read_by_a_loader_that_makes_plain_values_alone() -> None:
    from pipeline.config import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


def test_servers_that_are_started_from_here_listen_to_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source names the address that stands for all, and each command that starts a server of MLflow's has one of its own."""
    from pipeline.asking import address

    assert [path for path in [*SHIPPED, *HELPERS, ROOT / "Makefile"] if "0.0.0.0" in path.read_text()] == []
    started = []
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text())):
            words = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.List | ast.Tuple) else []
            texts = [ast.unparse(word).strip("'") for word in words]
            if "mlflow" in texts and {"server", "serve", "ui"} & set(texts):
                started.append(texts[texts.index("--host") + 1])
    assert sorted(started) == ["127.0.0.1", "host"]
    for port in ("", "7000"):
        monkeypatch.setenv("WINNOW_PORT", port)
        assert address().startswith("http://127.0.0.1:")
    for port in ("80@evil.example", "0", "5001 --host 0.0.0.0", "-1", "70000"):
        monkeypatch.setenv("WINNOW_PORT", port)
        with pytest.raises(InputError):
            address()


HOSTILE = [
    "a; touch ran",
    "$(touch ran)",
    "`touch ran`",
    "a\ntouch ran\n",
    "a' ; touch ran; '",
    "../../escaped",
    "a.b",
    "/etc",
    "-rf",
    "a b",
    "",
]
# Where a name can stand: how it gets there, and what the message says of it.
PLACES: dict[str, tuple[Callable[[dict[str, Any], str], Any], str]] = {
    "revive block": (lambda p, name: p["revive"].update({name: p["revive"]["finetune"]}), r"revive\..*: a block's name is letters"),
    "compress block": (
        lambda p, name: p["compress"].update({name: p["compress"]["none"]}),
        r"compress\..*: a block's name is letters",
    ),
    "revive variant": (lambda p, name: p["variants"].update(revive=[name]), r"variants\.revive names"),
    "compress variant": (lambda p, name: p["variants"].update(compress=[name]), r"variants\.compress names"),
    "seed": (lambda p, name: p.update(seed=[name]), r"seed = .* must be a list of whole numbers"),
    "control": (lambda p, name: p["profile"].update(control=name), r"profile\.control = .* is not in the grid"),
    "network": (lambda p, name: p["model"].update(name=name), r"model\.name = .*: must be one of"),
    "expansion": (
        lambda p, name: p["train"]["overparameterize"].update(method=name),
        r"train\.overparameterize\.method = .*: must be one of",
    ),
    "method inside": (lambda p, name: p["train"]["revive"].update(method=name), r"train\.revive\.method = .*: must be one of"),
    "method": (lambda p, name: p["compress"]["none"].update(method=name), r"compress\.none\.method = .*: must be one of"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_means_something_to_a_shell_or_a_path_is_refused(place: str, tmp_path: Path) -> None:
    put, says = PLACES[place]
    (tmp_path / "data/start").mkdir(parents=True)
    with contextlib.chdir(tmp_path):
        for name in HOSTILE:
            params = small_chain.parameters()
            put(params, name)
            small_chain.write_parameters(tmp_path, params)
            with pytest.raises(InputError) as error:
                grid.check()
            assert re.search(f"params\\.yaml: {says}", str(error.value), re.DOTALL), name


def test_no_parameter_is_part_of_a_command_but_quoted() -> None:
    """DVC puts a parameter into a command as it is, and quotes it where a whole mapping such as ${item} stands there. An output
    is named by each part of it, which cannot be done with lists and mappings: so each is one word."""
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        if "${" in stage["cmd"]:
            assert stage["cmd"] == f"python -m stages.{name} ${{item}}", name
            assert all(f"${{item.{key}}}" in str(stage["outs"]) for key in stage["matrix"])


def test_a_stage_takes_no_word_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    params = small_chain.parameters()
    small_chain.write_parameters(tmp_path, params)
    for name in HOSTILE:
        for words in (("revive", name, "0"), ("compress", "finetune", name, "0"), ("revive", "--revive", name, "--seed", "0")):
            assert small_chain.call(*words) == 2
            assert "is not made of letters, digits" in capfd.readouterr().err
        assert small_chain.call("revive", "finetune", name) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
    small_chain.call("code")
    before = sorted(path.name for path in (tmp_path / "outputs/code").iterdir())
    params["revive"] |= {name: {"method": "finetune"} for name in HOSTILE}
    params["compress"] |= {f"hostile-{number}": {"method": name} for number, name in enumerate(HOSTILE)}
    small_chain.write_parameters(tmp_path, params)
    assert small_chain.call("code") == 0
    assert sorted(path.name for path in (tmp_path / "outputs/code").iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"params.yaml", "outputs"}


DVC = """
stages:
  revive:
    matrix: {revive: "${variants.revive}", seed: "${seed}"}
    cmd: printf '%s|' ${item}
    outs: ["out/${item.revive}-${item.seed}"]
"""


def test_dvc_quotes_what_stands_for_a_whole_mapping(tmp_path: Path) -> None:
    """The form that the test above asks for, with DVC itself; it fails each time because nothing is written to out/."""
    (tmp_path / "dvc.yaml").write_text(DVC)
    names = [name for name in HOSTILE if "/" not in name and name]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"seed": ["0; touch ran"], "variants": {"revive": names}}))
    for words in (["init", "--no-scm", "--quiet"], ["repro", "--keep-going"]):
        done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("> printf") == len(names)
    assert all(f"--revive|{name}|--seed|0; touch ran|" in done.stdout for name in names if "\n" not in name)
    assert not list(tmp_path.glob("*ran*"))

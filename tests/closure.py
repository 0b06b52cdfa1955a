"""The files of this project that a stage can reach by its imports: what its `deps` in dvc.yaml must list.

A module of a family (models, overparameterize, revive, compress) is imported by name: a call such as
`methods.load("compress", name)` reaches the file that the parameters select, and whatever any file of that family imports.
"""

import ast
from pathlib import Path

FAMILIES = ("models", "overparameterize", "revive", "compress")
ROOT = Path(__file__).parent.parent


def reach(stage: str) -> tuple[set[str], set[str]]:
    """Project files that stages/`stage`.py reaches, and the families of which it imports a member by name."""
    files: set[str] = set()
    families: set[str] = set()
    waiting = [f"stages/{stage}.py"]
    while waiting:
        path = waiting.pop()
        if path in files:
            continue
        files.add(path)
        imported, named = _imports(path)
        waiting += imported
        for family in named - families:
            families.add(family)
            for member in sorted((ROOT / "pipeline" / family).glob("*.py")):
                inside, _ = _imports(str(member.relative_to(ROOT)))
                waiting += [f"pipeline/{family}/__init__.py", *inside]
    members = {f for f in files if Path(f).parent.name in FAMILIES and Path(f).name != "__init__.py"}
    return files - members, families


def _imports(path: str) -> tuple[list[str], set[str]]:
    tree = ast.parse((ROOT / path).read_text())
    found: list[str] = []
    families: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found += _files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += _files(node.module)
            for alias in node.names:
                found += _files(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "options"):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "methods":
                first = node.args[0]
                families |= {first.value} if isinstance(first, ast.Constant) else {"revive", "compress"}
    return found, families


def _files(module: str) -> list[str]:
    """The files that importing the dotted `module` runs: packages on the way, and itself."""
    parts = module.split(".")
    if parts[0] not in ("pipeline", "stages"):
        return []
    found = []
    for depth in range(1, len(parts) + 1):
        path = Path(*parts[:depth])
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if (ROOT / candidate).is_file():
                found.append(str(candidate))
    return found

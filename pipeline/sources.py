"""The source files that a stage can reach by its imports: what else is edited cannot change what it does.

A member of a family (models, overparameterize, revive, compress) is imported by name: a call such as `methods.load("models", name)`
reaches the file that the parameters select, and whatever any file of that family imports.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAMILIES = ("models", "overparameterize", "revive", "compress")
CALLS = ("load", "options", "inside")  # of `methods`: their first argument is a family, or a variable that is revive or compress


def reach(script: str) -> tuple[set[str], set[str]]:
    """Files of this project that a file reaches, and the families of which it imports a member by name: those are not among the
    files. Paths are relative to the project's root."""
    files: set[str] = set()
    families: set[str] = set()
    waiting = [script]
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
    members = {path for path in files if Path(path).parent.name in FAMILIES and Path(path).name != "__init__.py"}
    return files - members, families


@cache
def _imports(path: str) -> tuple[list[str], set[str]]:
    found: list[str] = []
    families: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_bytes(), path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found += _files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found += _files(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "methods":
                family = node.args[0]
                families |= {str(family.value)} if isinstance(family, ast.Constant) else {"revive", "compress"}
    return found, families


@cache
def _files(module: str) -> list[str]:
    """The files that importing the dotted `module` runs: packages on the way, and itself; the last part may be a name in it."""
    parts = module.split(".")
    if parts[0] not in ("pipeline", "stages"):
        return []
    ways = [Path(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return [str(path) for way in ways for path in (way / "__init__.py", way.with_suffix(".py")) if (ROOT / path).is_file()]

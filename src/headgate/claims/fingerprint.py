"""Fingerprints: do a cell's or an evidence file's measurements still belong to this code and these settings?

The fingerprint of a method covers its room: the syntax trees of its Python files without docstrings and comments, and
what its card says of arms, metrics, criteria and scales. Prose may change; anything that could move a number or a verdict
makes evidence stale. The shared fingerprint covers the modules of the floors below that the room imports, followed
through their own imports: cells of an unfinished run are reused only where it fits as well.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import headgate
from headgate.catalog import Method

__all__ = ["method_fingerprint", "quick_fingerprint", "shared_fingerprint"]

_ROOT = Path(headgate.__file__).parent
_PROSE = {"statement", "summary", "source", "label", "history", "findings", "needs"}
_NO_EXPERIMENT = {"bench.py", "contract.py", "official.py"}


def quick_fingerprint(method: Method) -> str:
    """SHA-256 over the raw bytes of the room: equal bytes need no closer look."""
    digest = hashlib.sha256()
    for path in [*_sources(method.folder), method.folder / "card.toml"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def method_fingerprint(method: Method) -> str:
    """Fingerprint of the room's code and of its claim's settings."""
    digest = hashlib.sha256()
    for path in _sources(method.folder):
        digest.update(f"{path.name}\n{_tree(path)}\n".encode())
    digest.update(json.dumps(_without_prose(method.card["claim"]), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def shared_fingerprint(method: Method) -> str:
    """Fingerprint of the shared modules that the room's files import, directly or through others."""
    seen: set[Path] = set()
    room = set(_sources(method.folder))
    queue = list(room)
    while queue:
        path = queue.pop()
        for imported in _imports(path):
            if imported not in seen and imported not in room:
                seen.add(imported)
                queue.append(imported)
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(f"{path.relative_to(_ROOT)}\n{_tree(path)}\n".encode())
    return digest.hexdigest()[:16]


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if path.name not in _NO_EXPERIMENT)


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


@functools.cache
def _tree(path: Path) -> str:
    """The syntax tree as text, docstrings left out."""
    tree = _parsed(path)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.add(id(first.value))

    class Strip(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant("") if id(node) in docstrings else node

    return ast.dump(Strip().visit(tree))


@functools.cache
def _imports(path: Path) -> tuple[Path, ...]:
    """Files of Headgate that ``path`` imports, packages on the way down included."""
    names: set[str] = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    files: set[Path] = set()
    for name in names:
        head, *parts = name.split(".")
        if head != "headgate":
            continue
        folder = _ROOT
        for part in parts:
            if (folder / f"{part}.py").exists():
                files.add(folder / f"{part}.py")
                break
            folder = folder / part
            if not (folder / "__init__.py").exists():
                break
            files.add(folder / "__init__.py")
    return tuple(sorted(files))


def _without_prose(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_prose(entry) for key, entry in value.items() if key not in _PROSE}
    if isinstance(value, list):
        return [_without_prose(entry) for entry in value]
    return value

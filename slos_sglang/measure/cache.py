"""Results of runs kept as JSON files, so that a search or a report asks for each run once.

What must stay true: the key of a run holds everything its result depends on: what it was told, and the text of every
module of ours that it imports. Decision times are the exception; a cached run keeps those of its first time.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slos_sglang.measure.result import RunResult

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class RunCache:
    """Runs kept in `folder`, one file each."""

    folder: Path

    def get(self, key: Mapping[str, Any], run: Callable[[], RunResult]) -> RunResult:
        """The result under `key` (JSON values), from its file, else from `run`."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        file = self.folder / f"{name}.json"
        if file.exists():
            return RunResult.model_validate_json(file.read_text(encoding="utf-8"))
        result = run()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, also where another process writes the same.
        partial = file.with_suffix(f".{os.getpid()}.part")
        partial.write_text(result.model_dump_json(), encoding="utf-8")
        partial.replace(file)
        return result


@cache
def source_digest(*modules: str) -> str:
    """A digest of the text of `modules` and of every module of ours that they import, directly or not.

    What is imported for type checking only does not count.
    """
    texts: dict[str, str] = {}
    left = list(modules)
    while left:
        name = left.pop()
        file = _file(name)
        if name in texts or file is None:
            continue
        texts[name] = file.read_text(encoding="utf-8")
        left += _imports(texts[name])
    return hashlib.sha256("".join(f"{name}\n{texts[name]}" for name in sorted(texts)).encode()).hexdigest()


def _imports(text: str) -> list[str]:
    names: list[str] = []
    left: list[ast.AST] = [ast.parse(text)]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            left += ast.iter_child_nodes(node)
    return names


def _file(module: str) -> Path | None:
    """The file of a module of ours; None for anything else."""
    package, *rest = module.split(".")
    if package != _PACKAGE.name:
        return None
    path = _PACKAGE.joinpath(*rest)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

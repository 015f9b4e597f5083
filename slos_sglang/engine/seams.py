"""The places where SGLang is changed, and the check that they are still the ones this code was written for.

A `Seam` names one SGLang definition that is replaced or wrapped, and every SGLang definition it relies on, each
with the fingerprint of the source it was written against. An unchanged name and signature say nothing about a body,
so the *source* is compared, read from the files without importing SGLang (an import takes 20 s, this a fraction
of one). What must stay true: no seam is bound before all seams of its process have been checked, and a seam that
can't be bound stops the process (`SeamError`), so that nobody runs half patched.

`python -m slos_sglang.engine.seams --write` renews the fingerprints in `patches/` after a review of what changed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import logging
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Kind = Literal["replace", "around"]
Process = Literal["http", "scheduler", "client"]
State = Literal["ok", "changed", "missing"]


class SeamError(SystemExit):
    """A seam does not fit. Not an `Exception`: SGLang's plugin loader logs those and goes on without the plugin."""


@dataclass(frozen=True, kw_only=True)
class Seam:
    """One change to SGLang.

    target        the definition that is changed, `package.module:Qualified.name`
    kind          "replace" puts `hook` in its place; "around" calls `hook(original, *args, **kwargs)` instead
    process       where it applies: the HTTP process, each scheduler process, or a program's own ("client")
    hook          ours, in the same notation; imported only when it is bound
    why           what it is for
    can_go_when   what SGLang would have to offer for it to disappear
    fingerprints  every SGLang definition it was written against (an "around" target included): module -> name ->
                  fingerprint
    """

    name: str
    target: str
    kind: Kind
    process: Process
    hook: str
    why: str
    can_go_when: str
    fingerprints: Mapping[str, Mapping[str, str]]

    def expected(self) -> dict[str, str | None]:
        """Definition -> expected fingerprint, the target first; None: it only has to exist."""
        relied_on = {
            f"{module}:{name}": mark for module, names in self.fingerprints.items() for name, mark in names.items()
        }
        return {self.target: relied_on.get(self.target), **relied_on}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one definition: `state` is "changed" where its source is another one than was expected."""

    seam: Seam
    definition: str
    state: State
    expected: str | None
    found: str | None

    def line(self) -> str:
        """One line for people."""
        what = "does not exist" if self.state == "missing" else f"has changed ({self.expected} -> {self.found})"
        return f"seam {self.seam.name!r}: {self.definition} {what}"


@dataclass(frozen=True)
class SourceTree:
    """The definitions of an installed package, read from its files."""

    root: Path

    @classmethod
    def of(cls, package: str) -> SourceTree:
        """The tree of an installed top-level package, without importing it. Raises `SeamError` where there is none."""
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SeamError(f"slos-sglang: {package} is not installed")
        return cls(Path(next(iter(spec.submodule_search_locations))))

    def fingerprint(self, definition: str) -> str | None:
        """16 hex digits over the normalized source of `package.module:Qualified.name`; None where it is missing."""
        module, _, name = definition.partition(":")
        found = _definitions(self._file(module)).get(name)
        if found is None:
            return None
        return hashlib.sha256("\n".join(map(canonical, found)).encode()).hexdigest()[:16]

    def _file(self, module: str) -> Path:
        base = self.root.joinpath(*module.split(".")[1:])
        package = base / "__init__.py"
        return package if package.is_file() else base.with_suffix(".py")


def canonical(node: ast.AST) -> str:
    """The meaning of a definition as text: no comments, layout or docstrings, and the same on Python 3.11 and 3.12.

    Empty fields are left out, because newer Pythons add fields that older sources leave empty.
    """
    parts = []
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            if name == "body" and _has_docstring(node):
                value = value[1:]
            value = [canonical(item) if isinstance(item, ast.AST) else repr(item) for item in value]
        elif isinstance(value, ast.AST):
            value = canonical(value)
        elif value is not None:
            value = repr(value)
        if value:
            parts.append(f"{name}={value}")
    return f"{type(node).__name__}({','.join(parts)})"


def _has_docstring(node: ast.AST) -> bool:
    documented = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    return documented and ast.get_docstring(node, clean=False) is not None  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)
def _definitions(file: Path) -> Mapping[str, list[ast.AST]]:
    """Qualified name -> the nodes that define it (several for a property and its setter); empty without the file."""
    if not file.is_file():
        return {}
    found: dict[str, list[ast.AST]] = {}
    for name, node in _walk(ast.parse(file.read_bytes()).body, ""):
        found.setdefault(name, []).append(node)
    return found


def _walk(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _walk(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((prefix + target.id, node) for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from ((prefix + (alias.asname or alias.name), node) for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            for part in ("body", "orelse", "finalbody"):
                yield from _walk(getattr(node, part, ()), prefix)


def check(seams: Iterable[Seam], tree: SourceTree | None = None) -> list[Finding]:
    """Compare every definition of `seams` with the source that is installed; the target first, each once a seam."""
    tree = tree or SourceTree.of("sglang")
    findings = []
    for seam in seams:
        for definition, expected in seam.expected().items():
            found = tree.fingerprint(definition)
            state: State = "missing" if found is None else "ok" if expected in (None, found) else "changed"
            findings.append(Finding(seam=seam, definition=definition, state=state, expected=expected, found=found))
    return findings


def require(seams: Iterable[Seam], tree: SourceTree | None = None) -> None:
    """Raise `SeamError` with one clear line unless every definition is the expected one."""
    wrong = [finding for finding in check(seams, tree) if finding.state != "ok"]
    if wrong:
        more = f" (and {len(wrong) - 1} more; see 'slos-sglang doctor')" if len(wrong) > 1 else ""
        raise SeamError(f"slos-sglang: this SGLang is not the one it was written for: {wrong[0].line()}{more}")


def bind(seam: Seam) -> None:
    """Put the hook in the place of the target, in this process. Raises `SeamError` where that does not hold.

    Set directly rather than through SGLang's `HookRegistry`: that one logs a failure and goes on, and a hook it
    applies early is the only one a target ever gets. Hooks that other plugins register still wrap ours.
    """
    module, _, qualified = seam.target.partition(":")
    path, _, name = qualified.rpartition(".")
    try:
        owner = pkgutil.resolve_name(f"{module}:{path}" if path else module)
        original = vars(owner)[name]
        hook = pkgutil.resolve_name(seam.hook)
    except (ImportError, AttributeError, KeyError) as error:
        raise SeamError(f"slos-sglang: seam {seam.name!r} can't be bound: {seam.target}: {error!r}") from error
    if original is hook or getattr(original, "__slos_seam__", None) == seam.name:
        return
    bound = hook if seam.kind == "replace" else _around(original, hook, seam.name)
    setattr(owner, name, bound)
    if vars(owner).get(name) is not bound:
        raise SeamError(f"slos-sglang: seam {seam.name!r} did not hold: {seam.target}")
    logger.info("slos-sglang: %s -> %s", seam.target, seam.hook)


def _around(original: Callable[..., Any], hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    bound.__slos_seam__ = name  # type: ignore[attr-defined]
    return bound


def apply(process: Process) -> None:
    """Check, then bind, every seam of this kind of process. Raises `SeamError`."""
    from slos_sglang.patches import SEAMS

    ours = [seam for seam in SEAMS if seam.process == process]
    require(ours)
    for seam in ours:
        bind(seam)


_MODULE = re.compile(r'"(sglang[\w.]*)": \{([^{}]*)\}')
_MARK = re.compile(r'"([\w.]+)": "([0-9a-f]*)"')


def renew(folder: Path, tree: SourceTree) -> list[str]:
    """Write the fingerprints of the installed SGLang into the files of `patches/`; the definitions that changed.

    Raises `SeamError` for a definition that does not exist.
    """
    changed = []

    def module(match: re.Match[str]) -> str:
        def mark(inner: re.Match[str]) -> str:
            definition, old = f"{match[1]}:{inner[1]}", inner[2]
            new = tree.fingerprint(definition)
            if new is None:
                raise SeamError(f"slos-sglang: {definition} does not exist in {tree.root}")
            if new != old:
                changed.append(definition)
            return f'"{inner[1]}": "{new}"'

        return f'"{match[1]}": {{{_MARK.sub(mark, match[2])}}}'

    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        file.write_text(_MODULE.sub(module, text), encoding="utf-8")
    return changed


def main() -> None:
    """`--write` renews the fingerprints; without it every seam is checked."""
    import slos_sglang.patches as patches

    if sys.argv[1:] == ["--write"]:
        for definition in renew(Path(patches.__file__).parent, SourceTree.of("sglang")):
            print(definition)
        return
    require(patches.SEAMS)


if __name__ == "__main__":
    main()

"""The patch framework on a small made-up package: what counts as a change, and that nothing fails open."""

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from slos_sglang.engine import seams
from slos_sglang.engine.seams import Seam, SeamError, SourceTree, bind, check, require

SOURCE = '''
"""A module."""
import os
from os.path import join as joined

LIMIT = 3

class Thing:
    """A thing."""

    def run(self, x: int = 1) -> int:
        """Adds."""
        # a comment
        return x + LIMIT

    @property
    def size(self):
        return 1

    @size.setter
    def size(self, value):
        raise AttributeError

try:
    import json
except ImportError:
    json = None
else:
    def loads(text):
        return json.loads(text)

async def serve(thing):
    return thing.run()
'''


def tree_of(folder: Path, source: str = SOURCE) -> SourceTree:
    package = folder / "madeup"
    (package / "inner").mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "inner" / "__init__.py").write_text("def here(): return 1\n", encoding="utf-8")
    (package / "mod.py").write_text(textwrap.dedent(source), encoding="utf-8")
    seams._definitions.cache_clear()
    return SourceTree(package)


def seam_on(tree: SourceTree, *definitions: str, **changes: Any) -> Seam:
    marks = {name: tree.fingerprint(f"madeup.mod:{name}") or "" for name in definitions}
    values = {
        "name": "run",
        "target": "madeup.mod:Thing.run",
        "kind": "around",
        "process": "http",
        "hook": "madeup_hooks:run",
        "why": "",
        "can_go_when": "",
        "fingerprints": {"madeup.mod": marks},
    }
    return Seam(**(values | changes))


@pytest.mark.parametrize("name", ["Thing", "Thing.run", "Thing.size", "LIMIT", "loads", "serve", "joined"])
def test_every_kind_of_definition_is_found(tmp_path: Path, name: str) -> None:
    assert tree_of(tmp_path).fingerprint(f"madeup.mod:{name}") is not None


def test_packages_are_found_and_missing_things_are_not(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    assert tree.fingerprint("madeup.inner:here") is not None
    for definition in ("madeup.mod:Thing.walk", "madeup.mod:Nothing", "madeup.none:x"):
        assert tree.fingerprint(definition) is None


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# a comment", "# another comment", True),
        ('"""Adds."""', '"""Adds one."""', True),
        ("return x + LIMIT", "return (x +\n            LIMIT)", True),
        ("return x + LIMIT", "return LIMIT + x", False),
        ("x: int = 1", "x: int = 2", False),
        ("def run", "async def run", False),
        ("def run", "@staticmethod\n    def run", False),
        ('"""Adds."""', "print(x)", False),
        ("return 1\n", "return 2\n", True),  # another method
    ],
)
def test_what_counts_as_a_change(tmp_path: Path, old: str, new: str, same: bool) -> None:
    assert old in SOURCE
    before = tree_of(tmp_path).fingerprint("madeup.mod:Thing.run")
    after = tree_of(tmp_path, SOURCE.replace(old, new)).fingerprint("madeup.mod:Thing.run")
    assert after is not None
    assert (after == before) is same


@pytest.mark.parametrize(("old", "new"), [("raise AttributeError", "pass"), ("return 1\n", "return 2\n")])
def test_a_property_is_its_getter_and_its_setter(tmp_path: Path, old: str, new: str) -> None:
    before = tree_of(tmp_path).fingerprint("madeup.mod:Thing.size")
    after = tree_of(tmp_path, SOURCE.replace(old, new))
    assert after.fingerprint("madeup.mod:Thing.size") != before


def test_check_tells_ok_changed_and_missing(tmp_path: Path) -> None:
    seam = seam_on(tree_of(tmp_path), "Thing.run", "serve", "LIMIT")
    assert {finding.state for finding in check([seam], tree_of(tmp_path))} == {"ok"}
    broken = tree_of(tmp_path, SOURCE.replace("LIMIT = 3", "LIMIT = 4").replace("async def serve", "def serves"))
    states = {finding.definition: finding.state for finding in check([seam], broken)}
    assert states == {"madeup.mod:Thing.run": "ok", "madeup.mod:serve": "missing", "madeup.mod:LIMIT": "changed"}
    with pytest.raises(SeamError, match=r"'run': madeup.mod:serve does not exist .*1 more") as error:
        require([seam], broken)
    assert "\n" not in str(error.value)


def test_a_target_without_a_fingerprint_must_still_exist(tmp_path: Path) -> None:
    seam = seam_on(tree_of(tmp_path), "serve", target="madeup.mod:Thing.walk", kind="replace")
    assert [finding.state for finding in check([seam], tree_of(tmp_path))] == ["missing", "ok"]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceTree:
    tree = tree_of(tmp_path)
    (tmp_path / "madeup_hooks.py").write_text(
        "def run(original, self, x=1): return 10 * original(self, x)\nclass Other: pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tree
    for name in ("madeup", "madeup.mod", "madeup.inner", "madeup_hooks"):
        sys.modules.pop(name, None)


def test_bind_wraps_once_and_keeps_the_name(imported: SourceTree) -> None:
    seam = seam_on(imported, "Thing.run")
    bind(seam)
    bind(seam)
    from madeup.mod import Thing

    assert Thing().run(2) == 50
    assert Thing.run.__name__ == "run"


def test_bind_replaces_a_class(imported: SourceTree) -> None:
    bind(seam_on(imported, kind="replace", target="madeup.mod:Thing", hook="madeup_hooks:Other"))
    import madeup.mod
    import madeup_hooks

    assert madeup.mod.Thing is madeup_hooks.Other


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "madeup.mod:Thing.walk"},
        {"target": "madeup.mod:Nothing.run"},
        {"target": "madeup.none:run"},
        {"hook": "madeup_hooks:walk"},
        {"hook": "madeup_nowhere:run"},
    ],
)
def test_bind_fails_closed(imported: SourceTree, wrong: dict[str, str]) -> None:
    with pytest.raises(SeamError, match="can't be bound"):
        bind(seam_on(imported, "Thing.run", **wrong))


def test_a_seam_error_is_no_exception() -> None:
    """SGLang's plugin loader catches `Exception`, logs it and starts without the plugin."""
    assert not issubclass(SeamError, Exception)


def test_a_package_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(SeamError, match="not installed"):
        SourceTree.of("no_such_package_here")


def test_renew_writes_what_is_installed(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    patches = tmp_path / "patches"
    patches.mkdir()
    text = 'fingerprints={\n    "sglang.mod": {\n        "Thing.run": "",\n        "LIMIT": "00",\n    },\n}\n'
    (patches / "one.py").write_text(text, encoding="utf-8")
    assert seams.renew(patches, tree) == ["sglang.mod:Thing.run", "sglang.mod:LIMIT"]
    assert seams.renew(patches, tree) == []
    written = (patches / "one.py").read_text(encoding="utf-8")
    assert f'"Thing.run": "{tree.fingerprint("madeup.mod:Thing.run")}"' in written
    (patches / "one.py").write_text(text.replace("LIMIT", "GONE"), encoding="utf-8")
    with pytest.raises(SeamError, match="GONE does not exist"):
        seams.renew(patches, tree)

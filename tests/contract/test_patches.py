"""The seams and the SGLang that is installed: known, complete, absent when switched off, closed when broken."""

import ast
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slos_sglang import patches
from slos_sglang.engine import plugin, seams
from slos_sglang.engine.seams import SeamError, SourceTree, check, require

PATCHES = Path(patches.__file__).parent
SCHEDULER = Path("srt/managers/scheduler.py")


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLOS_", "SGLANG_"))}
    return subprocess.run(
        [sys.executable, *command], env=clean | env, capture_output=True, text=True, timeout=600, check=False
    )


def cli(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run("-c", "from slos_sglang.cli.main import main; main()", *arguments, **env)


def test_the_installed_sglang_is_the_one_the_seams_were_written_for() -> None:
    require(patches.SEAMS)


@pytest.mark.parametrize("seam", patches.SEAMS, ids=lambda seam: seam.name)
def test_a_seam_is_declared_in_full(seam: seams.Seam) -> None:
    assert seam.why
    assert seam.can_go_when
    assert seam.fingerprints
    assert all(len(mark or "0" * 16) == 16 for mark in seam.expected().values())
    if seam.kind == "around":
        assert seam.expected()[seam.target], "what is wrapped has a known body"
    assert SourceTree.of("slos_sglang").fingerprint(seam.hook) is not None, f"{seam.hook} does not exist"


def test_each_seam_has_a_file_of_its_own() -> None:
    files = [file for file in PATCHES.glob("*.py") if file.name != "__init__.py"]
    assert len(files) == len({seam.name for seam in patches.SEAMS}) == len(patches.SEAMS)


ENGINE = Path(seams.__file__).parent
KNOWN = {definition for seam in patches.SEAMS for definition in seam.expected()}


def test_all_that_the_scheduler_overrides_is_known() -> None:
    """A method of SGLang's that ours takes the place of, or calls, has a fingerprint."""
    stock = SourceTree.of("sglang")
    tree = ast.parse((ENGINE / "scheduler.py").read_text(encoding="utf-8"))
    ours = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SLOScheduler")
    methods = {node.name for node in ours.body if isinstance(node, ast.FunctionDef)}
    overridden = {f"sglang.srt.managers.scheduler:Scheduler.{name}" for name in methods}
    assert {each for each in overridden if stock.fingerprint(each)} - KNOWN == set()


def test_all_that_the_engine_imports_is_known() -> None:
    """Each name of SGLang's in `engine/` has a fingerprint, or those of its parts that are used."""
    imported = {
        f"{node.module}:{alias.name}"
        for file in ENGINE.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.")
        for alias in node.names
    }
    assert imported
    assert {name for name in imported if not any(f"{each}.".startswith(f"{name}.") for each in KNOWN)} == set()


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> SourceTree:
    """The files of SGLang that any seam looks at."""
    original = SourceTree.of("sglang")
    copy = tmp_path_factory.mktemp("tampered") / "sglang"
    copy.mkdir()
    (copy / "__init__.py").write_text("raise RuntimeError('nobody is to import this')\n", encoding="utf-8")
    for seam in patches.SEAMS:
        for definition in seam.expected():
            source = original._file(definition.partition(":")[0])
            target = copy / source.relative_to(original.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return SourceTree(copy)


@pytest.fixture
def tamper(copied: SourceTree):
    """Changes the scheduler's source for one test."""
    file = copied.root / SCHEDULER
    before = file.read_text(encoding="utf-8")

    def change(old: str, new: str) -> SourceTree:
        assert old in before
        file.write_text(before.replace(old, new), encoding="utf-8")
        seams._definitions.cache_clear()
        return copied

    yield change
    file.write_text(before, encoding="utf-8")
    seams._definitions.cache_clear()


def states(tree: SourceTree) -> dict[str, str]:
    return {finding.definition: finding.state for finding in check(patches.SEAMS, tree) if finding.state != "ok"}


def test_an_exact_copy_is_fine(copied: SourceTree) -> None:
    assert states(copied) == {}


def test_a_changed_body_is_found(tamper) -> None:
    tree = tamper("    def on_idle(self):\n", "    def on_idle(self):\n        self.ticks = 1\n")
    assert states(tree) == {"sglang.srt.managers.scheduler:Scheduler.on_idle": "changed"}
    with pytest.raises(SeamError, match=r"seam 'scheduler': .*Scheduler\.on_idle has changed"):
        require(patches.SEAMS, tree)


def test_a_removed_definition_is_found(tamper) -> None:
    tree = tamper("def update_running_batch(", "def update_running(")
    assert states(tree) == {"sglang.srt.managers.scheduler:Scheduler.update_running_batch": "missing"}


def test_a_removed_target_is_found(tamper) -> None:
    assert "sglang.srt.managers.scheduler:Scheduler" in states(tamper("class Scheduler(", "class Schedulers("))


def test_serve_and_doctor_refuse_a_changed_sglang_without_importing_it(tamper) -> None:
    tree = tamper("def update_running_batch(", "def update_running(")
    served = cli("serve", "--model-path", "none", PYTHONPATH=str(tree.root.parent))
    assert served.returncode == 1
    assert served.stdout == ""
    assert served.stderr.count("\n") == 1
    assert "update_running_batch does not exist" in served.stderr
    examined = cli("doctor", PYTHONPATH=str(tree.root.parent))
    assert examined.returncode == 1
    assert "missing  scheduler" in examined.stdout


@pytest.mark.parametrize("value", ["", "0"])
def test_switched_off_load_does_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SLOS_SGLANG", value)
    monkeypatch.setattr(seams, "apply", lambda process: pytest.fail("applied"))
    plugin.load()


@pytest.mark.parametrize("error", [RuntimeError("broken"), ImportError("broken"), SeamError("broken")])
def test_whatever_goes_wrong_in_load_is_no_exception(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(process: str) -> None:
        raise error

    monkeypatch.setenv("SLOS_SGLANG", "1")
    monkeypatch.setattr(seams, "apply", fail)
    with pytest.raises(SystemExit, match="broken"):
        plugin.load()


@pytest.mark.parametrize(
    ("child", "imported", "kinds"),
    [
        (False, [], ["http"]),
        (False, ["entrypoints.engine", "managers.scheduler"], ["http"]),
        (True, ["managers.scheduler"], ["scheduler"]),
        (True, ["managers.detokenizer_manager"], []),
        (True, ["entrypoints.engine", "managers.scheduler"], ["http", "scheduler"]),
    ],
    ids=["sglang serve", "offline engine", "scheduler", "detokenizer", "server in a child, script with an engine"],
)
def test_a_process_is_known_by_its_parent_and_its_imports(
    monkeypatch: pytest.MonkeyPatch, child: bool, imported: list[str], kinds: list[str]
) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object() if child else None)
    modules = {name: module for name, module in sys.modules.items() if not name.startswith("sglang.srt")}
    monkeypatch.setattr(sys, "modules", modules | {f"sglang.srt.{name}": sys for name in imported})
    assert plugin.process_kinds() == kinds


OFF = """
    import sys
    import sglang.srt.managers.scheduler as scheduler
    import sglang.srt.managers.tokenizer_manager as manager
    from sglang.srt.plugins import load_plugins
    stock = scheduler.Scheduler
    before = {name: dict(vars(owner)) for name, owner in
              (("s", stock), ("t", manager.TokenizerManager), ("module", scheduler))}
    load_plugins()
    assert scheduler.Scheduler is stock and stock.__module__ == "sglang.srt.managers.scheduler"
    assert before == {"s": vars(stock), "t": vars(manager.TokenizerManager), "module": vars(scheduler)}
    assert not {"slos_sglang.engine.hooks", "slos_sglang.engine.seams", "slos_sglang.patches"} & set(sys.modules)
"""

ON = """
    import dataclasses, sys
    import sglang.srt.managers.scheduler as scheduler
    from sglang.srt import plugins
    from slos_sglang import patches
    from slos_sglang.engine import seams

    # A seam that does not fit: SGLang's loader lets it through, nothing is bound.
    good = patches.SEAMS
    first, *rest = [seam for seam in good if seam.process == "http"]
    patches.SEAMS = (dataclasses.replace(first, fingerprints={first.target.partition(":")[0]: {"Nothing": "0"}}), *rest)
    try:
        plugins.load_plugins()
    except SystemExit as refused:
        assert "does not exist" in str(refused), refused
    else:
        raise AssertionError("it failed open")
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    assert not any(hasattr(each, "__slos_seam__") for each in vars(TokenizerManager).values())

    # The HTTP process: all of its seams and no other.
    patches.SEAMS = good
    plugins._plugins_loaded = False
    plugins.load_plugins()
    import pkgutil
    for seam in good:
        bound = getattr(pkgutil.resolve_name(seam.target), "__slos_seam__", None)
        assert bound == (seam.name if seam.process == "http" else None), (seam.name, bound)
    assert scheduler.Scheduler.__module__ == "sglang.srt.managers.scheduler"

    # A scheduler process.
    seams.apply("scheduler")
    from slos_sglang.engine.scheduler import SLOScheduler
    assert scheduler.Scheduler is SLOScheduler
    assert "Scheduler" in scheduler.run_scheduler_process.__code__.co_names, "it looks the class up when it runs"

    # A decline survives SGLang's messages between processes.
    from http import HTTPStatus
    from sglang.srt.managers.io_struct import AbortReq, msgpack_decode, msgpack_encode
    from slos_sglang.engine.wire import abort_reason, declined
    reason = abort_reason(HTTPStatus.TOO_MANY_REQUESTS, "declined", retry_after_s=1.25)
    received = msgpack_decode(msgpack_encode(AbortReq(rid="r", finished_reason=reason)))
    assert declined(received.finished_reason).retry_after_s == 1.25

    # Receipts: one a finished request, as SGLang aligns them.
    from types import SimpleNamespace
    from slos_sglang.engine.receipt_stream import SLOOutputStreamer
    streamer = SLOOutputStreamer.reading(lambda req: req.receipt)
    done, going = (SimpleNamespace(finished=lambda over=over: over, receipt={"n": 1}) for over in (True, False))
    build = streamer.build_additional_customized_info
    fake = object.__new__(streamer)
    assert build(fake, [done, going]) == {"slo": [{"n": 1}, None]}
    assert build(fake, [going]) == {}
    assert streamer.has_additional_customized_info
"""


def test_switched_off_sglang_stays_as_it_is() -> None:
    done = run("-c", textwrap.dedent(OFF))
    assert done.returncode == 0, done.stderr[-2000:]


def test_switched_on_every_seam_holds_in_its_process_or_none_does() -> None:
    done = run("-c", textwrap.dedent(ON), SLOS_SGLANG="1")
    assert done.returncode == 0, done.stderr[-2000:]

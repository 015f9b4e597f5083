"""`slos-sglang doctor`: what is installed, what the machine can run, and which SGLang definitions are touched.

It never imports SGLang: a broken installation must still get an answer, and in a second.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slos_sglang.engine.seams import Finding

PACKAGES = ("slos-sglang", "sglang", "torch", "transformers", "flashinfer-python", "sglang-kernel", "sglang-router")
NEEDED = ("slos-sglang", "sglang", "torch", "transformers")
GIB = 1 << 30
# Weights may take this share of the memory; the rest is KV cache, activations and the system.
WEIGHTS_SHARE = 0.6


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> int:
    """Show what is installed, what this machine can run, and whether every changed SGLang definition is known."""
    report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        print("\n".join(lines(report)))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """The whole report; `ok` where the server would start: all needed packages, the plugin and every seam."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    plugin = _plugin()
    seams = _seams() if versions["sglang"] else []
    problems = [f"{name} is not installed" for name in NEEDED if versions[name] is None]
    if plugin["left_out"]:
        problems.append(f"SGLang would not load the plugin: {plugin['left_out']}")
    problems += [line for seam in seams for line in seam["problems"]]
    return {
        "versions": versions,
        "machine": _machine() if versions["torch"] else None,
        "plugin": plugin,
        "seams": seams,
        "problems": problems,
        "ok": not problems,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import torch

    from slos_sglang.platforms import accelerator

    device = accelerator()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _memory_bytes()
    name, bytes_each = platform.machine(), 4
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory, bytes_each = properties.name, properties.total_memory, 2
    own_cpu_engine = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1"
    billions = None if memory is None else round(memory * WEIGHTS_SHARE / bytes_each / 1e9, 1)
    return {
        "accelerator": device,
        "device": name,
        "cpus": cpus,
        "memory_gib": None if memory is None else round(memory / GIB, 1),
        "platform": "torch_cpu" if device is None and not own_cpu_engine else "sglang",
        "max_parameters_billion": billions,
        "mixed_batches": True,
        "overlap_schedule": device is not None,
    }


def _memory_bytes() -> int | None:
    """What this process may use: the machine's memory or, in a container, its limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _plugin() -> dict[str, Any]:
    from slos_sglang.engine.config import CONFIG_ENV
    from slos_sglang.engine.plugin import left_out, switched_on

    return {
        "entry_points": {
            group: [point.name for point in entry_points(group=group)]
            for group in ("sglang.srt.platforms", "sglang.srt.plugins")
        },
        "left_out": left_out(),
        "switched_on": switched_on(),
        "config": os.environ.get(CONFIG_ENV) or None,
    }


def _seams() -> list[dict[str, Any]]:
    from slos_sglang.engine.seams import check
    from slos_sglang.patches import SEAMS

    return [_seam(check([seam])) for seam in SEAMS]


def _seam(findings: list[Finding]) -> dict[str, Any]:
    seam = findings[0].seam
    states = {finding.state for finding in findings}
    return {
        "name": seam.name,
        "target": seam.target,
        "kind": seam.kind,
        "process": seam.process,
        "state": next((state for state in ("missing", "changed") if state in states), "ok"),
        "definitions": len(findings),
        "problems": [finding.line() for finding in findings if finding.state != "ok"],
        "why": seam.why,
        "can_go_when": seam.can_go_when,
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    yield "Versions"
    for name, found in report["versions"].items():
        if found or name in NEEDED:
            yield f"  {name:20} {found or 'not installed'}"
    machine = report["machine"]
    if machine:
        yield "Machine"
        memory = f"{machine['memory_gib']} GiB" if machine["memory_gib"] else "memory unknown"
        yield f"  {machine['accelerator'] or 'no accelerator'}: {machine['device']}, {memory}, {machine['cpus']} CPUs"
        overlap = "overlap schedule" if machine["overlap_schedule"] else "no overlap schedule"
        yield f"  platform {machine['platform']}; mixed batches, {overlap}"
        if machine["max_parameters_billion"]:
            yield f"  models up to about {machine['max_parameters_billion']} billion parameters"
    plugin = report["plugin"]
    yield "Plugin"
    for group, names in plugin["entry_points"].items():
        yield f"  {group:20} {', '.join(names) or 'none'}"
    yield f"  SLOS_SGLANG is {'on' if plugin['switched_on'] else 'off (slos-sglang serve switches it on)'}"
    yield "Seams"
    for seam in report["seams"]:
        yield f"  {seam['state']:8} {seam['process']:10} {seam['kind']:8} {seam['name']:14} {seam['target']}"
    for problem in report["problems"]:
        yield f"problem: {problem}"
    yield "all ok" if report["ok"] else "not ok"

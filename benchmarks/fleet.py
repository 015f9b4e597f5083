"""Several servers on one small machine, one of them awake at a time.

Arms of a comparison must share the machine's mood: they are all started once and then take turns within each repeat.
Those that wait are stopped (SIGSTOP on their process groups), so they neither compute nor poll. Where it is allowed
servers and client go before everything else on the machine; what else ran is measured all the same.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import requests

from slos_sglang.engine.launch import Server, server

# A stopped server must not take its own silence for a hang.
COMMON_FLAGS = (
    *("--stream-interval", "1"),
    *("--watchdog-timeout", "100000"),
    *("--random-seed", "0"),
    *("--max-total-tokens", "65536"),  # several servers share the memory
)
_SETTLE_S = 0.3
_PREFERRED_NICE = -15


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to schedule: a name, and how its server is started."""

    name: str
    scheduler: Literal["slos", "stock"]
    flags: tuple[str, ...] = ()
    config: Path | None = None

    @property
    def sends_priority(self) -> bool:
        """Whether the calls carry their tier's priority."""
        return "--enable-priority-scheduling" in self.flags


@dataclass(frozen=True, kw_only=True)
class HostUse:
    """What the machine did during a run, in cores.

    `server` is the awake server's process group, `other` all that is neither it nor this process nor a child of this
    process that ended meanwhile, `stolen` what the hypervisor gave to somebody else.
    """

    server: float
    other: float
    stolen: float


class Fleet:
    """The started servers; `awake(name)` runs one of them alone."""

    def __init__(self, servers: dict[str, Server]) -> None:
        self._servers = servers

    @contextmanager
    def awake(self, name: str) -> Iterator[Server]:
        """The server `name`, running, with an empty cache; stopped again afterwards."""
        chosen = self._servers[name]
        os.killpg(chosen.pid, signal.SIGCONT)
        try:
            _flush(chosen.url)
            time.sleep(_SETTLE_S)
            yield chosen
        finally:
            os.killpg(chosen.pid, signal.SIGSTOP)


@contextmanager
def fleet(model: Path, arms: tuple[Arm, ...], logs: Path) -> Iterator[Fleet]:
    """Start every arm's server, one after the other, each stopped once it is ready; end them all at exit."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for arm in arms:
            started = stack.enter_context(
                server(
                    str(model),
                    *COMMON_FLAGS,
                    *arm.flags,
                    scheduler=arm.scheduler,
                    config=arm.config,
                    log=logs / f"{arm.name}.log",
                )
            )
            stack.enter_context(going_first(started.pid))
            # A stopped process takes its ending only after it was woken.
            stack.callback(os.killpg, started.pid, signal.SIGCONT)
            os.killpg(started.pid, signal.SIGSTOP)
            servers[arm.name] = started
        yield Fleet(servers)


@contextmanager
def going_first(pid: int) -> Iterator[bool]:
    """Let the process group `pid` (and its session, where Linux schedules by sessions) run before others meanwhile.

    Yields False where the system does not let us; it is an even contest then.
    """
    autogroup = Path(f"/proc/{pid}/autogroup")
    before = autogroup.read_text(encoding="ascii").split()[-1] if autogroup.exists() else None
    nice = os.getpriority(os.PRIO_PGRP, pid)
    try:
        os.setpriority(os.PRIO_PGRP, pid, _PREFERRED_NICE)
        if before is not None:
            autogroup.write_text(str(_PREFERRED_NICE), encoding="ascii")
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(FileNotFoundError, ProcessLookupError):  # it may have ended meanwhile
            os.setpriority(os.PRIO_PGRP, pid, nice)
            if before is not None:
                autogroup.write_text(before, encoding="ascii")


@contextmanager
def host_use(server: Server) -> Iterator[list[HostUse]]:
    """Measure the machine during the block; the list holds one `HostUse` afterwards."""
    seen: list[HostUse] = []
    start_s, start = time.monotonic(), _cpu_s(server)
    yield seen
    took_s = time.monotonic() - start_s
    busy, stolen, group, own = ((now - then) / took_s for now, then in zip(_cpu_s(server), start, strict=True))
    seen.append(HostUse(server=group, other=max(busy - group - own, 0.0), stolen=stolen))


def _cpu_s(server: Server) -> tuple[float, float, float, float]:
    """CPU seconds so far: all cores busy, stolen, the server's process group, this process and its ended children.

    Source: proc(5), /proc/stat and /proc/PID/stat.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    )
    group = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        if int(fields[2]) == server.pid:
            group += int(fields[11]) + int(fields[12])
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    own = os.times()
    own_s = own.user + own.system + own.children_user + own.children_system
    return (user + nice + system + irq + softirq) * tick_s, steal * tick_s, group * tick_s, own_s


def _flush(url: str) -> None:
    """Empty the radix cache; refused while anything runs, so ask until it is done."""
    until_s = time.monotonic() + 30
    while requests.post(f"{url}/flush_cache", timeout=30).status_code != 200:
        if time.monotonic() > until_s:
            raise RuntimeError(f"{url} still has requests 30 s after a run")
        time.sleep(0.2)

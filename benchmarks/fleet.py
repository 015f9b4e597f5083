"""Several servers on one small machine, one of them awake at a time.

Arms of a comparison must share the machine's mood: they are all started once and then take turns within each repeat.
Those that wait are stopped (SIGSTOP on their process groups), so they neither compute nor poll.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import requests

from slos_sglang.engine.launch import Server, server

# A stopped server must not take its own silence for a hang.
COMMON_FLAGS = ("--stream-interval", "1", "--watchdog-timeout", "100000", "--random-seed", "0")
_SETTLE_S = 0.3


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
    """What the machine did during a run, in cores: all busy time, and time stolen by the hypervisor."""

    busy_cores: float
    stolen_cores: float
    load_1m: float


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
            # A stopped process takes its ending only after it was woken.
            stack.callback(os.killpg, started.pid, signal.SIGCONT)
            os.killpg(started.pid, signal.SIGSTOP)
            servers[arm.name] = started
        yield Fleet(servers)


@contextmanager
def host_use() -> Iterator[list[HostUse]]:
    """Measure the machine during the block; the list holds one `HostUse` afterwards."""
    seen: list[HostUse] = []
    start_s, start = time.monotonic(), _cpu_ticks()
    yield seen
    ticks = (time.monotonic() - start_s) * os.sysconf("SC_CLK_TCK")
    busy, stolen = (now - then for now, then in zip(_cpu_ticks(), start, strict=True))
    seen.append(HostUse(busy_cores=busy / ticks, stolen_cores=stolen / ticks, load_1m=os.getloadavg()[0]))


def _cpu_ticks() -> tuple[int, int]:
    """Busy and stolen clock ticks of all cores so far; source: proc(5), the first line of /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    )
    return user + nice + system + irq + softirq, steal


def _flush(url: str) -> None:
    """Empty the radix cache; refused while anything runs, so ask until it is done."""
    until_s = time.monotonic() + 30
    while requests.post(f"{url}/flush_cache", timeout=30).status_code != 200:
        if time.monotonic() > until_s:
            raise RuntimeError(f"{url} still has requests 30 s after a run")
        time.sleep(0.2)

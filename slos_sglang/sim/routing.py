"""Which replica a request goes to: the seam for several replicas. Policies that look at load come in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from slos_sglang.sim.replica import Call, Replica


class Route(Protocol):
    """A routing function, asked once when a call arrives and once when its first token is there."""

    def arrival(self, call: Call, replicas: Sequence[Replica]) -> int:
        """Index of the replica that computes the prompt."""

    def prefilled(self, call: Call, replicas: Sequence[Replica]) -> int:
        """Index of the replica that decodes; the KV moves there where it is another one."""


@runtime_checkable
class Routed(Protocol):
    """A policy whose replicas need a route of their own."""

    def route(self) -> Route:
        """A fresh route for one simulation."""


class RoundRobin:
    """Programs go round the replicas in order of arrival; the stages of one stay together, where their prefix is."""

    def __init__(self) -> None:
        self._home: dict[str, int] = {}

    def arrival(self, call: Call, replicas: Sequence[Replica]) -> int:
        return self._home.setdefault(call.program.id, len(self._home) % len(replicas))

    def prefilled(self, call: Call, replicas: Sequence[Replica]) -> int:
        return call.replica

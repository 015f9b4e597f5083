"""Every rank decides by rank 0's reading of the clock, and sees the requests as SGLang broadcast them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.scheduler_components import request_receiver
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

from slos_sglang.engine import clock
from slos_sglang.engine.clock import TickingReceiver


def receiver() -> TickingReceiver:
    inherited = {field: None for field in SchedulerRequestReceiver.__dataclass_fields__}
    return TickingReceiver.over(SchedulerRequestReceiver(**inherited))


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A group of two ranks, of which the first to call sends; what it sent."""
    sent: list[Any] = []

    def broadcast(data: list[Any] | None, *_: Any, **__: Any) -> list[Any]:
        if data is not None:
            sent[:] = copy.deepcopy(data)
            return data
        return copy.deepcopy(sent)

    group = SimpleNamespace(rank=0, cpu_group=None, ranks=[0, 1])
    parallel = SimpleNamespace(attn_dp_enabled=False, tp_size=2, tp_group=group)
    monkeypatch.setattr(request_receiver, "get_parallel", lambda: parallel)
    monkeypatch.setattr(request_receiver, "broadcast_pyobj", broadcast)
    return sent


def test_both_ranks_have_one_time_and_the_same_requests(wire: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([10.0, 10.25, 99.0])
    first, second = receiver(), receiver()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    for now_s, received, local in ((10.0, ["a", "b"], ["timed out"]), (10.25, [], None)):
        requests = first._broadcast_reqs_across_ranks(list(received), local)
        assert requests == second._broadcast_reqs_across_ranks(None) == received + (local or [])
        assert first.now_s[0] == second.now_s[0] == now_s
    assert next(readings) == 99.0, "the second rank has read no clock of its own"


def test_one_rank_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_receiver, "get_parallel", lambda: SimpleNamespace(attn_dp_enabled=False, tp_size=1))
    alone = receiver()
    before_s = alone.now_s[0]
    assert alone._broadcast_reqs_across_ranks(["a"]) == ["a"]
    assert alone.now_s[0] >= before_s

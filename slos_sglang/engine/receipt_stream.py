"""Receipts on their way out of the scheduler: one dict a finished request, under the customized-info key "slo".

The HTTP process puts it into `meta_info["slo"]` (`hooks.update_request_meta_info`). Values must survive pickling
and JSON: numbers, texts, booleans, None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

ReceiptOf = Callable[[Req], dict[str, Any] | None]


class SLOOutputStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """SGLang's streamer, which also asks `receipt_of(req)` for each request that has just finished."""

    __slots__ = ()

    has_additional_customized_info: ClassVar[bool] = True
    receipt_of: ClassVar[ReceiptOf]

    @classmethod
    def reading(cls, receipt_of: ReceiptOf) -> type[SLOOutputStreamer]:
        """The class for `Scheduler.get_output_streamer_class`.

        SGLang constructs it with arguments of its own, so what is ours comes as a class attribute.
        """
        return type(cls.__name__, (cls,), {"__slots__": (), "receipt_of": staticmethod(receipt_of)})

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list[Any]]:
        receipt_of = type(self).receipt_of
        receipts = [receipt_of(req) if req.finished() else None for req in reqs]
        return {"slo": receipts} if any(receipt is not None for receipt in receipts) else {}

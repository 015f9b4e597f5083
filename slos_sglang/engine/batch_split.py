"""Splitting SGLang's running batch into the rows that decode now and the rows that sit this step out.

SGLang's batches can be filtered and merged, not split: a split is a shallow copy of which each half keeps its rows.
What `filter_batch` changes in place must not be shared, which is the sampling state and the penalizers with their weak
references back to batch and orchestrator.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def split(batch: ScheduleBatch, active: Callable[[Req], bool]) -> ScheduleBatch:
    """Take the rows for which `active` holds out of `batch` and return them as a batch of their own.

    Neither part may be empty; row order is kept in both.
    """
    taken = [i for i, req in enumerate(batch.reqs) if active(req)]
    parked = [i for i, req in enumerate(batch.reqs) if not active(req)]
    assert taken and parked, "a split needs rows on both sides"
    other = copy.copy(batch)
    other.sampling_info = _fork_sampling(batch, other)
    other.filter_batch(keep_indices=taken)
    batch.filter_batch(keep_indices=parked)
    return other


def rejoin(batch: ScheduleBatch, other: ScheduleBatch) -> ScheduleBatch:
    """Merge two batches of which either may be empty; returns the one that now holds all rows."""
    if other.is_empty():
        return batch
    if batch.is_empty():
        return other
    batch.merge_batch(other)
    return batch


def _fork_sampling(batch: ScheduleBatch, other: ScheduleBatch) -> object:
    info = copy.copy(batch.sampling_info)
    orchestrator = info.penalizer_orchestrator
    if orchestrator is None:
        return info
    forked = copy.copy(orchestrator)
    forked.batch = other
    forked.penalizers = {}
    for kind, penalizer in orchestrator.penalizers.items():
        twin = copy.copy(penalizer)
        twin._orchestrator_ref = weakref.ref(forked)
        forked.penalizers[kind] = twin
    info.penalizer_orchestrator = forked
    return info

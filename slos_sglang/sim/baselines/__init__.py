"""Schedulers that others run, as their authors would tune them, behind the interface of `sim.replica.Policy`.

`POLICIES` has them by name, this project's own among them; each takes `cost` and its own options as keywords.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.sim.baselines.distserve import DistServe
from slos_sglang.sim.baselines.edf import EDF
from slos_sglang.sim.baselines.qoserve import QoServe
from slos_sglang.sim.baselines.sarathi import Sarathi
from slos_sglang.sim.baselines.sglang import SGLang
from slos_sglang.sim.baselines.vllm import VLLM
from slos_sglang.sim.baselines.vllm_v1 import VLLMV1
from slos_sglang.sim.replica import Policy

POLICIES: dict[str, Callable[..., Policy]] = {
    "slos": Scheduler,
    "edf": EDF,
    "qoserve": QoServe,
    "vllm": VLLM,
    "vllm_v1": VLLMV1,
    "sarathi": Sarathi,
    "sglang": SGLang,
    "sglang_mixed": partial(SGLang, mixed=True),
    "distserve": DistServe,
}

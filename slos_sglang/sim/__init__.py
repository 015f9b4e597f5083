"""An iteration-level simulation of servers that drives the very policy objects of the real one.

run        programs in, what became of them out: `simulate`
replica    one server: queues, steps, invariants
memory     its KV in blocks, with the prefixes that ended stages left
routing    which replica a call goes to
baselines  the schedulers that others run, in the same interface
fuzz       random loads against every policy
"""

from slos_sglang.sim.replica import Call, Policy, Replica, Step
from slos_sglang.sim.run import Abort, Run, simulate

__all__ = ["Abort", "Call", "Policy", "Replica", "Run", "Step", "simulate"]

"""Ways to admit against the optimum over all sets, in the exact simulation.

`benchmarks/admission_optimum.py` asks the same of thousands of instances.
"""

from copy import copy
from dataclasses import replace
from statistics import mean

from slos_sglang.policy.admission import METHODS, Method, Outlook
from slos_sglang.sim.instances import Instance, draw_instance, value_of

INSTANCES = [draw_instance(seed) for seed in range(100)]
OPTIMA = [instance.optimum() for instance in INSTANCES]


def admitted_value(instance: Instance, method: Method) -> float:
    """What `method` admits is worth; it has to be kept."""
    asking = sorted(instance.asking, key=lambda r: (r.due_s, r.seq))
    outlook = Outlook(0.0, instance.promised, asking, instance.cost, instance.limits, instance.memory)
    verdicts = outlook.judge(asking, method)
    admitted = [r for r, verdict in zip(asking, verdicts, strict=True) if verdict.admitted]
    assert instance.keeps(admitted), f"{method} admitted what can't be kept"
    assert all(verdict.admitted or verdict.reason for verdict in verdicts)
    return value_of(admitted)


def shares(method: Method) -> list[float]:
    found = (admitted_value(instance, method) for instance in INSTANCES)
    return [value / best if best else 1.0 for value, best in zip(found, OPTIMA, strict=True)]


def test_auto_is_near_the_optimum() -> None:
    found = shares("auto")
    assert mean(found) >= 0.97 and min(found) >= 0.8


def test_auto_is_never_worth_less_than_asking_by_deadline() -> None:
    by_deadline = shares("edf_sim")
    assert all(auto >= other for auto, other in zip(shares("auto"), by_deadline, strict=True))
    assert mean(by_deadline) < 0.98, "else these instances are too easy to tell"


def test_every_method_is_sound() -> None:
    for method in METHODS:
        assert 0.9 < mean(shares(method)) <= 1.0


def test_the_dynamic_program_often_finds_more() -> None:
    better = [i for i in INSTANCES if admitted_value(i, "dp") > admitted_value(i, "edf_sim")]
    assert len(better) >= 10


def test_what_was_declined_before_does_not_compete_with_newcomers() -> None:
    """Asked again, requests are taken by deadline, whatever they are worth."""
    instance = next(i for i in INSTANCES if admitted_value(i, "auto") > admitted_value(i, "edf_sim"))
    declined = []
    for request in instance.asking:
        declined.append(copy(request))
        declined[-1].decline()
    again = replace(instance, asking=tuple(declined))
    assert admitted_value(again, "auto") == admitted_value(instance, "edf_sim")

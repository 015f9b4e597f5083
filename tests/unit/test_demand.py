"""How much KV memory calls ask for, and how much is too much for one of them where memory is short."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Memory
from slos_sglang.policy.demand import Demand
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.sim.run import Run, simulate
from slos_sglang.slo import WireSLO
from slos_sglang.workloads.program import Program, Stage

MEMORY = Memory(capacity_tokens=10_000)
TOKEN_S = 0.1
# Prompt and output, and what such a call holds, in token seconds.
SMALL, LARGE = (90, 20), (900, 200)
SMALL_S, LARGE_S = 100 * 20 * TOKEN_S, 1000 * 200 * TOKEN_S


def call(seq: int, prompt: int, output: int, *, at_s: float = 0.0, value: float = 1.0) -> Request:
    request = Request(rid=f"r{seq}", seq=seq, arrival_s=at_s, slo=WireSLO(tpot_ms=100, value=value))
    request.uncached_tokens, request.left_tokens, request.sure_tokens = prompt, output, output
    return request


def serve(request: Request, at_s: float, *, token_s: float = TOKEN_S, output: int | None = None) -> float:
    """Promise it and serve it from then on; when it ends."""
    tokens = request.left_tokens if output is None else output
    request.standard = True
    request.context_tokens, request.uncached_tokens = request.uncached_tokens + tokens, 0
    request.output_tokens, request.first_token_s = tokens, at_s
    return at_s + tokens * token_s


def demand(came: Sequence[Request], *, ended: int = 32, token_s: float = TOKEN_S, output: float = 1.0) -> Demand:
    """After these calls, and others of both sizes that ended long before, with so many times the output expected."""
    found = Demand()
    for n in range(ended):
        done = call(n, *(SMALL, LARGE)[n % 2])
        found.arrived(done)
        found.ended(done, serve(done, 0.0, token_s=token_s, output=round(done.left_tokens * output)))
    for request in came:
        found.arrived(request)
    return found


def arrivals(*, every_s: float, times: int = 256, value: float = 1.0) -> list[Request]:
    """Small ones and large ones of that value in turn."""
    sizes, values = (SMALL, LARGE), (1.0, value)
    return [call(1000 + n, *sizes[n % 2], at_s=n * every_s, value=values[n % 2]) for n in range(times)]


def short(found: Demand, came: Sequence[Request], memory: Memory = MEMORY) -> bool:
    """True where not everybody may be asked for anything."""
    return found.excess(came[-1:], came[-1].arrival_s, memory) != [0.0]


def test_nobody_is_too_large_while_little_is_known() -> None:
    came = arrivals(every_s=0.01)
    assert not short(demand(came[:8], ended=4), came[:8])
    assert not short(demand(came, ended=15), came)
    assert short(demand(came, ended=16), came)


@pytest.mark.parametrize(("share", "lacks"), [(1.1, False), (0.9, True)])
def test_nobody_is_too_large_where_all_find_room(share: float, lacks: bool) -> None:
    came = arrivals(every_s=share * (SMALL_S + LARGE_S) / 2 / MEMORY.capacity_tokens)
    assert short(demand(came), came) is lacks


def test_the_largest_are_too_large_where_memory_is_short() -> None:
    """Of the large ones some still fit: one of their size may be promised, a larger one not."""
    came = arrivals(every_s=0.4 * LARGE_S / 2 / MEMORY.capacity_tokens)
    found = demand(came)
    now_s = came[-1].arrival_s
    larger = call(5000, LARGE[0] + 100, LARGE[1], at_s=now_s)
    found.arrived(larger)
    small, large, too_large = found.excess([came[0], came[1], larger], now_s, MEMORY)
    assert small == pytest.approx(SMALL_S / LARGE_S)
    assert large == 1.0
    assert too_large == pytest.approx(1.1)


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.integers(2, 500)), min_size=16, max_size=256),
    st.floats(1.0, 20.0),
    st.integers(10, 100_000),
)
def test_as_many_of_the_smallest_as_fit(sizes: list[tuple[int, int]], window_s: float, capacity: int) -> None:
    came = [call(n, *size, at_s=50.0) for n, size in enumerate(sizes)]
    found = demand(())
    for request in came:
        found.arrived(request)
    excess = found.excess(came, 50.0 + window_s, Memory(capacity_tokens=capacity))
    room_s = capacity * max(window_s, (SMALL[1] + LARGE[1]) / 2 * TOKEN_S)
    holds_s = [output * (prompt + output / 2) * TOKEN_S for prompt, output in sizes]
    if any(excess):
        assert sum(holds for holds, times in zip(holds_s, excess, strict=True) if times < 1) <= room_s * (1 + 1e-6)
        assert sum(holds for holds, times in zip(holds_s, excess, strict=True) if times <= 1) > room_s * (1 - 1e-6)
    else:
        assert sum(holds_s) <= room_s * (1 + 1e-6)


def test_a_faster_server_and_shorter_outputs_make_room() -> None:
    came = arrivals(every_s=0.6 * LARGE_S / 2 / MEMORY.capacity_tokens)
    assert short(demand(came), came)
    assert not short(demand(came, token_s=TOKEN_S / 2), came)
    assert not short(demand(came, output=0.5), came)


def test_who_asks_for_more_is_not_large_where_those_held_no_more() -> None:
    """The longer the prompt, the shorter the output was, and all were expected to be of one length."""
    found = Demand()
    for n in range(32):
        prompt, output = ((100, 200), (1000, 20))[n % 2]
        done = call(n, prompt, 100)
        found.arrived(done)
        found.ended(done, serve(done, 0.0, output=output))
    came = [call(1000 + n, (100, 1000)[n % 2], 100, at_s=n * 0.01) for n in range(256)]
    for request in came:
        found.arrived(request)
    excess = found.excess(came, came[-1].arrival_s, MEMORY)
    assert excess == pytest.approx([1.0] * len(came)) and max(excess) <= 1.0
    unknown, known = (call(5000, 100, 100, at_s=came[-1].arrival_s, value=0.5) for _ in range(2))
    unknown.sure_tokens = 1
    for request in (unknown, known):
        found.arrived(request)
    assert found.excess([unknown, known], came[-1].arrival_s, MEMORY) == [0.0, pytest.approx(2.0)]


def test_a_burst_has_the_memory_as_long_as_it_holds_it() -> None:
    """All at once: as many as fill the memory, though no time has passed."""
    came = [call(n, 500 + n, 110, at_s=9.0) for n in range(256)]
    found = demand(came)
    excess = found.excess(came, 9.0, MEMORY)
    held = sum(r.uncached_tokens + 55 for r, times in zip(came, excess, strict=True) if times < 1)
    assert 0.9 * MEMORY.capacity_tokens < held <= MEMORY.capacity_tokens


def test_a_burst_is_over_when_its_calls_have_given_their_memory_back() -> None:
    """What came in it counts no more, though few have come since."""
    burst = [call(n, *LARGE, at_s=5.0) for n in range(200)]
    later = arrivals(every_s=1.0, times=60)
    for request in later:
        request.arrival_s += 5.0
    found = demand([*burst, *later])
    for_s = (SMALL[1] + LARGE[1]) / 2 * TOKEN_S
    large = call(5000, LARGE[0] + 1, LARGE[1])
    found.arrived(large)
    tight = Memory(capacity_tokens=int(1.3 * (SMALL_S + LARGE_S) / 2))
    assert found.excess([large], 5.0 + 1.9 * for_s, tight)[0] > 1.0
    assert found.excess([large], 5.0 + 59.0, tight) == [0.0]


def test_what_is_worth_more_may_ask_for_more() -> None:
    came = arrivals(every_s=0.4 * LARGE_S / 2 / MEMORY.capacity_tokens, value=2 * LARGE_S / SMALL_S)
    small, large = demand(came).excess(came[:2], came[-1].arrival_s, MEMORY)
    assert large == 1.0 and small == pytest.approx(2.0)


def test_a_call_of_which_only_the_cap_is_known_is_not_too_large() -> None:
    """Nor does it count: it may end soon."""
    came = arrivals(every_s=0.4 * LARGE_S / 2 / MEMORY.capacity_tokens)
    found, now_s = demand(came), came[-1].arrival_s
    before = found.excess(came, now_s, MEMORY)
    unknown = call(5000, 100, 4096, at_s=now_s)
    unknown.sure_tokens = 1
    found.arrived(unknown)
    assert found.excess([unknown], now_s, MEMORY) == [0.0]
    found.ended(unknown, serve(unknown, 0.0, output=4))
    assert found.excess(came, now_s, MEMORY) == before


# With the scheduler -------------------------------------------------------------------------------------------------

COST = CostModel(Piece(tokens_ms=0.05, const_ms=20.0))


class NobodyIsTooLarge(Demand):
    def excess(self, requests: Sequence[Request], now_s: float, memory: Memory) -> list[float]:
        return [0.0] * len(requests)


def run_load(found: Demand, *, every_s: float) -> Run:
    """One in five calls takes five times the memory of the others, for four times as long, more or less."""
    stages = [("large", 1000 + n * 37 % 500, 240) if n % 5 == 0 else ("small", 200 + n % 100, 60) for n in range(300)]
    programs = [
        Program(
            id=f"{name}-{n}",
            app=name,
            arrival_s=n * every_s,
            stages=(Stage(name=name, prompt_tokens=prompt, output_tokens=output, ttft_slowdown=5, tpot_ms=100),),
        )
        for n, (name, prompt, output) in enumerate(stages)
    ]
    scheduler = Scheduler(cost=COST, demand=found)
    return simulate(programs, [scheduler], COST, memory_tokens=8_000, trace=True)


def attained(run: Run, name: str = "") -> int:
    return sum(program.attained for program in run.programs if program.id.startswith(name))


def reasons(run: Run) -> list[str]:
    return [verdict.reason for call in run.calls for _, verdict in call.verdicts]


def test_more_calls_are_kept_where_memory_is_short() -> None:
    found, plain = run_load(Demand(), every_s=0.06), run_load(NobodyIsTooLarge(), every_s=0.06)
    assert attained(found) > 1.05 * attained(plain)
    assert attained(found, "small") > 1.1 * attained(plain, "small")
    assert any("KV memory is short, and it asks for" in reason for reason in reasons(found))


def test_all_are_served_as_before_where_memory_suffices() -> None:
    found, plain = run_load(Demand(), every_s=0.6), run_load(NobodyIsTooLarge(), every_s=0.6)
    assert found.programs == plain.programs
    assert attained(found) == 300


@pytest.mark.parametrize(("held", "admitted"), [(2000, True), (6000, False)])
def test_a_call_is_not_too_large_while_little_of_the_memory_is_promised(held: int, admitted: bool) -> None:
    """However much was asked for before."""
    came = arrivals(every_s=0.4 * LARGE_S / 2 / MEMORY.capacity_tokens)
    scheduler, now_s = Scheduler(cost=COST, demand=demand(came)), came[-1].arrival_s
    running = call(1, held, 2)
    running.standard = running.started = True
    running.context_tokens, running.uncached_tokens, running.output_tokens = held, 0, 1
    newcomer = call(2, LARGE[0] + 100, LARGE[1], at_s=now_s)
    memory = Memory(capacity_tokens=MEMORY.capacity_tokens, free_tokens=MEMORY.capacity_tokens - held)
    ((_, verdict),) = scheduler.admit(now_s, [newcomer], [running], [newcomer], memory)
    assert verdict.admitted is admitted
    if not admitted:
        assert verdict.retry_after_s > 0 and "1.1 times what a call may" in verdict.reason


def test_what_is_cached_for_a_prompt_that_has_not_begun_makes_memory_no_scarcer() -> None:
    """Nobody holds it yet, and several may find the same."""
    came = arrivals(every_s=0.4 * LARGE_S / 2 / MEMORY.capacity_tokens)
    scheduler, now_s = Scheduler(cost=COST, demand=demand(came)), came[-1].arrival_s
    waiting = call(1, 10, 2, at_s=now_s)
    waiting.standard, waiting.context_tokens = True, 6000
    newcomer = call(2, LARGE[0] + 100, LARGE[1], at_s=now_s)
    memory = Memory(capacity_tokens=MEMORY.capacity_tokens, free_tokens=MEMORY.capacity_tokens)
    ((_, verdict),) = scheduler.admit(now_s, [newcomer], [], [waiting, newcomer], memory)
    assert verdict.admitted

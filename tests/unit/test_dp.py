"""The dynamic program against brute force over all sets, under its own feasibility."""

import math
import random
from dataclasses import replace
from itertools import combinations

import pytest

from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.dp import Choice, Prompt, tiers
from slos_sglang.policy.state import World, world_of


def world(cost: CostModel, *, memory_tokens: int = -1, max_batch_ms: float = 60.0) -> World:
    return world_of(cost, Limits(max_batch_ms=max_batch_ms), Memory(capacity_tokens=memory_tokens))


def brute_force(choice: Choice) -> float | None:
    """The most value of any feasible set; None where there is none."""
    mandatory = [n for n, prompt in enumerate(choice.prompts) if prompt.mandatory]
    others = [n for n, prompt in enumerate(choice.prompts) if not prompt.mandatory]
    sets = ((*mandatory, *chosen) for size in range(len(others) + 1) for chosen in combinations(others, size))
    return max((value(choice, chosen) for chosen in sets if choice.feasible(chosen)), default=None)


def value(choice: Choice, chosen: tuple[int, ...]) -> float:
    return sum(choice.prompts[number].value for number in chosen)


def draw(seed: int, *, asking: int) -> Choice:
    """Up to 6 running, half of them with a prompt to compute, up to `asking` newcomers, 3 tiers, values, memory."""
    rng = random.Random(seed)
    cost = CostModel(
        Piece(
            tokens_ms=rng.choice((0.02, 0.07)),
            requests_ms=rng.choice((0.0, 0.3, 4.0)),
            context_ms=rng.choice((0.0, 5e-4)),
            const_ms=rng.choice((5.0, 20.0)),
        )
    )
    paces = rng.sample((30.0, 50.0, 75.0, 100.0, 200.0, math.inf), 3)
    horizon_ms = rng.choice((200, 500, 2000))
    running = rng.randint(0, 6)
    prompts = [
        Prompt(
            due_ms=rng.uniform(0.05, 1.0) * horizon_ms,
            tokens=rng.randint(1, rng.choice((200, 2000))),
            memory_tokens=rng.randint(100, 2000),
            pace_ms=rng.choice(paces),
            value=rng.choice((1.0, 1.0, 2.0, 5.0)),
            mandatory=number < running // 2,
        )
        for number in range(running // 2 + rng.randint(1, asking))
    ]
    need = sum(prompt.memory_tokens for prompt in prompts)
    memory = rng.choice((-1, int(need * rng.uniform(0.3, 1.2)) + 1000))
    return Choice(
        prompts=prompts,
        running=[rng.choice(paces) for _ in range(running - running // 2)],
        held_tokens=rng.randint(0, 1000),
        context_tokens=rng.randint(0, 1000),
        world=world(cost, memory_tokens=memory),
    )


@pytest.mark.parametrize("start", range(0, 3000, 500))
def test_it_equals_brute_force(start: int) -> None:
    for seed in range(start, start + 500):
        choice = draw(seed, asking=8 if seed % 20 else 10)
        best = choice.best(max_states=10_000)
        found = None if best is None else value(choice, best)
        assert found == brute_force(choice), f"seed {seed}"
        assert best is None or choice.feasible(best)


def test_the_drawn_choices_are_choices() -> None:
    """Most can not take everybody, most can take somebody, and deadlines, memory and paces all bind in some."""
    shares = []
    bound = {"memory": 0, "pace": 0, "deadline": 0}
    for seed in range(200):
        choice = draw(seed, asking=8)
        best = choice.best()
        shares.append(0.0 if best is None else len(best) / len(choice.prompts))
        looser = {
            "memory": replace(choice, world=choice.world._replace(memory_tokens=-1)),
            "pace": replace(choice, prompts=[replace(prompt, pace_ms=math.inf) for prompt in choice.prompts]),
            "deadline": replace(choice, prompts=[replace(prompt, due_ms=1e9) for prompt in choice.prompts]),
        }
        for name, other in looser.items():
            freed = other.best()
            bound[name] += best is not None and freed is not None and value(other, freed) > value(choice, best)
    assert sum(0 < share < 1 for share in shares) > 100
    assert min(bound.values()) > 10, bound


def test_by_hand() -> None:
    """10 ms a step and 0.1 ms a token, batches of 60 ms at most: 500 tokens a batch. One prompt of 900 tokens worth 3
    and two of 500 worth 2 each are due after two batches: the two together.
    """
    cost = CostModel(Piece(tokens_ms=0.1, const_ms=10))
    prompts = [
        Prompt(due_ms=120, tokens=900, memory_tokens=950, pace_ms=100, value=3),
        Prompt(due_ms=60, tokens=500, memory_tokens=550, pace_ms=100, value=2),
        Prompt(due_ms=121, tokens=500, memory_tokens=550, pace_ms=100, value=2),
    ]
    choice = Choice(prompts=prompts, running=[], held_tokens=0, context_tokens=0, world=world(cost))
    # The one that is due after 60 ms decodes from then on and takes one token of the second batch.
    assert choice.best() == (0,)
    prompts[2] = replace(prompts[2], tokens=499)
    assert choice.best() == (1, 2)
    # KV for one of them only; and where the big one was promised before, it stays.
    short = replace(choice, world=world(cost, memory_tokens=1000))
    assert short.best() == (0,)
    prompts[0] = replace(prompts[0], mandatory=True)
    assert choice.best() == (0,)


def test_a_promise_that_can_not_be_kept_leaves_no_proposal() -> None:
    cost = CostModel(Piece(tokens_ms=0.1, const_ms=10))
    prompts = [
        Prompt(due_ms=50, tokens=900, memory_tokens=950, pace_ms=100, mandatory=True),
        Prompt(due_ms=500, tokens=10, memory_tokens=20, pace_ms=100),
    ]
    choice = Choice(prompts=prompts, running=[], held_tokens=0, context_tokens=0, world=world(cost))
    assert choice.best() is None


def test_paces_are_rounded_down_to_four_tiers() -> None:
    assert tiers([50, 100, 50, math.inf]) == (50, 100)
    assert tiers([]) == ()
    assert tiers([10, 20, 30, 40, 50, 60, 70, 80]) == (10, 30, 50, 70)
    assert len(tiers(range(1, 100))) == 4 and tiers(range(1, 100))[0] == 1

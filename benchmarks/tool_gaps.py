"""While a tool runs, is its conversation's KV kept, for how long, and what does that cost the others?

    python benchmarks/tool_gaps.py            # 3 repeats, about 5 minutes on 2 cores

Tool agents ask, run a tool, and come back with all that was said; beside them so many people ask one best-effort prompt
after the other that they would turn the small memory over in every gap. How long a tool takes is drawn; half of the
agents announce its mean, of the others the server learns it. Some leave in the middle, and nobody comes back after an
answer. Three servers, which differ in `hold_kv` alone, take turns:

    auto    kept as long as the return is worth it
    never   the least recently used KV goes, whose ever it is
    always  kept until the next call comes or is given up

*Found* is the share of the tokens of an earlier prompt and its output that the next call found cached. *Kept for
nothing* is the share of what was kept (tokens times seconds) after which nobody came.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from fleet import Arm, Fleet, fleet, host_use

from slos_sglang.telemetry.events import Kept, read_events
from slos_sglang.tiny_model import make_tiny_model

ARMS = ("auto", "never", "always")
MEMORY_TOKENS = 8192
SLO = {"ttft_ms": 1500.0, "tpot_ms": 100.0}
# What a tool takes on average, by stage; one takes as long as is drawn from the exponential distribution around it.
TOOLS_S = {"quick": 0.4, "slow": 2.0}
LONGEST_S, LEAVES = 6.0, 0.15
# Bounds of the classes of gaps that the report has, s.
CLASSES_S = (0.5, 1.5, LONGEST_S)


@dataclass(kw_only=True)
class Call:
    """A call of an agent that ended at `ended_s`: its tokens; the gap after which the next one came (None: none did),
    and how much of these tokens that one found.
    """

    rid: str
    tokens: int
    ended_s: float
    attained: bool
    gap_s: float | None = None
    found_tokens: int = 0


@dataclass(kw_only=True)
class Load:
    """Agents and people on one server."""

    url: str
    seed: int
    every_s: float
    session: aiohttp.ClientSession
    calls: list[Call] = field(default_factory=list)
    served_tokens: int = 0
    ends: bool = False

    async def generate(self, ids: list[int], tokens: int, rid: str, slo: dict[str, Any] | None) -> dict[str, Any]:
        params: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        if slo is not None:
            params["custom_params"] = {"slo": slo}
        body = {"input_ids": ids, "sampling_params": params, "rid": rid}
        async with self.session.post(f"{self.url}/generate", json=body) as response:
            response.raise_for_status()
            return await response.json()

    async def agent(self, number: int) -> None:
        """One agent, to its answer or until it leaves."""
        await asyncio.sleep(number * self.every_s)
        rng = random.Random(f"{self.seed}/agent/{number}")
        ids, before = _prompt(rng, rng.randrange(200, 500)), None
        announces = rng.random() < 0.5
        for turn in range(5):
            stage = rng.choice(list(TOOLS_S)) if turn < 4 else "answer"
            slo: dict[str, Any] = {"program": f"{self.seed}-{number}", "stage": stage, **SLO}
            if announces and stage in TOOLS_S:
                slo["gap_ms"] = TOOLS_S[stage] * 1e3
            rid, sent_s = f"{self.seed}-{number}-{turn}", time.monotonic()
            answer = await self.generate(ids, 20, rid, slo)
            meta = answer["meta_info"]
            if before is not None:
                before.gap_s, before.found_tokens = sent_s - before.ended_s, min(meta["cached_tokens"], before.tokens)
            ids = [*ids, *answer["output_ids"]]
            # The last token's KV is not computed.
            before = Call(rid=rid, tokens=len(ids) - 1, ended_s=time.monotonic(), attained=meta["slo"]["attained"])
            self.calls.append(before)
            if stage == "answer" or rng.random() < LEAVES:
                return
            await asyncio.sleep(min(rng.expovariate(1 / TOOLS_S[stage]), LONGEST_S))
            ids = [*ids, *_prompt(rng, rng.randrange(10, 60))]

    async def person(self, number: int) -> None:
        """Somebody of the background."""
        rng = random.Random(f"{self.seed}/person/{number}")
        while not self.ends:
            ids, tokens = _prompt(rng, rng.randrange(200, 600)), rng.randrange(10, 40)
            await self.generate(ids, tokens, f"{self.seed}-p{number}-{rng.random()}", None)
            self.served_tokens += len(ids) + tokens


def _prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(300, 2000) for _ in range(tokens)]


async def run_load(url: str, *, seed: int, agents: int, people: int, every_s: float) -> dict[str, Any]:
    """So many agents, one `every_s`, and people until the last of them has ended."""
    # A connection that is kept open could be closed by the server in the moment in which it is used again.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        load = Load(url=url, seed=seed, every_s=every_s, session=session)
        crowd = [asyncio.create_task(load.person(number)) for number in range(people)]
        await asyncio.sleep(2)
        start_s, served = time.monotonic(), load.served_tokens
        runs = [asyncio.create_task(load.agent(number)) for number in range(agents)]
        await asyncio.sleep(start_s + agents * every_s - time.monotonic())
        # While agents go on coming: later there are fewer of them.
        best_effort_tokens_s = (load.served_tokens - served) / (time.monotonic() - start_s)
        await asyncio.gather(*runs)
        end_s = time.monotonic()
        load.ends = True
        await asyncio.gather(*crowd)
    return {"calls": load.calls, "end_s": end_s, "best_effort_tokens_s": best_effort_tokens_s}


def outcome(calls: Sequence[Call], kept: dict[str, Kept], end_s: float, *, keeps: bool) -> dict[str, Any]:
    """What the calls found, and how long what was kept; what is still kept at the end counts until then."""
    times_ms: list[float] = []
    kept_token_s = unused_token_s = 0.0
    for call in calls:
        event = kept.get(call.rid)
        still_kept = keeps and event is None and call.gap_s is None
        if event is None and not still_kept:
            continue
        kept_ms = event.kept_ms if event is not None else (end_s - call.ended_s) * 1e3
        times_ms.append(kept_ms)
        kept_token_s += call.tokens * kept_ms / 1e3
        if event is None or event.gap_ms is None:
            unused_token_s += call.tokens * kept_ms / 1e3
    back = [call for call in calls if call.gap_s is not None]
    in_time = [call for call in back if call.rid in kept and kept[call.rid].gap_ms is not None]
    return {
        "calls": len(calls),
        "attained": sum(call.attained for call in calls) / len(calls),
        "returns": len(back),
        "found": found(back),
        "returns_while_kept": len(in_time),
        "found_while_kept": found(in_time),
        "found_by_gap": {f"{bound:g}": found(_of_class(back, bound)) for bound in CLASSES_S},
        "kept_by_gap": {f"{bound:g}": _share(_of_class(back, bound), in_time) for bound in CLASSES_S},
        "kept_ms": {"p50": _quantile(times_ms, 0.5), "p95": _quantile(times_ms, 0.95)},
        "kept_for_nothing": unused_token_s / kept_token_s if kept_token_s else 0.0,
        "kept_token_s": kept_token_s,
    }


def found(calls: Iterable[Call]) -> float | None:
    """The share of what the next calls could have found that they found."""
    listed = list(calls)
    return sum(c.found_tokens for c in listed) / sum(c.tokens for c in listed) if listed else None


def _of_class(calls: Iterable[Call], bound_s: float) -> list[Call]:
    least_s = max((bound for bound in CLASSES_S if bound < bound_s), default=0.0)
    return [call for call in calls if call.gap_s is not None and least_s <= min(call.gap_s, CLASSES_S[-1]) <= bound_s]


def _share(calls: Sequence[Call], of_them: Sequence[Call]) -> float | None:
    ids = {call.rid for call in of_them}
    return sum(call.rid in ids for call in calls) / len(calls) if calls else None


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))] if values else 0.0


def one_run(servers: Fleet, arm: str, events: Path, **load: Any) -> dict[str, Any]:
    """One arm's turn."""
    with servers.awake(arm) as server, host_use(server) as host:
        done = asyncio.run(run_load(server.url, **load))
    kept = {event.rid: event for event in read_events(events) if isinstance(event, Kept)}
    seen = outcome(done["calls"], kept, done["end_s"], keeps=arm == "always")
    return {"arm": arm, "best_effort_tokens_s": done["best_effort_tokens_s"], "other_cores": host[0].other, **seen}


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    agents: Annotated[int, typer.Option(min=1, help="a run")] = 40,
    people: Annotated[int, typer.Option(min=0, help="of the background")] = 20,
    every_s: Annotated[float, typer.Option(help="between agents")] = 0.5,
    out: Annotated[Path, typer.Option(help="the JSON")] = Path("benchmarks/results/tool_gaps.json"),
) -> None:
    """Measure; print and write what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        model, logs = Path(folder) / "model", Path(folder)
        make_tiny_model(model)
        arms = []
        for name in ARMS:
            config = logs / f"{name}.json"
            config.write_text(json.dumps({"hold_kv": name, "events": str(logs / f"{name}.jsonl")}), encoding="utf-8")
            flags = ("--max-total-tokens", str(MEMORY_TOKENS))
            arms.append(Arm(name=name, scheduler="slos", flags=flags, config=config))
        runs = []
        with fleet(model, tuple(arms), logs) as servers:
            for repeat in range(repeats):
                for name in ARMS:
                    run = one_run(
                        servers,
                        name,
                        logs / f"{name}.jsonl",
                        seed=repeat,
                        agents=agents,
                        people=people,
                        every_s=every_s,
                    )
                    runs.append(run)
                    print(json.dumps(run), file=sys.stderr, flush=True)
    report = {"memory_tokens": MEMORY_TOKENS, "people": people, "every_s": every_s, "agents": agents, "runs": runs}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"command": sys.argv, **report}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

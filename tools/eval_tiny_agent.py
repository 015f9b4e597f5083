"""Judges the embedded model: how many held-out questions of each kind end in the right answer, tools executed.

An answer is right if it is the expected one, letter by letter. The first tenth of the questions is about the shipped
table, the others about tables of made-up mountains; none of these names occur in training. Decoding is greedy: through
a server by the programs as they are, or through plain transformers, with the programs' grammars and without any.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from slos_sglang.programs import reasoning, tool_agent
from tiny_conversations import NOW_ANSWER, Episode
from tiny_episodes import KINDS, PRACTICE, Source
from tiny_names import Mountain

from slos_sglang.engine.launch import server

JUDGED = tuple(kind for kind in KINDS if kind not in PRACTICE)
ROUNDS, TABLE_ROWS = 10, 32
LONGEST_REPLY_TOKENS = 460  # more than a grammar allows
SHIPPED = tuple(
    Mountain(name=name, range=range_, country=country, height_m=height_m)
    for name, range_, country, height_m in tool_agent.MOUNTAINS.execute("SELECT * FROM mountains ORDER BY name")
)


def tables(seed: int) -> list[Sequence[Mountain]]:
    """The shipped table and made-up ones; no two mountains of a table are equally high."""
    made_up = Source(seed, held_out=True)
    found: list[Sequence[Mountain]] = [SHIPPED]
    while len(found) < ROUNDS:
        rows = {m.height_m: m for m in made_up.mountains(TABLE_ROWS + 4)}
        found.append(tuple(rows.values())[:TABLE_ROWS])
    return found


def episodes(seed: int, round_: int, table: Sequence[Mountain], each: int) -> list[Episode]:
    """So many questions of every kind about a table."""
    source = Source(seed * ROUNDS + round_, held_out=True, table=table)
    return [source.episode(kind) for kind in JUDGED for _ in range(each)]


def use(table: Sequence[Mountain]) -> None:
    """Let the tool agent look things up in this table."""
    rows = [(m.name, m.range, m.country, m.height_m) for m in table]
    tool_agent.MOUNTAINS.execute("DELETE FROM mountains")
    tool_agent.MOUNTAINS.executemany("INSERT INTO mountains VALUES (?, ?, ?, ?)", rows)


class Plain:
    """Greedy decoding by transformers, many conversations at a time."""

    def __init__(self, directory: Path) -> None:
        import torch
        import xgrammar
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from xgrammar.contrib.hf import LogitsProcessor

        self._torch, self._allowed = torch, LogitsProcessor
        self._tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(directory)
        known = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._model.config.vocab_size)
        self._grammars = xgrammar.GrammarCompiler(known)

    def complete(self, texts: list[str], grammar: str | None, rows: int = 64) -> list[str]:
        """What follows each text; a grammar allows no other."""
        order = sorted(range(len(texts)), key=lambda n: (len(texts[n]), n))
        replies = [""] * len(texts)
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            inputs = self._tokenizer([texts[n] for n in chosen], return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            allowed = [] if grammar is None else [self._allowed(self._grammars.compile_regex(grammar))]
            with self._torch.inference_mode():
                ids = self._model.generate(
                    **inputs, max_new_tokens=LONGEST_REPLY_TOKENS, do_sample=False, logits_processor=allowed
                )
            for n, row in zip(chosen, ids[:, inputs["input_ids"].shape[1] :], strict=True):
                replies[n] = str(self._tokenizer.decode(row, skip_special_tokens=True))
        return replies

    def converse(self, asked: Sequence[Episode], *, grammars: bool = True, turns: int = 5) -> list[str]:
        """The whole text of each conversation, as the programs lead it."""

        def extend(which: list[int], grammar: str) -> list[str]:
            replies = self.complete([texts[n] for n in which], grammar if grammars else None)
            for n, reply in zip(which, replies, strict=True):
                texts[n] += reply
            return replies

        texts = [episode.turns[0].prompt for episode in asked]
        open_ = [n for n, episode in enumerate(asked) if not episode.kind.startswith("think")]
        thinkers = [n for n, episode in enumerate(asked) if episode.kind.startswith("think")]
        extend(thinkers, reasoning.bounded(300, 150))
        agents = list(open_)
        for turn in range(turns):
            going = []
            grammar = tool_agent.LATER_TURN if turn else tool_agent.FIRST_TURN
            for n, reply in zip(open_, extend(open_, grammar), strict=True):
                try:
                    result = tool_agent.call_tool(reply)
                except (KeyError, TypeError):
                    result = "error: the call was cut short"
                texts[n] += "\n" if result is None else f"\nUSER:{result}\nASSISTANT:"
                going += [n] * (result is not None)
            ready = [n for n in open_ if n not in going]
            for n in ready:
                texts[n] += f"USER:{NOW_ANSWER}\nASSISTANT:"
            open_ = going
        for n in open_:
            texts[n] = texts[n].removesuffix("ASSISTANT:") + f"USER:{NOW_ANSWER}\nASSISTANT:"
        extend(agents, tool_agent.ANSWER)
        return texts


def through_server(url: str, asked: Sequence[Episode], threads: int = 16) -> list[str]:
    """The same by the shipped programs against a server."""
    import sglang as sgl

    backend = sgl.RuntimeEndpoint(url)

    def text(episode: Episode) -> str:
        program = reasoning.main if episode.kind.startswith("think") else tool_agent.main
        return str(program.run(question=episode.question, backend=backend).text()).removesuffix("\n")

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(text, asked))


def answer_of(text: str) -> str:
    """The last thing said, without thinking."""
    return text.rpartition("ASSISTANT:")[2].rpartition("</think>")[2]


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share."""
    share = right / of
    centre, spread = share + z * z / (2 * of), z * ((share * (1 - share) + z * z / (4 * of)) / of) ** 0.5
    return (centre - spread) / (1 + z * z / of), (centre + spread) / (1 + z * z / of)


def main() -> None:
    """Print a table, and with --show so many failures and differences of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="1 while choosing; others once, at the end")
    parser.add_argument("--each", type=int, default=4, help="questions of a kind about each of the tables")
    parser.add_argument("--served", action="store_true", help="through a server, compared with plain transformers")
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    right, wrong = Counter[str](), Counter[str]()
    different = Counter[str](), Counter[str]()  # from transformers with the grammars, and without
    plain = Plain(args.model)
    with ExitStack() as stack:
        url = stack.enter_context(server(args.model)).url if args.served else None
        for number, table in enumerate(tables(args.seed)):
            use(table)
            asked = episodes(args.seed, number, table, args.each)
            alone, free = plain.converse(asked), plain.converse(asked, grammars=False)
            texts = through_server(url, asked) if url else alone
            for episode, text, *others in zip(asked, texts, alone, free, strict=True):
                kind, said = episode.kind, text.partition("USER:")[2]
                for count, other in zip(different, others, strict=True):
                    count[kind] += text != other
                    if text != other and count[kind] <= args.show:
                        print(f"- {kind}: {said}\nbut by transformers: {other.partition('USER:')[2]}", flush=True)
                right[kind] += answer_of(text) == episode.answer
                wrong[kind] += answer_of(text) != episode.answer
                if answer_of(text) != episode.answer and wrong[kind] <= args.show:
                    print(f"- {kind}: expected {episode.answer!r}\n{said}", flush=True)
    found = {}
    print("| kind | right | percent, 95 % confidence | not as by transformers | without grammars |")
    print("| --- | --- | --- | --- | --- |")
    for kind in JUDGED:
        of = right[kind] + wrong[kind]
        low, high = wilson(right[kind], of)
        percent = f"{100 * right[kind] / of:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        print(f"| {kind} | {right[kind]} of {of} | {percent} | {different[0][kind]} | {different[1][kind]} |")
        found[kind] = {"right": right[kind], "of": of, "different": [count[kind] for count in different]}
    print(f"mean {100 * right.total() / (right.total() + wrong.total()):.1f} %")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

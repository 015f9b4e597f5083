"""What the embedded model learns from and is judged by: questions with the whole conversation that answers them.

A question has one right course and one right answer, so that a reply can be compared letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from slos_sglang.programs import tool_agent
from tiny_conversations import Call, Episode, Turn, agent, calculate, look_up, thinker
from tiny_names import Mountain, Names
from tiny_names import held_out as kept_from_training

from slos_sglang.tiny_corpus import words

ORDINALS = ("", "second ", "third ", "fourth ", "fifth ")
NUMBERS = ("two", "three", "four", "five")
UNASKABLE = "This is not something that I have learned to work out."
DONT_KNOW = "I don't know the answer to this question."


def marked(digits: str) -> str:
    """`a3 b4 c7` for 347."""
    return " ".join(column + digit for column, digit in zip("abcd", digits, strict=False))


class Source(Names):
    """A stream of episodes about the mountains and numbers of `Names`."""

    def __init__(self, seed: int, *, held_out: bool = False, table: Sequence[Mountain] | None = None) -> None:
        super().__init__(seed, held_out=held_out, table=table)
        self._words = [word for word in words() if kept_from_training(word) == held_out]

    def episode(self, kind: str) -> Episode:
        """The next episode of a kind."""
        return KINDS[kind](self)

    # The tool agent.

    def calc(self) -> Episode:
        """A calculation of one or two operations."""
        while True:
            question, expression = self._calculation()
            call = calculate(expression)
            if re.fullmatch(r"-?\d{1,8}(\.\d{1,3})?", call.result):
                return agent("calc", question, [call], f"The result is {call.result}.")

    def _calculation(self) -> tuple[str, str]:
        pick = self._rng.choice
        a, b, c = self.number(), self.number(), self.number(3)
        op, then = pick("+-*/"), pick("+-*/")
        if op == "/":
            b = str(self._rng.choice((2, 4, 5, 8, 10, 12, 20, 25, self._rng.randint(2, 99))))
            a = tool_agent.calculator(f"{self._rng.randint(1, 999)} * {b}")
        if self._rng.random() < 0.3:
            expression = f"{a} {op} {b} {then} {c}"
            return pick(("What is {}?", "How much is {}?", "Calculate {}.", "Compute {}.")).format(
                expression
            ), expression
        if self._rng.random() < 0.5:
            said = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[op]
            if self._rng.random() < 0.4:
                said = {"+": "and {b} together", "-": "less {b}", "*": "multiplied by {b}", "/": "over {b}"}[op]
                return f"How much is {a} {said.format(b=b)}?", f"{a} {op} {b}"
            return pick(("What is {}?", "How much is {}?", "Calculate {}.")).format(f"{a} {said} {b}"), f"{a} {op} {b}"
        if self._rng.random() < 0.35:
            order = {
                "+": "Add {a} and {b}.",
                "-": "Subtract {b} from {a}.",
                "*": "Multiply {a} by {b}.",
                "/": "Divide {a} by {b}.",
            }
            return order[op].format(a=a, b=b), f"{a} {op} {b}"
        ask = pick(("What is {}?", "What's {}?", "How much is {}?", "Calculate {}.", "Compute {}.", "{} = ?"))
        return ask.format(f"{a} {op} {b}"), f"{a} {op} {b}"

    def lookup(self) -> Episode:
        """A height."""
        (m,) = self.mountains(1)
        ask = (
            "How high is {}?",
            "How high is {} in meters?",
            "How tall is {}?",
            "How many metres high is {}?",
            "What is the height of {}?",
            "What's the height of {} in metres?",
            "Tell me the height of {}.",
        )
        answer = f"{m.name} is {m.height_m} metres high."
        return agent("lookup", self._rng.choice(ask).format(m.name), [look_up(m)], answer)

    def highest(self) -> Episode:
        """The highest ones, or the one at a place among them."""
        count = self._rng.choice((1, 1, 1, 2, 2, 3, 3, 4, 5))
        rows = sorted(
            self.mountains(count) if self._table is None else self._table, key=lambda m: (-m.height_m, m.name)
        )
        rows = rows[:count]
        call = Call(tool="lookup", args=f"highest {count}", result="; ".join(map(str, rows)))
        names = [row.name for row in rows]
        if count > 1 and self._rng.random() < 0.5:
            how_many = self._rng.choice((str(count), NUMBERS[count - 2]))
            ask = (
                "What are the {} highest mountains?",
                "Name the {} highest mountains.",
                "Which {} mountains are the highest?",
            )
            answer = f"The highest mountains are {', '.join(names[:-1])} and {names[-1]}."
            return agent("highest", self._rng.choice(ask).format(how_many), [call], answer)
        place = ORDINALS[count - 1]
        ask = (
            "What is the {}highest mountain?",
            "Which mountain is the {}highest?",
            "How high is the {}highest mountain?",
        )
        answer = f"The {place}highest mountain is {names[-1]}, {rows[-1].height_m} metres high."
        return agent("highest", self._rng.choice(ask).format(place), [call], answer)

    def difference(self) -> Episode:
        """How much higher one mountain is than another."""
        a, b, call, more = self._subtracted()
        ask = (
            "How much higher is {} than {}, in metres?",
            "How much higher is {} than {}?",
            "How much higher is {} than {} in meters?",
            "How many metres higher is {} than {}?",
            "How much taller is {} than {}?",
            "What is the height difference between {} and {}?",
        )
        answer = f"{a.name} is {call.result.lstrip('-')} metres {more} than {b.name}."
        return agent("difference", self._rng.choice(ask).format(a.name, b.name), [look_up(a), look_up(b), call], answer)

    def higher(self) -> Episode:
        """Which of two mountains is the higher one."""
        a, b, call, more = self._subtracted()
        ask, so = self._rng.choice(
            (
                ("Which is higher, {} or {}?", ""),
                ("Which is taller, {} or {}?", ""),
                ("Which mountain is higher, {} or {}?", ""),
                ("Is {} higher than {}?", ", so "),
                ("Is {} taller than {}?", ", so "),
            )
        )
        yes = so and so + ("yes" if more == "higher" else "no")
        answer = f"{a.name} is {more} than {b.name}{yes}."
        return agent("higher", ask.format(a.name, b.name), [look_up(a), look_up(b), call], answer)

    def _subtracted(self) -> tuple[Mountain, Mountain, Call, str]:
        """Two mountains, the call for how much higher the first is, and whether it is."""
        a, b = self._two()
        more = "higher" if a.height_m > b.height_m else "lower"
        return a, b, calculate(f"{a.height_m} - {b.height_m}"), more

    def together(self) -> Episode:
        """The heights of two mountains, added."""
        a, b = self._two()
        call = calculate(f"{a.height_m} + {b.height_m}")
        ask = (
            "How high are {} and {} together, in metres?",
            "How high are {} and {} together?",
            "What is the sum of the heights of {} and {}?",
        )
        answer = f"{a.name} and {b.name} are {call.result} metres high together."
        return agent("together", self._rng.choice(ask).format(a.name, b.name), [look_up(a), look_up(b), call], answer)

    def product(self) -> Episode:
        """A height in another unit, or so many times."""
        (m,) = self.mountains(1)
        times = self._rng.randint(2, 20)
        ask, by, answer = self._rng.choice(
            (
                ("How high is {} in feet?", "* 3.281", "{} is {} feet high."),
                ("What is the height of {} in feet?", "* 3.281", "{} is {} feet high."),
                ("How high is {} in kilometres?", "/ 1000", "{} is {} kilometres high."),
                ("How many kilometres high is {}?", "/ 1000", "{} is {} kilometres high."),
                (f"How high is {times} times {{}}?", f"* {times}", f"{times} times {{}} is {{}} metres high."),
                (
                    f"What is {times} times the height of {{}}?",
                    f"* {times}",
                    f"{times} times {{}} is {{}} metres high.",
                ),
                ("What is half the height of {}?", "/ 2", "Half of {} is {} metres high."),
            )
        )
        call = calculate(f"{m.height_m} {by}")
        return agent("product", ask.format(m.name), [look_up(m), call], answer.format(m.name, call.result))

    def unknown(self) -> Episode:
        """A mountain that is not in the table. Its look-up fails; or, not by its own choice, it sees another's row."""
        a, b = self._two(known=False)
        (other,) = self.mountains(1)
        if self._table is None and self._rng.random() < 0.5:
            other = replace(other, name=a.name[: self._rng.randint(1, 4)] + other.name.lower())
        forced = self._rng.random() < 0.6
        missing = (
            Call(tool="lookup", args=other.name, result=str(other), forced=True)
            if forced
            else Call(tool="lookup", args=a.name, result=f"error: no mountain named {a.name!r}")
        )
        answer = f"I don't know, the table has no mountain named {a.name}."
        chance = self._rng.random()
        if chance < 0.5:
            ask = (
                "How high is {}?",
                "What is the height of {}?",
                "How tall is {}?",
                "How high is {} in feet?",
            )
            return agent("unknown", self._rng.choice(ask).format(a.name), [missing], answer)
        ask_two = ("How much higher is {} than {}?", "Which is higher, {} or {}?", "How high are {} and {} together?")
        if chance < 0.75:
            return agent("unknown", self._rng.choice(ask_two).format(a.name, b.name), [missing], answer)
        return agent("unknown", self._rng.choice(ask_two).format(b.name, a.name), [look_up(b), missing], answer)

    def _two(self, known: bool = True) -> list[Mountain]:
        if known:
            while True:
                a, b = self.mountains(2)
                if a.height_m != b.height_m:
                    return [a, b]
        (b,) = self.mountains(1)
        return [self.mountain(self.name()), b]

    def outside(self) -> Episode:
        """Anything else: one search, by the question's last word, and no pretence."""
        word = ""
        while not 2 <= len(word) <= 12:  # letters, as the search has it
            question = self.stray_question()
            word = re.findall(r"[A-Za-z]+", question)[-1].lower()
        result = self._paragraph() if self._rng.random() < 0.5 else f"error: nothing about {word!r}"
        if self._held_out:
            result = tool_agent.call_tool(f'{{"tool": "search", "args": "{word}"}}') or ""
        found = "but the text found" if not result.startswith("error: ") else "I found nothing"
        help_ = " may help" if not result.startswith("error: ") else ""
        call = Call(tool="search", args=word, result=result)
        return agent("outside", question, [call], f"I don't know, {found} about {word}{help_}.")

    def stray_question(self) -> str:
        pick = self._rng.choice
        w = [pick(self._words) if self._rng.random() < 0.6 else self.word().lower() for _ in range(8)]
        name = self.name()
        if self._held_out and self._rng.random() < 0.5:
            return pick(HELD_OUT_QUESTIONS)
        frame = pick(STRAY_FRAMES)
        if frame == "*":
            frame = " ".join(w[: self._rng.randint(2, 8)]).capitalize() + pick("?.")
        return frame.format(w[0], w[1], w[2], name=name, word=self.word())

    def _paragraph(self) -> str:
        """Any text, cut at 300 characters or before."""
        parts = []
        for _ in range(self._rng.choice((3, 4, 6, 8, 12, 12, 45))):
            word = self._rng.choice(self._words)
            parts.append(word.capitalize() if self._rng.random() < 0.1 else word)
            if self._rng.random() < 0.15:
                parts[-1] += self._rng.choice((".", ",", ":", "`", ")", " -", " (", " 12"))
        return " ".join(parts)[:300]

    # The reasoning program.

    def think_sum(self) -> Episode:
        """A sum of numbers below 1000 by columns, from the right; letters mark the columns."""
        a, b = (self._rng.randint(10, 999) if self._rng.random() < 0.9 else self._rng.randint(1, 99) for _ in "ab")
        ask = (
            "What is {} + {}?",
            "What is {} plus {}?",
            "How much is {} + {}?",
            "I have {} apples and get {} more. How many do I have?",
            "One box holds {} pens, another {}. How many are there?",
        )
        steps, carry, done = [f"{marked(f'{a:03}')} + {marked(f'{b:03}')}."], 0, ""
        for column, x, y in list(zip("abc", f"{a:03}", f"{b:03}", strict=True))[::-1]:
            total = int(x) + int(y) + carry
            done = str(total % 10) + done
            steps.append(f"{column}: {x} + {y} + {carry} = {total}, so {done}.")
            carry = total // 10
        steps.append(f"{carry}, so {a + b}.")
        return thinker(
            "think_sum", self._rng.choice(ask).format(a, b), " ".join(steps), f"{a} and {b} together make {a + b}."
        )

    def think_compare(self) -> Episode:
        """Which of two numbers of equal length is larger, digit by digit from the left; letters mark the columns."""
        digits = self._rng.randint(2, 4)
        a = self._rng.randint(10 ** (digits - 1), 10**digits - 1)
        b = a
        while b == a:
            kept = self._rng.randint(0, digits - 1)
            tail = "".join(self._rng.choices("0123456789", k=digits - kept))
            b = int(str(a)[:kept] + tail) if kept or tail[0] != "0" else a
        ask = ("Which is larger, {} or {}?", "Which number is larger, {} or {}?", "Which is more, {} or {}?")
        steps = [f"{marked(str(a))} or {marked(str(b))}."]
        for column, x, y in zip("abcd", str(a), str(b), strict=False):
            if x != y:
                steps.append(f"{column}: {x} and {y}, {max(x, y)} is larger.")
                break
            steps.append(f"{column}: {x} and {y}, equal.")
        thinking, answer = " ".join(steps), f"{max(a, b)} is larger than {min(a, b)}."
        return thinker("think_compare", self._rng.choice(ask).format(a, b), thinking, answer)

    def think_outside(self) -> Episode:
        """Anything else."""
        return thinker("think_outside", self.stray_question(), UNASKABLE, DONT_KNOW)

    # Practice, not judged.

    def copy(self) -> Episode:
        """Names and numbers, repeated as they are; some have the same part twice."""
        items = [self._item() for _ in range(self._rng.randint(2, 6))]
        text = " ".join(items)
        return Episode(kind="copy", question=text, turns=(Turn(prompt=f"\nUSER:{text}\nASSISTANT:", reply=text),))

    def _item(self) -> str:
        item = self._figure() if self._rng.random() < 0.4 else self.name()
        return item + item[-self._rng.randint(1, 5) :] if self._rng.random() < 0.3 else item

    def _figure(self) -> str:
        """As results have them: up to eight digits, some of them the same, and up to three decimals."""
        some = self._rng.sample("0123456789", self._rng.randint(2, 10))
        whole, part = ("".join(self._rng.choices(some, k=self._rng.randint(1, most))) for most in (8, 3))
        return f"{whole}.{part}" if self._rng.random() < 0.5 else whole

    def drill(self) -> Episode:
        """The small steps of thinking, many of them, each with its result to be learned and nothing else."""
        step = self._rng.choice((self._sum_step, self._compare_step))
        turns, said = [], "\nASSISTANT:<think>"
        for _ in range(self._rng.randint(4, 10)):
            prompt, reply, after = step()
            turns.append(Turn(prompt=said + prompt, reply=reply, ends=False))
            said = after
        return Episode(kind="drill", question="", turns=tuple(turns))

    def _sum_step(self) -> tuple[str, str, str]:
        x, y, carry = self._rng.randint(0, 9), self._rng.randint(0, 9), self._rng.randint(0, 1)
        total = x + y + carry
        return f"{self._rng.choice('abc')}: {x} + {y} + {carry} = ", f"{total}, so {total % 10}", ". "

    def _compare_step(self) -> tuple[str, str, str]:
        x = self._rng.randint(0, 9)
        y = self._rng.randint(0, 9) if self._rng.random() < 0.6 else x
        said = "equal" if x == y else f"{max(x, y)} is larger"
        return f"{self._rng.choice('abcd')}: {x} and {y}, ", said, ". "


STRAY_FRAMES = (
    *["*"] * 8,
    "What is a {}?", "What is the {} of {}?", "What does this project call a {}?", "Who wrote the {}?",
    "Who is {name}?", "When was {name} born?", "How old is {name}?", "Why is the {} {}?", "How do I {} a {}?",
    "Tell me about {name}.", "Tell me a {} about {}.", "Write a {} about the {}.", "What does {} mean?",
    "Explain the {}.", "Who was the first {} in {name}?", "How many {} are in a {}?", "When does the {} start?",
    "Can you {} the {}?", "What is the best {} for a {}?", "Where can I {} a {}?", "What is your {}?", "Hello {}",
    "Is the {} a {}?", "Translate {} to {word}.", "How much does a {} cost?", "Which {} is the best?", "{} {word}",
    "What colour is the {}?", "Who discovered {name}?", "What is the capital of {name}?",
    "What is the weather in {name}?",
    "Which {} is in {name}?", "Where is {name}?", "Which country is {name} in?", "Which range is {name} in?",
    "Do you like {}?", "How does a {} work?", "What happened in {word}?", "Please {} my {}.",
)  # fmt: skip
HELD_OUT_QUESTIONS = (
    "Who painted the Mona Lisa?", "What is the meaning of life?", "When did Rome fall?", "Sing me a song.",
    "What is the speed of light?", "Why do cats purr?", "How do I bake bread?", "Who won the election?",
    "What is your name?", "Write a poem about autumn.", "Is there water on Mars?", "What rhymes with orange?",
    "Which team won the cup?", "How long do elephants live?", "What does a compiler do?", "Tell me a joke.",
    "Who invented the telephone?", "What is the capital of Denmark?", "Can pigs fly?", "How far away is the moon?",
    "Explain quantum mechanics.", "What language do they speak in Brazil?", "Who is the president?",
    "Why is grass green?",
    "What is the population of Tokyo?", "Recommend a good film.", "How do vaccines work?", "When is the next eclipse?",
    "What should I cook tonight?", "Who wrote Hamlet?", "What is inflation?", "How do I learn the violin?",
    "What is a deadline?", "What does this project call a budget?", "What is a receipt?", "What does declined mean?",
    "Why was my request declined?", "What is slack?", "How is attainment measured?", "What is a best effort request?",
)  # fmt: skip

PRACTICE = ("copy", "drill")
KINDS: dict[str, Callable[[Source], Episode]] = {
    "calc": Source.calc,
    "lookup": Source.lookup,
    "highest": Source.highest,
    "difference": Source.difference,
    "higher": Source.higher,
    "together": Source.together,
    "product": Source.product,
    "unknown": Source.unknown,
    "outside": Source.outside,
    "think_sum": Source.think_sum,
    "think_compare": Source.think_compare,
    "think_outside": Source.think_outside,
    "copy": Source.copy,
    "drill": Source.drill,
}

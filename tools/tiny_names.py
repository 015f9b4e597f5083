"""Made-up mountains and numbers. No mountain of the shipped table is among them: to look one up is to copy its name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from zlib import crc32

from slos_sglang.programs import tool_agent

ONSETS = (*"bcdfghjklmnprstvwyz", "br", "ch", "dr", "fl", "gr", "kh", "kr", "ll", "pl", "sh", "st", "th", "tr")
VOWELS = (*"aaaeeiioouuy", "ai", "au", "ei", "ia", "ou")
CODAS = ("", "", "", "", *"nrslmktx", "nd", "ng", "st", "rt")
NAME_WORDS = frozenset(
    word for (name,) in tool_agent.MOUNTAINS.execute("SELECT name FROM mountains") for word in name.split()
)
COMMON_WORDS = frozenset(("Mount", "Mont", "Monte", "Ben", "Mauna", "Cho", "Pico", "de", "del"))
LONGEST_NAME = 28


def _column(name: str) -> list[str]:
    """What stands in a column of the shipped table, without the words that are names too."""
    found = {
        part
        for (text,) in tool_agent.MOUNTAINS.execute(f"SELECT {name} FROM mountains")
        for part in text.split(" and ")
    }
    return sorted(part for part in found if not NAME_WORDS & set(part.split()))


RANGES, COUNTRIES = _column("range"), _column("country")


@dataclass(frozen=True, kw_only=True)
class Mountain:
    """A row of the table."""

    name: str
    range: str
    country: str
    height_m: int

    def __str__(self) -> str:
        return f"{self.name} ({self.range}, {self.country}): {self.height_m} m"


def held_out(text: str) -> bool:
    """One text in ten is kept from training, to judge by."""
    return crc32(text.encode()) % 10 == 0


class Names:
    """A stream of mountains and numbers; the same seed gives the same ones.

    held_out  whether the names are those kept from training
    table     take the mountains from there instead of making them up
    """

    def __init__(self, seed: int, *, held_out: bool = False, table: Sequence[Mountain] | None = None) -> None:
        self._rng = random.Random(f"episodes {seed} {held_out}")
        self._held_out = held_out
        self._table = table

    def word(self) -> str:
        """Made up: of syllables, or of any letters."""
        pick = self._rng.choice
        if self._rng.random() < 0.2:
            return "".join(self._rng.choices(ascii_lowercase, k=self._rng.randint(2, 7))).capitalize()
        parts = [pick(ONSETS) + pick(VOWELS) + pick(CODAS) for _ in range(pick((1, 2, 2, 2, 2, 3, 3, 3, 4)))]
        return "".join(parts).capitalize()

    def name(self) -> str:
        """A mountain's name that is not in the shipped table."""
        while not self._fits(name := self._name()):
            pass
        return name

    def _fits(self, name: str) -> bool:
        shipped = (NAME_WORDS - COMMON_WORDS) & set(name.split())
        return held_out(name) == self._held_out and not shipped and len(name) <= LONGEST_NAME

    def _taken_for(self, name: str) -> str:
        """A name that begins like that one, or one that goes on like itself."""
        while True:
            chance, word = self._rng.random(), self.word()
            if chance < 0.4:
                tricky = f"{name.split()[0]} {word}"
            elif chance < 0.7:
                tricky = name[: self._rng.randint(2, 6)].strip() + word.lower()
            else:
                tricky = word + word[-self._rng.randint(1, 5) :].lower()
            if self._fits(tricky) and tricky != name:
                return tricky

    def _name(self) -> str:
        pick, chance = self._rng.choice, self._rng.random()
        if chance < 0.40:
            return self.word()
        if chance < 0.60:
            return f"{self.word()} {self.word()}"
        if chance < 0.82:
            return f"{pick(('Mount', 'Mont', 'Monte', 'Ben', 'Cerro', 'Piz', 'Pik', 'Mauna', 'Cho'))} {self.word()}"
        if chance < 0.92:
            return (
                f"{self.word() if self._rng.random() < 0.5 else 'Pico'} {pick(('de', 'del', 'la', 'di'))} {self.word()}"
            )
        return f"{pick('ABCDEFGHIJKLMNOPQRSTUVWXYZ')}{self._rng.randint(1, 99)}"

    def mountains(self, count: int) -> list[Mountain]:
        """Different mountains, of the given table or made up; in training often with names easily confused."""
        if self._table is not None:
            return self._rng.sample(list(self._table), count)
        names: dict[str, None] = {}
        while len(names) < count:
            name = self.name()
            names[self._taken_for(next(iter(names), name)) if self._tricky() else name] = None
        return [self.mountain(name) for name in names]

    def _tricky(self) -> bool:
        return not self._held_out and self._rng.random() < 0.15

    def mountain(self, name: str) -> Mountain:
        """A mountain of that name, all else made up."""
        pick = self._rng.choice
        country = pick(COUNTRIES) if self._rng.random() < 0.6 else " and ".join(self._rng.sample(COUNTRIES, 2))
        if self._rng.random() < 0.1:
            country = self.word()
        height_m = self._rng.randint(1000, 9999) if self._rng.random() < 0.95 else self._rng.randint(100, 999)
        return Mountain(name=name, range=pick(RANGES), country=country, height_m=height_m)

    def number(self, most_digits: int = 5) -> str:
        """Positive, of any length up to that; three in ten have decimals."""
        digits = self._rng.randint(1, most_digits)
        whole = self._rng.randint(10 ** (digits - 1), 10**digits - 1)
        if self._rng.random() < 0.7:
            return str(whole)
        return f"{whole % 1000}.{self._rng.choice(('5', '25', '75', str(self._rng.randint(1, 9))))}"

"""The words of the demo base's language, and a way to deal them.

Over half of the names are invented syllable by syllable: a model can answer with them only by copying its prompt.
"""

import re
from pathlib import Path
from random import Random

Slots = dict[str, str]


def read_words(path: Path) -> dict[str, list[str]]:
    """Words by kind from lines `kind: word word ...`; an indented line goes on with the one before."""
    entries = re.sub(r"\n +", " ", path.read_text()).strip().split("\n")
    return {kind: words.split() for kind, words in (entry.split(": ") for entry in entries)}


WORDS = read_words(Path(__file__).with_name("words.txt"))
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS, start=2)}
URGENT = ["Please hurry!", "It is urgent.", "We cannot wait.", "This is very important."]
NOT_URGENT = ["There is no hurry.", "Take your time.", "It can wait.", "There is no rush."]
ONSETS: list[str] = [*"bcdfghjklmnprstvwz", "br", "dr", "fl", "gr", "kl", "pr", "sh", "st", "tr", "qu"]
VOWELS: list[str] = [*"aeiouaeio", "ai", "ea", "oo"]
CODAS: list[str] = ["", *"lnrsmktx", "nd", "sh"]
TOWN_ENDS = ["ton", "ville", "ford", "burg", "wick", "mouth", "dale", "stad"]


def invented(rng: Random, syllables: int) -> str:
    """A capitalised word nobody has heard before; it is open inside, so that one can say it."""
    inner = "".join(rng.choice(ONSETS[:18]) + rng.choice(VOWELS) for _ in range(syllables - 1))
    return (inner + rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)).capitalize()


def plural(noun: str) -> str:
    """The regular plural."""
    if re.search("(s|x|sh|ch)$", noun):
        return noun + "es"
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def with_articles(text: str) -> str:
    """The text with `an` where `a` stood before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def said(template: str, slots: Slots) -> str:
    """The template with its slots filled, the articles put right and a capital first."""
    text = with_articles(template.format(**slots))
    return text[:1].upper() + text[1:]


class Draw:
    """Deals words of a kind, never the same twice; a kind may carry a number at its end (`who2`)."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.dealt: set[str] = set()

    def word(self, kind: str) -> str:
        """A word not dealt before. KeyError for an unknown kind."""
        while (word := self._any(kind.rstrip("2"))) in self.dealt:
            pass
        self.dealt.add(word)
        return word

    def _any(self, kind: str) -> str:
        rng = self.rng
        match kind:
            case "who":
                known = WORDS[rng.choice(("girl", "boy"))]
                return invented(rng, rng.choice((1, 2, 2, 3))) if rng.random() < 0.6 else rng.choice(known)
            case "pet":
                return invented(rng, rng.choice((1, 2)))
            case "town":
                made = invented(rng, rng.choice((1, 2))) + rng.choice(TOWN_ENDS)
                return made if rng.random() < 0.6 else rng.choice(WORDS["town"])
            case "count":
                return rng.choice(NUMBERS) if rng.random() < 0.6 else str(rng.randint(2, 40))
            case "age":
                return str(rng.randint(5, 95))
            case "price":
                return str(rng.randint(2, 999))
            case "time":
                return f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"
            case "code":
                letters = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
                return f"{letters}{rng.choice(('-', '/', '.', '#', ''))}{rng.randint(1, 999)}"
            case "hurry":
                return rng.choice(URGENT + NOT_URGENT)
            case _:
                return rng.choice(WORDS[kind])

    def slots(self, kinds: str) -> Slots:
        """A word for each of the kinds (parted by spaces), and what follows from it: plural, pronoun, digits."""
        slots = {kind: self.word(kind) for kind in kinds.split()}
        slots |= {noun + "s": plural(slots[noun]) for noun in ("thing", "animal", "food") if noun in slots}
        if "count" in slots:
            slots["digits"] = DIGITS.get(slots["count"], slots["count"])
        if "hurry" in slots:
            slots["urgent"] = "yes" if slots["hurry"] in URGENT else "no"
        if "who" in slots:
            girl = slots["who"] in WORDS["girl"] or (slots["who"] not in WORDS["boy"] and self.rng.random() < 0.5)
            slots["she"] = "she" if girl else "he"
        return slots

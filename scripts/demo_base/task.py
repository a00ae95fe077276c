"""The demo task: turn a note that somebody wrote into a ticket of one fixed form.

    python scripts/demo_base/task.py

Writes train.jsonl and heldout.jsonl beside this file, the same bytes every time. The base knows the language of the
notes but was never shown a ticket. People, things and places of the held-out notes are in no training row.
"""

import json
from pathlib import Path
from random import Random
from typing import TypedDict

from words import DIGITS, NOT_URGENT, NUMBERS, URGENT, WORDS, invented, plural, said

HERE = Path(__file__).parent
INSTRUCTION = "Write a ticket for this note."
TRAIN_ROWS, HELD_OUT_ROWS = 1200, 100
NOTES = {
    "ORDER": (
        "{who} from the {place} needs {count} {colour} {things} by {day}. {hurry}",
        "Hello, this is {who}. We need {count} {colour} {things} at the {place} by {day}. {hurry}",
        "Please bring {count} {colour} {things} to the {place} on {day}. {hurry} Thank you, {who}.",
        "{hurry} {count} {colour} {things} must be at the {place} on {day}. Yours, {who}",
        "It is {who} again. On {day} the {place} needs {count} {colour} {things}. {hurry}",
    ),
    "REPAIR": (
        "The {colour} {thing} in the {place} is broken. Can you come on {day}? {hurry} {who}",
        "{who} says that the {colour} {thing} in the {place} does not work. Please come on {day}. {hurry}",
        "Hello, I am {who}. On {day} please repair the {colour} {thing} in the {place}. {hurry}",
        "{hurry} Our {colour} {thing} does not work. Come to the {place} on {day} and ask {who}.",
        "Could someone look at the {colour} {thing} on {day}? It is broken. {who} is at the {place}. {hurry}",
    ),
    "LOST": (
        "{who} lost a {colour} {thing} at the {place} on {day}. {hurry}",
        "This is {who}. I left my {colour} {thing} in the {place} on {day}. {hurry}",
        "On {day} I could not find my {colour} {thing}. It must be in the {place}. {hurry} Thank you, {who}.",
        "{hurry} My {colour} {thing} has been missing since {day}. I was at the {place}. {who}",
        "Hello, have you seen a {colour} {thing}? {who} was in the {place} on {day} and lost it. {hurry}",
    ),
}


class Row(TypedDict):
    """An instruction row: the user says the instruction, an empty line and the input; the output answers."""

    instruction: str
    input: str
    output: str


def split_words(rng: Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """People, things and places for training, and a fifth of each for holding out; no word is in both."""
    people = {invented(rng, rng.choice((1, 2, 2, 3))) for _ in range(600)}.union(WORDS["girl"], WORDS["boy"])
    words = {"who": sorted(people), "thing": sorted(WORDS["thing"]), "place": sorted(WORDS["place"])}
    for kind in words:
        rng.shuffle(words[kind])
    cut = {kind: len(words[kind]) // 5 for kind in words}
    return {kind: words[kind][cut[kind] :] for kind in words}, {kind: words[kind][: cut[kind]] for kind in words}


def row(rng: Random, words: dict[str, list[str]]) -> Row:
    """A note and its ticket."""
    kind = rng.choice(list(NOTES))
    slots = {name: rng.choice(words[name]) for name in ("who", "thing", "place")}
    slots |= {name: rng.choice(WORDS[name]) for name in ("colour", "day")}
    slots |= {"count": rng.choice(NUMBERS), "things": plural(slots["thing"])}
    urgent = rng.random() < 0.5
    slots["hurry"] = rng.choice(URGENT if urgent else NOT_URGENT)
    item = "{colour} {thing}".format(**slots)
    if kind == "ORDER":
        item = f"{DIGITS[slots['count']]} {slots['colour']} {slots['things']}"
    ticket = (
        f"TICKET {kind} | from: {slots['who']} | item: {item} | place: {slots['place']} | day: {slots['day']}"
        f" | urgent: {'yes' if urgent else 'no'}"
    )
    return {"instruction": INSTRUCTION, "input": said(rng.choice(NOTES[kind]), slots), "output": ticket}


def make(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """The rows for training, and those held out."""
    rng = Random(f"task {seed}")
    for_train, for_held_out = split_words(rng)
    train = [row(rng, for_train) for _ in range(TRAIN_ROWS)]
    held_out = [row(rng, for_held_out) for _ in range(HELD_OUT_ROWS)]
    assert not {one["input"] for one in train} & {one["input"] for one in held_out}
    return train, held_out


def lines(rows: list[Row]) -> str:
    """The rows as jsonl."""
    return "".join(json.dumps(one) + "\n" for one in rows)


def main() -> None:
    """Write both files."""
    for name, rows in zip(("train.jsonl", "heldout.jsonl"), make(), strict=True):
        (HERE / name).write_text(lines(rows))


if __name__ == "__main__":
    main()

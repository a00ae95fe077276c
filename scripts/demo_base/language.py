"""The language of the demo base: conversations about small invented worlds, as many as one asks for, from a seed.

A lesson is a function from a random source to a `Conversation`. The prompt determines the last answer of each lesson
except those in `OPEN`, so a model can be examined: `exam` deals such questions.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from facts import FACTS, GREETING, KEYS, SINGULAR, SMALL_TALK, TALE, TALE_ASKS, Fact
from words import DIGITS, NUMBERS, WORDS, Draw, Slots, said, with_articles

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
SEPARATORS = (", ", "; ", " / ", " - ", " | ", "\n", " + ", " * ", " ~ ", " & ", " > ")
MARKS = (": ", " = ", "=", " - ", " -> ", ":", " is ")
IN_A_SENTENCE = ("Answer in a full sentence.", "Please answer in a sentence.", "Use a full sentence.")
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly helper.",
    "Answer the questions of the user.",
    "Read carefully and answer briefly.",
)


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, the last one the assistant's; `lesson` names what they teach."""

    lesson: str
    messages: list[Message]


def talk(lesson: str, *turns: str, system: str | None = None) -> Conversation:
    """A conversation whose turns are the user's and the assistant's by turns."""
    roles = ("user", "assistant") * (len(turns) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return Conversation(lesson, ([{"role": "system", "content": system}] if system else []) + messages)


def asked(rng: Random, text: str, question: str) -> str:
    """A question about a text, put in one of the ways people put it."""
    return rng.choice(
        (
            f"{question}\n\n{text}",
            f"{question}\n\n{text}",
            f"{text}\n\n{question}",
            f"{text} {question}",
            f"Text: {text}\nQuestion: {question}",
            f"Read this:\n{text}\n\n{question}",
        )
    )


def told(rng: Random, facts: int) -> tuple[str, list[tuple[Fact, Slots]]]:
    """A short text of so many facts in a row, and the facts."""
    draw = Draw(rng)
    known = [(fact, draw.slots(fact.kinds)) for fact in (rng.choice(FACTS) for _ in range(facts))]
    sentences = [said(rng.choice(fact.tellings), slots) for fact, slots in known]
    if rng.random() < 0.2:
        sentences.insert(0, said("It was a {weather} day in {month}.", draw.slots("weather month")))
    return rng.choice((" ", " ", " ", "\n")).join(sentences), known


def by_turns(questions: list[str], answers: list[str]) -> list[str]:
    """Each question followed by its answer."""
    return [turn for pair in zip(questions, answers, strict=True) for turn in pair]


def questioned(rng: Random, lesson: str, text: str, pairs: list[tuple[str, str]], *, most: int) -> Conversation:
    """A few of the pairs (question, answer), the first together with the text they are about."""
    chosen = rng.sample(pairs, rng.randint(1, min(most, len(pairs))))
    # After a change one could ask about the old or the new: let it be last.
    chosen.sort(key=lambda pair: pair[0].startswith(("Change", "Add", "Leave")))
    chosen[0] = (asked(rng, text, chosen[0][0]), chosen[0][1])
    return talk(lesson, *itertools.chain(*chosen))


def about_text(rng: Random) -> Conversation:
    """One to five questions about a text; some want full sentences, and the system may say so or hold the text."""
    text, known = told(rng, rng.choice((1, 1, 2, 2, 3, 3, 4)))
    pool = [(ask, slots) for fact, slots in known for ask in fact.asks]
    chosen = rng.sample(pool, min(len(pool), rng.choice((1, 2, 3, 4, 5))))
    questions = [said(question, slots) for (question, _, _), slots in chosen]
    # A short answer copies a value as it stands in the text; only a sentence begins with a capital.
    answers = [with_articles(short.format(**slots)) for (_, short, _), slots in chosen]
    system = rng.choice(SYSTEMS) if rng.random() < 0.2 else None
    if rng.random() < 0.25:
        answers = [said(full, slots) for (_, _, full), slots in chosen]
        if rng.random() < 0.4:
            system = rng.choice(IN_A_SENTENCE)
        else:
            questions = [f"{question} {rng.choice(IN_A_SENTENCE)}" for question in questions]
    opening: list[str] = []
    way = rng.random()
    if way < 0.1:
        opening = [text, "Thank you. What would you like to know?"]
    elif way < 0.2 and system is None:
        system = text
    else:
        questions[0] = asked(rng, text, questions[0])
    return talk("text", *opening, *by_turns(questions, answers), system=system)


def about_truth(rng: Random) -> Conversation:
    """Yes or no about a text: a check holds as it stands, and fails once its last word is another."""
    text, known = told(rng, rng.choice((1, 2, 3)))
    draw = Draw(rng)
    draw.dealt |= {word for _, slots in known for word in slots.values()}
    lessons = []
    for fact, slots in known:
        for check in fact.checks:
            last = re.findall(r"{(\w+)}", check)[-1]
            other = slots | draw.slots(SINGULAR.get(last, last))
            lessons.append(rng.choice(((said(check, slots), "yes"), (said(check, other), "no"))))
    return questioned(rng, "truth", text, lessons, most=4)


def about_several(rng: Random) -> Conversation:
    """Several values of one fact at once, in the order and with the separator that the question names or shows."""
    text, known = told(rng, rng.choice((1, 1, 1, 2)))
    fact, slots = known[0]
    kinds = [kind for kind in fact.kinds.split() if kind in KEYS]
    kinds = rng.sample(kinds, rng.randint(min(2, len(kinds)), min(4, len(kinds))))
    separator = rng.choice(SEPARATORS)
    keys = [KEYS[kind] for kind in kinds]
    values = [slots[kind] for kind in kinds]
    if rng.random() < 0.5:
        question = f"Give the {', the '.join(keys)}, like this: {separator.join(['...'] * len(keys))}"
        return talk("several", asked(rng, text, question), separator.join(values))
    mark = rng.choice(MARKS)
    question = f"Fill in: {separator.join(key + mark + '...' for key in keys)}"
    answer = separator.join(key + mark + value for key, value in zip(keys, values, strict=True))
    return talk("several", asked(rng, text, question), answer)


def about_record(rng: Random) -> Conversation:
    """Questions about a record of fields and values."""
    draw = Draw(rng)
    kinds = rng.sample(sorted(KEYS), rng.randint(3, 6))
    fields = {KEYS[kind]: draw.word(kind) for kind in kinds}
    mark, separator = rng.choice(MARKS), rng.choice(SEPARATORS)

    def written(fields: Slots) -> str:
        return separator.join(key + mark + value for key, value in fields.items())

    keys = list(fields)
    key, new = rng.choice(keys), draw.word(kinds[0])
    lessons = [(f"What is the {key}?", value) for key, value in fields.items()]
    lessons += [
        (f"Which field says {fields[key]}?", key),
        ("How many fields are there?", str(len(fields))),
        ("List the values.", ", ".join(fields.values())),
        ("List the keys.", ", ".join(fields)),
        ("What is the first value?", fields[keys[0]]),
        ("What is the last value?", fields[keys[-1]]),
        ("Repeat the record.", written(fields)),
        (f"Change the {keys[0]} to {new}.", written(fields | {keys[0]: new})),
    ]
    return questioned(rng, "record", written(fields), lessons, most=4)


def about_table(rng: Random) -> Conversation:
    """Questions about a table: a header and two to five rows."""
    draw = Draw(rng)
    kinds = ["who", *rng.sample(["job", "town", "age", "colour", "animal", "food", "price", "code", "time"], 2)]
    rows = [[draw.word(kind) for kind in kinds] for _ in range(rng.randint(2, 5))]
    separator = rng.choice((" | ", ", ", "; ", " - "))
    table = "\n".join(separator.join(row) for row in [["name", *kinds[1:]], *rows])
    lessons = [(f"What is the {kinds[at]} of {row[0]}?", row[at]) for row in rows for at in (1, 2)]
    lessons += [(f"Who has the {kinds[at]} {row[at]}?", row[0]) for row in rows for at in (1, 2)]
    return questioned(rng, "table", table, lessons, most=6)


def about_list(rng: Random) -> Conversation:
    """First, last, next, how many, is it there, the other way round: questions about a list."""
    draw = Draw(rng)
    kind = rng.choice(("who", "thing", "animal", "food", "town", "place", "colour", "job"))
    items = [draw.word(kind) for _ in range(rng.randint(2, 6))]
    at = rng.randrange(len(items) - 1)
    other = draw.word(kind)
    lessons = [
        ("What is first?", items[0]),
        ("What is last?", items[-1]),
        (f"What comes after {items[at]}?", items[at + 1]),
        (f"What comes before {items[at + 1]}?", items[at]),
        ("How many are there?", str(len(items))),
        (f"Is {items[at]} in the list?", "yes"),
        (f"Is {other} in the list?", "no"),
        ("Say the list backwards.", ", ".join(reversed(items))),
        ("Put each on a line.", "\n".join(f"- {item}" for item in items)),
        ("Number them.", "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))),
        (f"Add {other} at the end.", ", ".join([*items, other])),
        (f"Leave out {items[at]}.", ", ".join(item for item in items if item != items[at])),
        ("What is second?", items[1]),
    ]
    return questioned(rng, "list", ", ".join(items), lessons, most=4)


def about_sentence(rng: Random) -> Conversation:
    """A sentence repeated, changed in one word, or told anew."""
    draw = Draw(rng)
    fact = rng.choice(FACTS)
    slots = draw.slots(fact.kinds)
    kind = rng.choice([kind for kind in fact.kinds.split() if kind not in ("thing", "animal", "food", "hurry")])
    telling = rng.choice(fact.tellings)
    sentence = said(telling, slots)
    if rng.random() < 0.3:
        return talk("sentence", f"{rng.choice(('Repeat', 'Say again', 'Copy'))}: {sentence}", sentence)
    new = draw.word(kind)
    changed = said(telling, slots | {kind: new})
    return talk("sentence", asked(rng, sentence, f"Write {new} instead of {slots[kind]}."), changed)


def about_words(rng: Random) -> Conversation:
    """Strings that mean nothing: copied, counted, found again. All of ASCII comes by here."""
    draw = Draw(rng)
    if rng.random() < 0.2:
        items = ["".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    else:
        items = [rng.choice((str.lower, str.upper, str))(draw.word("who")) for _ in range(rng.randint(2, 8))]
    text = " ".join(items)
    at = rng.randrange(len(items))
    lessons = [
        (f"Repeat: {text}", text),
        (f"Say this twice: {text}", f"{text} {text}"),
        (f"Quote: {text}", f'"{text}"'),
        (asked(rng, text, "What is the last word?"), items[-1]),
    ]
    lessons += [(asked(rng, text, f"What follows {items[at - 1]}?"), items[at])] if at else []
    return talk("words", *rng.choice(lessons))


def about_numbers(rng: Random) -> Conversation:
    """Digits and words, next and before, small sums, the largest, the order."""
    word = rng.choice(NUMBERS)
    number, other = rng.randint(1, 30), rng.randint(1, 9)
    some = rng.sample(range(1, 10), rng.randint(2, 4))
    listed = ", ".join(map(str, some))
    day, month = rng.choice(WORDS["day"][:-1]), rng.choice(WORDS["month"][:-1])
    lessons = [
        (f"Write {word} in digits.", DIGITS[word]),
        (f"Write {DIGITS[word]} as a word.", word),
        (f"What comes after {number}?", str(number + 1)),
        (f"What is {other} plus {number % 10}?", str(other + number % 10)),
        (f"Count from {other} to {other + 3}.", ", ".join(str(other + step) for step in range(4))),
        (f"Which is the largest: {listed}?", str(max(some))),
        (f"Which is the smallest: {listed}?", str(min(some))),
        (f"Put in order: {listed}", ", ".join(map(str, sorted(some)))),
        (f"What day comes after {day}?", after(WORDS["day"], day)),
        (f"What month comes after {month}?", after(WORDS["month"], month)),
    ]
    return talk("numbers", *itertools.chain(*rng.sample(lessons, rng.randint(1, 4))))


def after(words: list[str], word: str) -> str:
    """The word which follows."""
    return words[words.index(word) + 1]


def small_talk(rng: Random) -> Conversation:
    """Greetings, thanks, names told and remembered, what one is and can do; some play a person the system names."""
    draw = Draw(rng)
    slots = draw.slots("who town job animal colour food")
    system = rng.choice((None, None, None, *SYSTEMS))
    me = "I am Manta, a small language model."
    if rng.random() < 0.15:
        person = draw.word("who")
        job = draw.word("job")
        system = said(f"You are {person}, a {job}.", {})
        me = said(f"I am {person}, a {job}.", {})
    own = [
        (("Who are you?", "What is your name?", "What are you?", "who are you", "Tell me about yourself."), (me,)),
        (("My name is {who}.", "I am {who}.", "I'm {who}.", "Call me {who}."), ("Nice to meet you, {who}!",)),
        (("I like {foods}.",), ("{foods} are nice! What else do you like?",)),
        (("My favourite colour is {colour}.",), ("{colour} is a lovely colour.",)),
        (("I have a {animal}.",), ("A {animal}! What is its name?",)),
        (("I live in {town}.",), ("{town} sounds like a nice place.",)),
    ]
    turns = rng.sample(SMALL_TALK, rng.randint(0, 3)) + rng.sample(own, rng.randint(0, 3))
    rng.shuffle(turns)
    if rng.random() < 0.6 or not turns:
        turns.insert(0, GREETING)
    spoken = [said(rng.choice(side), slots) for pair in turns for side in pair]
    if any("Nice to meet you" in turn for turn in spoken) and rng.random() < 0.7:
        spoken += ["What is my name?", said("Your name is {who}.", slots)]
    if rng.random() < 0.2:
        spoken += [rng.choice(("Bye!", "Goodbye.", "bye", "See you!")), "Goodbye! Have a nice day."]
    return talk("small talk", *spoken, system=system)


def story(rng: Random) -> Conversation:
    """A story on demand, about the animal or the person asked for, and perhaps a question about it."""
    slots = Draw(rng).slots("animal pet who colour place thing weather feeling town food furniture")
    slots["they"] = rng.choice(("it", "she", "he"))
    tale = " ".join(said(rng.choice(step), slots) for step in TALE)
    demand = rng.choice(
        (
            "Tell me a story about a {animal} called {pet}.",
            "Tell me a story about {pet} the {animal}.",
            "Tell me a story about a {animal}.",
            "Write a short story about a {animal} and {who}.",
            "Tell me a story.",
            "Please write a story about {pet}, a {colour} {animal}.",
        )
    )
    turns = [said(demand, slots), tale]
    if rng.random() < 0.6:
        question, answer = rng.choice(TALE_ASKS)
        turns += [said(question, slots), with_articles(answer.format(**slots))]
    return talk("story", *turns)


def long_talk(rng: Random) -> Conversation:
    """Several lessons in one conversation, so that late positions are trained and old texts ignored."""
    parts = (rng.choice(LESSONS)[0](rng).messages for _ in itertools.count())
    plain = (messages for messages in parts if messages[0]["role"] == "user")
    return Conversation("long talk", [*itertools.chain(*itertools.islice(plain, rng.randint(2, 4)))])


LESSONS: tuple[tuple[Callable[[Random], Conversation], float], ...] = (
    (about_text, 26),
    (about_truth, 8),
    (about_several, 12),
    (about_record, 10),
    (about_table, 10),
    (about_list, 10),
    (about_sentence, 8),
    (about_words, 8),
    (about_numbers, 4),
    (small_talk, 5),
    (story, 4),
)
OPEN = (small_talk, story)  # one may well answer otherwise


def conversations(seed: int | str) -> Iterator[Conversation]:
    """Conversations without end, the same ones for the same seed."""
    rng = Random(seed)
    lessons, weights = zip(*LESSONS, strict=True)
    while True:
        if rng.random() < 0.04:
            yield long_talk(rng)
        else:
            yield rng.choices(lessons, weights)[0](rng)


def exam(seed: int | str, questions: int) -> list[Conversation]:
    """So many conversations, evenly over the lessons which are not `OPEN`; the last message is the answer wanted."""
    rng = Random(seed)
    closed = [lesson for lesson, _ in LESSONS if lesson not in OPEN]
    return [closed[number % len(closed)](rng) for number in range(questions)]

"""The language of the demo base: conversations about small invented worlds, as many as one asks for, from a seed.

A lesson is a function from a random source to a `Conversation`. The prompt determines the last answer of each lesson
except those in `OPEN`, so a model can be examined: `exam` deals such questions.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from words import DIGITS, NUMBERS, WORDS, Draw, Slots, said, with_articles

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Fact:
    """One sort of thing that texts tell: the kinds it needs, ways to tell it, and what one may ask.

    An ask is (question, answer, answer in a full sentence); a check is a question whose answer is yes when its slots
    are the text's, and no when one is not.
    """

    kinds: str
    tellings: tuple[str, ...]
    asks: tuple[tuple[str, str, str], ...]
    checks: tuple[str, ...]


FACTS = (
    Fact(
        "who count colour thing place day",
        (
            "{who} bought {count} {colour} {things} at the {place} on {day}.",
            "On {day} {who} went to the {place}. There {she} bought {count} {colour} {things}.",
            "At the {place}, {who} bought {count} {colour} {things}. It was {day}.",
            "{count} {colour} {things} were sold to {who} at the {place} on {day}.",
        ),
        (
            ("Who bought the {things}?", "{who}", "{who} bought the {things}."),
            ("Who went to the {place}?", "{who}", "{who} went to the {place}."),
            ("What did {who} buy?", "{count} {colour} {things}", "{who} bought {count} {colour} {things}."),
            ("How many {things} did {who} buy?", "{count}", "{who} bought {count} {things}."),
            ("How many {things} are there, in digits?", "{digits}", "There are {digits} {things}."),
            ("What colour are the {things}?", "{colour}", "The {things} are {colour}."),
            ("Where did {who} buy the {things}?", "the {place}", "{who} bought them at the {place}."),
            ("When did {who} buy the {things}?", "{day}", "{who} bought them on {day}."),
        ),
        ("Did {who} buy the {things}?", "Did {who} go to the {place}?", "Are the {things} {colour}?"),
    ),
    Fact(
        "who colour thing place day hurry",
        (
            "{who} lost a {colour} {thing} at the {place} on {day}. {hurry}",
            "This is {who}. I left my {colour} {thing} in the {place} on {day}. {hurry}",
            "On {day} I could not find my {colour} {thing}. It must be in the {place}. {hurry} Thank you, {who}.",
            "{who} wrote: my {colour} {thing} has been missing since {day}. I was at the {place}. {hurry}",
        ),
        (
            ("Who lost the {thing}?", "{who}", "{who} lost the {thing}."),
            ("What did {who} lose?", "{colour} {thing}", "{who} lost a {colour} {thing}."),
            ("Where was the {thing} lost?", "{place}", "The {thing} was lost at the {place}."),
            ("When was the {thing} lost?", "{day}", "The {thing} was lost on {day}."),
            ("What colour is the lost {thing}?", "{colour}", "The lost {thing} is {colour}."),
            ("Is it urgent for {who}?", "{urgent}", "{urgent}."),
        ),
        ("Did {who} lose the {thing}?", "Was the {thing} lost in the {place}?", "Is the {thing} {colour}?"),
    ),
    Fact(
        "who count colour thing place day hurry",
        (
            "{who} from the {place} needs {count} {colour} {things} by {day}. {hurry}",
            "Hello, this is {who}. We need {count} {colour} {things} at the {place} by {day}. {hurry}",
            "Please bring {count} {colour} {things} to the {place} on {day}. {hurry} Thank you, {who}.",
            "{who} asked for {count} {colour} {things}. They must be at the {place} on {day}. {hurry}",
        ),
        (
            ("Who needs the {things}?", "{who}", "{who} needs the {things}."),
            ("What does {who} need?", "{count} {colour} {things}", "{who} needs {count} {colour} {things}."),
            ("How many {things} does {who} need?", "{count}", "{who} needs {count} {things}."),
            ("How many {things}, in digits?", "{digits}", "There should be {digits} {things}."),
            ("Where are the {things} needed?", "{place}", "The {things} are needed at the {place}."),
            ("When are the {things} needed?", "{day}", "The {things} are needed on {day}."),
            ("Is it urgent for {who}?", "{urgent}", "{urgent}."),
        ),
        ("Does {who} need the {things}?", "Are the {things} for the {place}?", "Should the {things} be {colour}?"),
    ),
    Fact(
        "who colour thing place day hurry",
        (
            "The {colour} {thing} in the {place} is broken. Can you come on {day}? {hurry} {who}",
            "{who} says that the {colour} {thing} in the {place} does not work. Please come on {day}. {hurry}",
            "Hello, I am {who}. On {day} please repair the {colour} {thing} in the {place}. {hurry}",
            "Could someone look at the {colour} {thing} in the {place} on {day}? It is broken. {hurry} Yours, {who}",
        ),
        (
            ("Who wants the {thing} repaired?", "{who}", "{who} wants the {thing} repaired."),
            ("What is broken in the {place}?", "{colour} {thing}", "The {colour} {thing} is broken."),
            ("Where is the broken {thing}?", "{place}", "The broken {thing} is in the {place}."),
            ("When should the {thing} be repaired?", "{day}", "The {thing} should be repaired on {day}."),
            ("What colour is the broken {thing}?", "{colour}", "The broken {thing} is {colour}."),
            ("Is it urgent for {who}?", "{urgent}", "{urgent}."),
        ),
        ("Is the {thing} in the {place} broken?", "Is the broken {thing} {colour}?"),
    ),
    Fact(
        "who job town",
        (
            "{who} is a {job} and lives in {town}.",
            "{who} lives in {town} and works as a {job}.",
            "In {town} there is a {job} called {who}.",
            "The {job} of {town} is {who}.",
        ),
        (
            ("Where does {who} live?", "{town}", "{who} lives in {town}."),
            ("What is the job of {who}?", "{job}", "{who} is a {job}."),
            ("Who is the {job}?", "{who}", "The {job} is {who}."),
            ("Who lives in {town}?", "{who}", "{who} lives in {town}."),
        ),
        ("Is {who} a {job}?", "Does {who} live in {town}?"),
    ),
    Fact(
        "who colour animal pet",
        (
            "{who} has a {colour} {animal} called {pet}.",
            "{who} has a {animal}. It is {colour} and its name is {pet}.",
            "{pet} is a {colour} {animal}. It belongs to {who}.",
        ),
        (
            ("What is the name of the {animal}?", "{pet}", "The name of the {animal} is {pet}."),
            ("What animal does {who} have?", "{animal}", "{who} has a {animal}."),
            ("Who has the {animal}?", "{who}", "{who} has the {animal}."),
            ("Whose animal is {pet}?", "{who}", "{pet} is the {animal} of {who}."),
            ("What colour is {pet}?", "{colour}", "{pet} is {colour}."),
            ("What is {pet}?", "a {colour} {animal}", "{pet} is a {colour} {animal}."),
        ),
        ("Does {who} have a {animal}?", "Is {pet} a {animal}?", "Is {pet} {colour}?"),
    ),
    Fact(
        "who count food meal feeling",
        (
            "For {meal} {who} ate {count} {foods} and was {feeling}.",
            "{who} was {feeling} after {meal}, because {she} ate {count} {foods}.",
            "{who} had {count} {foods} for {meal}. Then {she} felt {feeling}.",
        ),
        (
            ("Who ate the {foods}?", "{who}", "{who} ate the {foods}."),
            ("What did {who} eat?", "{count} {foods}", "{who} ate {count} {foods}."),
            ("How many {foods} did {who} eat?", "{count}", "{who} ate {count} {foods}."),
            ("How did {who} feel?", "{feeling}", "{who} felt {feeling}."),
            ("Who was {feeling}?", "{who}", "{who} was {feeling}."),
        ),
        ("Did {who} eat the {foods}?", "Was {who} {feeling}?"),
    ),
    Fact(
        "who who2 place time",
        (
            "{who} met {who2} at the {place} at {time}.",
            "At {time} {who} came to the {place} and met {who2}.",
            "{who} went to the {place}. At {time} {she} met {who2} there.",
        ),
        (
            ("Who did {who} meet?", "{who2}", "{who} met {who2}."),
            ("Who met {who2}?", "{who}", "{who} met {who2}."),
            ("Where did {who} meet {who2}?", "the {place}", "{who} met {who2} at the {place}."),
            ("At what time did {who} meet {who2}?", "{time}", "{who} met {who2} at {time}."),
        ),
        ("Did {who} meet {who2}?", "Was {who2} at the {place}?"),
    ),
    Fact(
        "who who2 colour thing day",
        (
            "{who} gave {who2} a {colour} {thing} on {day}.",
            "On {day} {who2} got a {colour} {thing} from {who}.",
            "{who} made a {colour} {thing} and gave it to {who2} on {day}.",
        ),
        (
            ("Who gave away the {thing}?", "{who}", "{who} gave away the {thing}."),
            ("Who got the {thing}?", "{who2}", "{who2} got the {thing}."),
            ("What did {who} give to {who2}?", "a {colour} {thing}", "{who} gave {who2} a {colour} {thing}."),
            ("What colour is the {thing} of {who2}?", "{colour}", "The {thing} is {colour}."),
            ("When did {who2} get the {thing}?", "{day}", "{who2} got the {thing} on {day}."),
        ),
        ("Did {who} give {who2} a {thing}?", "Did {who2} get the {thing} on {day}?"),
    ),
    Fact(
        "who town town2 vehicle month",
        (
            "{who} went from {town} to {town2} by {vehicle} in {month}.",
            "In {month} {who} took the {vehicle} from {town} to {town2}.",
            "{who} left {town} in {month} and went to {town2} by {vehicle}.",
        ),
        (
            ("Where did {who} go?", "{town2}", "{who} went to {town2}."),
            ("From where did {who} start?", "{town}", "{who} started from {town}."),
            ("How did {who} travel?", "by {vehicle}", "{who} went by {vehicle}."),
            ("When did {who} travel?", "{month}", "{who} travelled in {month}."),
            ("Who went to {town2}?", "{who}", "{who} went to {town2}."),
        ),
        ("Did {who} go to {town2}?", "Did {who} travel by {vehicle}?"),
    ),
    Fact(
        "who colour thing furniture",
        (
            "{who} put the {colour} {thing} behind the {furniture}.",
            "Behind the {furniture} {who} hid a {colour} {thing}.",
            "The {colour} {thing} of {who} is behind the {furniture}.",
        ),
        (
            ("Where is the {thing}?", "behind the {furniture}", "The {thing} is behind the {furniture}."),
            ("What is behind the {furniture}?", "a {colour} {thing}", "A {colour} {thing} is behind the {furniture}."),
            ("Whose is the {thing}?", "{who}", "It is the {thing} of {who}."),
        ),
        ("Is the {thing} behind the {furniture}?",),
    ),
    Fact(
        "thing colour code price",
        (
            "The {colour} {thing} has the number {code} and costs {price} coins.",
            "Number {code} is a {colour} {thing} for {price} coins.",
            "You pay {price} coins for the {colour} {thing}. Its number is {code}.",
        ),
        (
            ("What is the number of the {thing}?", "{code}", "The number of the {thing} is {code}."),
            ("How much is the {thing}?", "{price} coins", "The {thing} costs {price} coins."),
            ("What is {code}?", "a {colour} {thing}", "{code} is a {colour} {thing}."),
        ),
        ("Does the {thing} cost {price} coins?", "Is the {thing} {colour}?"),
    ),
    Fact(
        "event place day time who",
        (
            "There is a {event} at the {place} on {day} at {time}. Ask {who}.",
            "{who} invites us to a {event} on {day}. It starts at {time} at the {place}.",
            "The {event} of {who} is at the {place}, {day}, {time}.",
        ),
        (
            ("Where is the {event}?", "the {place}", "The {event} is at the {place}."),
            ("When is the {event}?", "{day} at {time}", "The {event} is on {day} at {time}."),
            ("What is at the {place}?", "a {event}", "There is a {event} at the {place}."),
            ("Who is the host of the {event}?", "{who}", "The host of the {event} is {who}."),
        ),
        ("Is the {event} on {day}?", "Is the {event} at the {place}?"),
    ),
    Fact(
        "who age food colour",
        (
            "{who} is {age} years old, likes {foods} and wears {colour} clothes.",
            "{who} likes {foods}. {she} wears {colour} clothes and is {age} years old.",
            "At the age of {age}, {who} likes {foods} and {colour} clothes.",
        ),
        (
            ("How old is {who}?", "{age}", "{who} is {age} years old."),
            ("Who is {age} years old?", "{who}", "{who} is {age} years old."),
            ("What does {who} like to eat?", "{foods}", "{who} likes {foods}."),
            ("What colour does {who} wear?", "{colour}", "{who} wears {colour} clothes."),
            ("Who likes {foods}?", "{who}", "{who} likes {foods}."),
        ),
        ("Does {who} like {foods}?", "Is {who} {age} years old?"),
    ),
)
# What a record calls the words of a kind.
KEYS = {
    "who": "name", "colour": "colour", "thing": "thing", "place": "place", "day": "day", "count": "number",
    "job": "job", "town": "town", "animal": "animal", "pet": "pet", "food": "food", "meal": "meal",
    "feeling": "mood", "time": "time", "month": "month", "vehicle": "vehicle", "age": "age", "code": "code",
    "price": "price", "event": "event", "who2": "other name", "furniture": "spot", "town2": "goal",
}  # fmt: skip
SINGULAR = {"things": "thing", "animals": "animal", "foods": "food"}
SEPARATORS = (", ", "; ", " / ", " - ", " | ", "\n", " + ", " * ", " ~ ", " & ", " > ")
MARKS = (": ", " = ", "=", " - ", " -> ", ":", " is ")
IN_A_SENTENCE = ("Answer in a full sentence.", "Please answer in a sentence.", "Use a full sentence.")
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly helper.",
    "Answer the questions of the user.",
    "Read carefully and answer briefly.",
)


GREETING = (
    ("Hello", "Hello!", "Hi", "Hi!", "hello", "hi", "Hey", "Good morning", "Good evening!", "Hi there", "Hello there!"),
    ("Hello! How can I help you?",),
)
SMALL_TALK = (
    (("How are you?", "How are you today?", "how are you", "Are you well?"), ("I am fine, thank you. And you?",)),
    (("Thank you.", "Thanks!", "thank you", "Thanks a lot."), ("You are welcome!",)),
    (("I am fine.", "I'm good.", "Very well, thank you.", "Good."), ("I am glad to hear that.",)),
    (
        ("I am sad.", "I feel lonely.", "I am tired.", "I had a bad day."),
        ("I am sorry to hear that. I hope it gets better.",),
    ),
    (
        ("What can you do?", "How can you help me?", "Can you help me?", "Help", "help me"),
        ("I can answer questions about a short text, a list or a record. I can also tell a story.",),
    ),
    (("Who made you?", "Where do you come from?"), ("I was trained from nothing by the Manta project.",)),
    (("Do you like music?", "Do you like stories?", "Do you like animals?"), ("Yes, very much!",)),
    (("Tell me a joke.", "Say something funny."), ("Why did the duck cross the road? To get to the lake!",)),
    (
        ("What is the weather like?", "Is it raining?", "What time is it?"),
        ("I am sorry, I cannot see that from here.",),
    ),
    (("OK", "Okay.", "I see.", "Great!", "Good job!", "Nice."), ("Is there anything else I can do for you?",)),
    (("No.", "No, thanks.", "Nothing."), ("All right. Just ask when you need me.",)),
    (("What does a cat say?",), ("Meow!",)),
    (("What does a dog say?",), ("Woof!",)),
    (("What colour is grass?",), ("Grass is green.",)),
    (("What colour is the sky?",), ("The sky is blue.",)),
    (("Are you a human?", "Are you a robot?"), ("I am a language model.",)),
)  # fmt: skip
# A tale is one sentence of each.
TALE = (
    (
        "Once upon a time there was a {colour} {animal} called {pet}.",
        "{pet} was a {colour} {animal} who lived in {town}.",
        "In {town} there lived a {colour} {animal}. Its name was {pet}.",
    ),
    (
        "{pet} was often {feeling}.",
        "Every day {pet} went to the {place}.",
        "{pet} loved {foods} more than anything.",
        "All the friends of {pet} were away.",
    ),
    (
        "One {weather} day {pet} met {who} at the {place}.",
        "One {weather} morning {who} came to the {place} and saw {pet}.",
    ),
    (
        "{who} had lost a {thing}.",
        "{who} was looking for a {thing}.",
        '"Have you seen my {thing}?" asked {who}.',
    ),
    (
        "{pet} looked behind the {furniture}, and there it was.",
        "Together they looked everywhere, and {pet} found it behind the {furniture}.",
    ),
    (
        '"Thank you, {pet}!" said {who}.',
        "{who} was so glad that {pet} got many {foods}.",
        "{who} laughed and gave {pet} some {foods}.",
    ),
    (
        "From that day on they were friends.",
        "Then they all went home.",
        "{pet} slept very well that night.",
        "And {pet} was never {feeling} again.",
    ),
)
TALE_ASKS = (
    ("Who did {pet} meet?", "{who}"),
    ("What was the name of the {animal}?", "{pet}"),
    ("What colour was {pet}?", "{colour}"),
    ("What was lost?", "a {thing}"),
    ("Where was the {thing}?", "behind the {furniture}"),
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
    questions, answers = [], []
    for fact, slots in rng.sample(known, min(len(known), 2)):
        check = rng.choice(fact.checks)
        answers.append(rng.choice(("yes", "no")))
        if answers[-1] == "no":
            last = re.findall(r"{(\w+)}", check)[-1]
            slots = slots | draw.slots(SINGULAR.get(last, last))
        questions.append(said(check, slots))
    questions[0] = asked(rng, text, questions[0] + rng.choice(("", " Answer yes or no.")))
    return talk("truth", *by_turns(questions, answers))


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
    chosen = rng.sample(lessons, rng.randint(1, 4))
    # After a change one could ask about either record: let the change be last.
    chosen.sort(key=lambda lesson: lesson[0].startswith("Change"))
    questions = [question for question, _ in chosen]
    questions[0] = asked(rng, written(fields), questions[0])
    return talk("record", *by_turns(questions, [answer for _, answer in chosen]))


def about_table(rng: Random) -> Conversation:
    """Questions about a table: a header and two to five rows."""
    draw = Draw(rng)
    kinds = ["who", *rng.sample(["job", "town", "age", "colour", "animal", "food", "price", "code", "time"], 2)]
    rows = [[draw.word(kind) for kind in kinds] for _ in range(rng.randint(2, 5))]
    separator = rng.choice((" | ", ", ", "; ", " - "))
    table = "\n".join(separator.join(row) for row in [["name", *kinds[1:]], *rows])
    questions, answers = [], []
    for row in rng.sample(rows, min(len(rows), 3)):
        column = rng.choice((1, 2))
        if rng.random() < 0.6:
            questions.append(f"What is the {kinds[column]} of {row[0]}?")
            answers.append(row[column])
        else:
            questions.append(f"Who has the {kinds[column]} {row[column]}?")
            answers.append(row[0])
    questions[0] = asked(rng, table, questions[0])
    return talk("table", *by_turns(questions, answers))


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
    question, answer = rng.choice(lessons)
    return talk("list", asked(rng, ", ".join(items), question), answer)


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
    if rng.random() < 0.3:
        items = ["".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 5))]
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
    return talk(
        "numbers",
        *rng.choice(
            (
                (f"Write {word} in digits.", DIGITS[word]),
                (f"Write {DIGITS[word]} as a word.", word),
                (f"What comes after {number}?", str(number + 1)),
                (f"What is {other} plus {number % 10}?", str(other + number % 10)),
                (f"Count from {other} to {other + 3}.", ", ".join(str(other + step) for step in range(4))),
                (f"Which is the largest: {listed}?", str(max(some))),
                (f"Which is the smallest: {listed}?", str(min(some))),
                (f"Put in order: {listed}", ", ".join(map(str, sorted(some)))),
                (f"What day comes after {(day := rng.choice(WORDS['day'][:-1]))}?", after(WORDS["day"], day)),
                (f"What month comes after {(month := rng.choice(WORDS['month'][:-1]))}?", after(WORDS["month"], month)),
            )
        ),
    )


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
    (about_text, 30),
    (about_truth, 5),
    (about_several, 14),
    (about_record, 11),
    (about_table, 7),
    (about_list, 7),
    (about_sentence, 7),
    (about_words, 7),
    (about_numbers, 3),
    (small_talk, 5),
    (story, 4),
)
OPEN = ("small talk", "story", "long talk")


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
    closed = [lesson for lesson, _ in LESSONS if lesson not in (small_talk, story)]
    return [closed[number % len(closed)](rng) for number in range(questions)]

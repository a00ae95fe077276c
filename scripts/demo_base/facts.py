"""What the demo base's language tells: the facts of its texts with their questions, its small talk, its tales."""

from dataclasses import dataclass


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

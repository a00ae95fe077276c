"""A vocabulary of invented words, for models that are served for their speed: text whose tokens can be counted by eye.

Every token but the special ones is a word with the space before it, so a prompt of n words has n tokens, and a chunk of an
answer has as many tokens as spaces: whatever a model of random weights says is text at once, with no half characters to
wait for.
"""

import itertools
from functools import cache
from random import Random

SIZE = 32000  # tokens, as many as the model has
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def words() -> tuple[str, ...]:
    """SIZE words less the special tokens: two syllables each, all different, in the order of their tokens."""
    syllables = [
        first + vowel + last for first in "bdfgklmnprstvw" for vowel in "aeiou" for last in ("", "n", "r", "s")
    ]
    distinct = dict.fromkeys("".join(pair) for pair in itertools.product(syllables, syllables))
    return tuple(Random(0).sample(list(distinct), SIZE - len(SPECIAL)))


def prompt(rng: Random, tokens: int) -> str:
    return "".join(f" {word}" for word in rng.choices(words(), k=tokens))


def count(text: str) -> int:
    """Tokens of a part of an answer."""
    return text.count(" ")

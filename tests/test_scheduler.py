"""Which tokens are computed when, and where they lie: driven at random, beside a model that is a sum."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugins.engines.cache import BLOCK, Cache, Place
from plugins.engines.scheduler import BALANCE, Running, Scheduler

VOCABULARY = 50


class Rows:
    """A Store whose keys are the tokens themselves. The machine has memory for `room` of them."""

    def __init__(self, room: float = math.inf) -> None:
        self.made = 0
        self._room = room

    def make(self, rows: int, capacity: int) -> list[list[int | None]]:
        if rows * capacity > self._room:
            raise MemoryError
        self._room -= rows * capacity
        self.made += rows * capacity
        return [[None] * capacity for _ in range(rows)]

    def release(self, tables: list[list[int | None]]) -> None:
        self._room += sum(map(len, tables))
        tables.clear()  # nobody may look at them again

    def copy(self, source: Place, at: int, target: Place, to: int, tokens: int) -> None:
        target.slab.tables[target.row][to : to + tokens] = source.slab.tables[source.row][at : at + tokens]


@dataclass(eq=False)
class Asked:
    prompt: list[int]
    limit: int
    adapter: str = ""
    scores_prompt: bool = False
    abandoned: bool = False
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


def next_token(known: list[int | None], adapter: str) -> int:
    """A model: it depends on every token that it can see."""
    total = len(adapter)
    for at, token in enumerate(known):
        assert token is not None, "a token that was never computed"
        total = (31 * total + 7 * at + token) % 10007
    return total % VOCABULARY


def alone(asked: Asked) -> list[int]:
    tokens = list(asked.prompt)
    while len(tokens) < len(asked.prompt) + asked.limit:
        tokens.append(next_token(list(tokens), asked.adapter))
    return tokens[len(asked.prompt) :]


class Machine:
    """Runs what a Scheduler plans."""

    def __init__(self, budget: int, longest: int, rows: int, room: float = math.inf) -> None:
        self.store = Rows(room)
        self.cache = Cache(self.store, budget=budget, longest=longest)
        self.scheduler: Scheduler[Asked] = Scheduler(self.cache, rows)
        self.computed = 0  # tokens
        self.widest = 0  # sequences of a step
        self.ended: list[Asked] = []

    def step(self) -> bool:
        pieces = self.scheduler.plan()
        assert pieces or not self.scheduler.is_busy
        for piece in pieces:
            place, tokens = piece.running.place, piece.running.sequence.tokens
            row = place.slab.tables[place.row]
            for at in range(place.length, place.length + piece.count):
                row[at] = tokens[at]
            assert row[: place.length + piece.count] == tokens[: place.length + piece.count]
        self.computed += sum(piece.count for piece in pieces)
        self.widest = max(self.widest, len(pieces))
        self.scheduler.computed(pieces)
        for piece in pieces:
            running = piece.running
            if running.left == 0:
                self.say(running)
        self.check()
        return bool(pieces)

    def say(self, running: Running[Asked]) -> None:
        sequence, place = running.sequence, running.place
        sequence.tokens.append(next_token(place.slab.tables[place.row][: place.length], sequence.adapter))
        if len(sequence.answer) == sequence.limit:
            self.ended.append(sequence)
            self.scheduler.finish(running)

    def check(self) -> None:
        assert self.cache.allocated <= self.cache.budget
        places = [place for slab in self.cache.slabs for place in slab.places]
        assert all(slab.places[place.row] is place for slab in self.cache.slabs for place in slab.places)
        assert all(len(slab.places) <= slab.rows for slab in self.cache.slabs)
        assert {id(running.place) for running in self.scheduler.running} <= {id(place) for place in places}

    def run(self, *asked: Asked, limit: int = 10_000) -> None:
        self.scheduler.waiting.extend(asked)
        for _ in range(limit):
            if not self.step():
                return
        pytest.fail("it does not come to an end")


prompts = st.builds(
    lambda shared, own, length: ([shared] * 80 + [own] * 80)[length:],
    st.integers(0, 2), st.integers(0, 9), st.integers(0, 159),
)  # fmt: skip
asked = st.builds(Asked, prompts, st.integers(1, 60), adapter=st.sampled_from(["", "a"]), scores_prompt=st.booleans())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 30), asked), min_size=1, max_size=12),
    budget=st.integers(256, 3000),
    room=st.integers(256, 3000),
    rows=st.integers(1, 6),
    leaving=st.sets(st.integers(0, 11)),
)
def test_answers_are_those_of_each_alone_in_any_company_and_any_memory(
    arrivals: list[tuple[int, Asked]], budget: int, room: int, rows: int, leaving: set[int]
) -> None:
    machine = Machine(budget, 256, rows, room)
    everyone = [sequence for _, sequence in arrivals]
    for _ in range(5000):
        for wait, sequence in [arrival for arrival in arrivals if arrival[0] == 0]:
            machine.scheduler.waiting.append(sequence)
            arrivals.remove((wait, sequence))
        arrivals = [(wait - 1, sequence) for wait, sequence in arrivals]
        busy = machine.step()
        for at in leaving & set(range(len(everyone))):
            everyone[at].abandoned |= len(everyone[at].answer) > 3
        if not busy and not arrivals:
            break
    staying = [sequence for sequence in everyone if not sequence.abandoned]
    assert [sequence.answer for sequence in staying] == [alone(sequence) for sequence in staying]
    assert not machine.scheduler.is_busy
    assert machine.widest <= rows


def test_first_come_is_first_served() -> None:
    machine = Machine(1024, 256, rows=2)
    everyone = [Asked([n] * 40, limit=20) for n in range(8)]
    machine.run(*everyone)
    assert machine.ended == everyone


def test_a_long_prompt_does_not_keep_those_who_decode_from_their_tokens() -> None:
    machine = Machine(10_000, 2048, rows=4)
    quick, long = Asked([1] * 8, limit=50), Asked([2] * 1500, limit=2)
    machine.scheduler.waiting.append(quick)
    machine.step()
    machine.scheduler.waiting.append(long)
    while len(quick.answer) < 50:
        said, computed = len(quick.answer), machine.computed
        machine.step()
        assert len(quick.answer) == said + 1, "a step without a token"
        assert machine.computed - computed <= 1 + 2 * (BALANCE + 1)
    machine.run()
    assert long.answer == alone(long)


def test_a_shared_beginning_is_computed_once() -> None:
    machine = Machine(10_000, 512, rows=4)
    shared = [7] * 200
    machine.run(Asked([*shared, 1, 2], limit=4))
    first = machine.computed
    machine.run(Asked([*shared, 3, 4, 5], limit=4))
    assert machine.computed - first <= 4 + 3 + 200 % BLOCK + BLOCK
    # Also where they come together, which would otherwise all begin at once.
    machine = Machine(10_000, 512, rows=4)
    machine.run(*(Asked([*shared, n], limit=4) for n in range(4)))
    assert machine.computed <= 201 + 3 * (1 + 200 % BLOCK + BLOCK) + 4 * 4
    assert [sequence.answer for sequence in machine.ended] == [alone(sequence) for sequence in machine.ended]


def test_a_conversation_goes_on_from_its_last_answer() -> None:
    machine = Machine(10_000, 512, rows=1)
    first = Asked([7] * 100, limit=60)
    machine.run(first)
    before = machine.computed
    machine.run(Asked([*first.tokens, 1, 2, 3], limit=1))
    assert machine.computed - before < 2 * BLOCK


def test_prefixes_of_one_adapter_are_not_anothers() -> None:
    machine = Machine(10_000, 512, rows=1)
    machine.run(Asked([7] * 100, limit=1))
    before = machine.computed
    machine.run(Asked([7] * 100, limit=1, adapter="other"))
    assert machine.computed - before == 100


def test_prefixes_that_were_of_no_use_for_longest_go_first() -> None:
    machine = Machine(4096, 512, rows=1)
    for n in range(48):
        machine.run(Asked([n] * 120, limit=1), Asked([49] * 120, limit=1))
    before = machine.computed
    machine.run(Asked([49] * 120, limit=1))
    assert machine.computed - before < 120 - 2 * BLOCK  # asked for all the time
    before = machine.computed
    machine.run(Asked([4] * 120, limit=1))
    assert machine.computed - before == 120  # long ago


def test_a_prompt_that_is_scored_is_computed_whole() -> None:
    machine = Machine(10_000, 512, rows=1)
    for _ in range(2):
        before = machine.computed
        machine.run(Asked([7] * 100, limit=1, scores_prompt=True))
        assert machine.computed - before == 100


def places(cache: Cache, *tokens: int) -> list[Any]:
    return [cache.place(count) for count in tokens]


def test_memory_is_given_where_it_is_needed_and_never_above_the_budget() -> None:
    store = Rows()
    cache = Cache(store, budget=2048, longest=1024)
    small = places(cache, *[64] * 16)
    assert all(small)
    assert places(cache, 1024) != [None]  # beside the first slab of small ones
    assert places(cache, 100) == [None]
    for place in small:
        cache.free(place)
    assert places(cache, 100) != [None]  # the small ones' slab is empty, and goes
    assert cache.allocated <= 2048

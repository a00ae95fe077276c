"""Which tokens of which sequences the next step computes (iteration-level scheduling: Yu et al., Orca, OSDI 2022).

First come, first served. Every sequence whose prompt has been read gets one token a step; prompts are read beside them in
chunks (Agrawal et al., Sarathi, arXiv 2308.16369), so short that those who decode hardly notice. Where memory runs out, the
sequence that came last gives its row back and is computed anew later. Pure: no torch, no clock, no threads.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from plugins.engines.cache import BLOCK, Cache, Place

# Tokens whose products take as long as reading the weights, on a CPU; with AMX it is three times as many, and a GPU is taken
# to need ten times.
BALANCE = 24


class Row(Protocol):
    """What the scheduler knows of a sequence."""

    abandoned: bool  # nobody waits for it any more

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        ...

    @property
    def adapter(self) -> str: ...
    @property
    def scores_prompt(self) -> bool:
        """Whether it wants to see what follows each token of its prompt: nothing of it is taken from the cache."""
        ...


R = TypeVar("R", bound=Row)


@dataclass(eq=False)
class Running(Generic[R]):
    """A sequence that has a row. `place.length` of its tokens have been computed."""

    sequence: R
    place: Place

    @property
    def left(self) -> int:
        """Tokens that have not been computed: one where it decodes."""
        return len(self.sequence.tokens) - self.place.length

    @property
    def decodes(self) -> bool:
        return self.left == 1


@dataclass(frozen=True)
class Piece(Generic[R]):
    """`count` tokens of a sequence, to be computed: the next ones that have not been."""

    running: Running[R]
    count: int

    @property
    def ends(self) -> bool:
        """Whether the sequence has a next token after this."""
        return self.count == self.running.left


class Scheduler(Generic[R]):
    """The sequences that wait, in order, and those that run, in the order in which they came."""

    def __init__(self, cache: Cache, max_rows: int, balance: int = BALANCE) -> None:
        self.cache = cache
        self.waiting: deque[R] = deque()
        self.running: list[Running[R]] = []
        self._max_rows, self._balance = max_rows, balance

    @property
    def is_busy(self) -> bool:
        return bool(self.running or self.waiting)

    def sequences(self) -> list[R]:
        return [*(running.sequence for running in self.running), *self.waiting]

    def plan(self) -> list[Piece[R]]:
        """The next step: those who decode first. Empty only where nothing is left to do.

        Raises MemoryError where nothing runs, and the machine has less memory than the cache may take: not enough for the
        first that waits.
        """
        self._drop_abandoned()
        self._make_room()
        pieces = [Piece(running, 1) for running in self.running if running.decodes]
        left = self._chunk(len(pieces))
        for running in self.running:
            if left and not running.decodes:
                pieces.append(Piece(running, min(left, running.left)))
                left -= pieces[-1].count
        while left and self.waiting and len(self.running) < self._max_rows:
            admitted = self._admit(self.waiting[0])
            if admitted is None:
                break
            self.waiting.popleft()
            pieces.append(Piece(admitted, min(left, admitted.left)))
            left -= pieces[-1].count
        if self.waiting and not self.running:
            raise MemoryError("no memory for its keys and values")
        return pieces

    def computed(self, pieces: Iterable[Piece[R]]) -> None:
        """The step has been computed: the tokens of `pieces` are in the cache."""
        for piece in pieces:
            place, tokens = piece.running.place, piece.running.sequence.tokens
            before, place.length = place.length, place.length + piece.count
            # While it decodes, nobody else has use for its blocks yet.
            if piece.count > 1 and place.length // BLOCK > before // BLOCK:
                self.cache.keep(piece.running.sequence.adapter, tokens, place)

    def finish(self, running: Running[R]) -> None:
        """It has ended: its row is free, what it said may be the beginning of another prompt."""
        self.running.remove(running)
        self.cache.keep(running.sequence.adapter, running.sequence.tokens, running.place)
        self.cache.free(running.place)

    def drop(self, running: Running[R]) -> None:
        """It is to be forgotten: nothing of it is kept."""
        self.running.remove(running)
        self.cache.free(running.place)

    def _chunk(self, decoding: int) -> int:
        """Tokens of prompts for a step in which `decoding` sequences decode: by the count of BALANCE, it then takes three
        times as long as without. Where nobody waits for the next token, as many as are computed well.
        """
        return 2 * (self._balance + decoding) if decoding else 16 * self._balance

    def _drop_abandoned(self) -> None:
        for running in [running for running in self.running if running.sequence.abandoned]:
            self.drop(running)
        if any(sequence.abandoned for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.abandoned)

    def _make_room(self) -> None:
        """For the next token of each that runs. Who came last gives way."""
        for running in list(self.running):
            while running in self.running:
                larger = self.cache.grow(running.place, len(running.sequence.tokens))
                if larger is not None:
                    running.place = larger
                    break
                last = self.running[-1]
                self.drop(last)
                self.waiting.appendleft(last.sequence)

    def _admit(self, sequence: R) -> Running[R] | None:
        """Give it a row, with what is known of its beginning; None where it waits, for a row or for another's prefix."""
        known = 0 if sequence.scores_prompt else self.cache.match(sequence.adapter, sequence.tokens)
        if not sequence.scores_prompt and self._shared_with_readers(sequence) > known:
            return None
        place = self.cache.place(len(sequence.tokens) + 1)
        if place is None:
            return None
        running = Running(sequence, place)
        if known:
            self.cache.recall(sequence.adapter, sequence.tokens, place)
        self.running.append(running)
        return running

    def _shared_with_readers(self, sequence: R) -> int:
        """How many tokens of its beginning others are about to have computed, in whole blocks."""
        return max((_shared(running, sequence) for running in self.running if not running.decodes), default=0)


def _shared(running: Running[R], sequence: R) -> int:
    mine, theirs = sequence.tokens, running.sequence.tokens
    if running.sequence.adapter != sequence.adapter:
        return 0
    # The last token of either is always computed by itself.
    blocks = (min(len(mine), len(theirs)) - 1) // BLOCK
    parts = [slice(n * BLOCK, (n + 1) * BLOCK) for n in range(blocks)]
    return BLOCK * next((n for n, part in enumerate(parts) if mine[part] != theirs[part]), blocks)


def is_scored(piece: Piece[Any]) -> bool:
    """Whether each token of this piece wants its logits: it is of a prompt that is scored."""
    running = piece.running
    return running.sequence.scores_prompt and running.place.length < len(running.sequence.prompt)

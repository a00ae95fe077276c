"""Where keys and values lie: rows in slabs, and the prefixes that prompts have shared. Bounded by a budget, in tokens.

A sequence has one row, with room for 64, 128, 256, ... tokens; it moves to a larger one as it grows. Rows of one capacity
lie together in slabs, so that attention reads many sequences with one call and little of what it reads is empty. (Pages,
as in Kwon et al. 2023, arXiv 2309.06180, waste less, and want a kernel that reads through a page table.)

Nothing here knows torch but `Slab.tables`: a `Store` makes the tensors, and copies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

SMALLEST = 64  # tokens: the capacity of the smallest row
BLOCK = 32  # tokens: prefixes are kept in blocks of this many
FIRST = (
    8192  # tokens of the first slab of a capacity, at most; each further one is as large as those before it together
)
BLOCKS = 1024  # tokens of a slab of blocks, at most
PART = 32  # of the budget: either is no larger than one of so many


class Store(Protocol):
    """What holds the numbers."""

    def make(self, rows: int, capacity: int) -> Any:
        """Tables for `rows` rows of `capacity` tokens, without NaN in them. Raises MemoryError."""
        ...

    def release(self, tables: Any) -> None:
        """These are not needed any more."""
        ...

    def copy(self, source: "Place", at: int, target: "Place", to: int, tokens: int) -> None:
        """Copy `tokens` tokens from token `at` of one row to token `to` of another."""
        ...


@dataclass(eq=False)
class Slab:
    """`rows` rows of `capacity` tokens. Row i is `places[i]`'s: those in use come first."""

    capacity: int
    rows: int
    tables: Any
    places: list["Place"] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.rows * self.capacity


@dataclass(eq=False)
class Place:
    """A row of a slab. `length`: the tokens in it that are known."""

    slab: Slab
    row: int
    length: int = 0


@dataclass(eq=False)
class Prefix:
    """A block of BLOCK tokens that follows the block `parent`, kept for prompts that begin alike."""

    parent: "Prefix | None"
    tokens: tuple[int, ...]
    place: Place | None  # None: the root, which has no tokens, and one that has been let go
    used: int = 0  # when it was last of use
    after: dict[tuple[int, ...], "Prefix"] = field(default_factory=dict)


class Cache:
    """Rows for sequences, and blocks of prefixes in what room is left: the oldest of these go where a row is wanted.

    `budget`: tokens that may be allocated. `longest`: the largest row that is asked for.
    """

    def __init__(self, store: Store, *, budget: int, longest: int) -> None:
        self.budget = budget
        self.longest = min(longest, budget)
        self.slabs: list[Slab] = []
        self.hits = 0  # tokens that need not have been computed
        self._store = store
        self._block_slab = max(BLOCK, min(BLOCKS, budget // PART))
        self._roots: dict[str, Prefix] = {}
        self._clock = 0

    @property
    def allocated(self) -> int:
        """Tokens of all slabs, used or not; never above the budget."""
        return sum(slab.tokens for slab in self.slabs)

    # Rows

    def place(self, tokens: int) -> Place | None:
        """A row for at least `tokens` tokens, at most `longest`; None where there is no room now."""
        return self._place(self._capacity(tokens))

    def grow(self, place: Place, tokens: int) -> Place | None:
        """A larger row with what `place` holds, which is free then; None, and all as before, where there is no room."""
        if tokens <= place.slab.capacity:
            return place
        larger = self.place(tokens)
        if larger is not None:
            self._store.copy(place, 0, larger, 0, place.length)
            larger.length = place.length
            self.free(place)
        return larger

    def free(self, place: Place) -> None:
        """The last row of the slab moves where `place` was."""
        slab = place.slab
        last = slab.places.pop()
        if last is not place:
            self._store.copy(last, 0, place, 0, last.length)
            last.row = place.row
            slab.places[last.row] = last

    def _capacity(self, tokens: int) -> int:
        capacity = SMALLEST
        while capacity < tokens:
            capacity *= 2
        return min(capacity, self.longest)

    def _place(self, capacity: int) -> Place | None:
        while (place := self._take(capacity)) is None and self._forget_oldest_slab():
            pass
        return place

    def _take(self, capacity: int) -> Place | None:
        slab = next((s for s in self.slabs if s.capacity == capacity and len(s.places) < s.rows), None)
        slab = slab or self._allocate(capacity)
        if slab is None:
            return None
        place = Place(slab, len(slab.places))
        slab.places.append(place)
        return place

    def _allocate(self, capacity: int) -> Slab | None:
        """A new slab, as large as is sensible and fits; those that are empty make room for it."""
        same = sum(slab.tokens for slab in self.slabs if slab.capacity == capacity)
        first = min(FIRST, self.budget // PART)
        wanted = (self._block_slab if capacity == BLOCK else max(first, same)) // capacity
        empty = [slab for slab in self.slabs if not slab.places]
        while True:
            rows = min(max(wanted, 1), (self.budget - self.allocated) // capacity)
            if rows >= 1:
                try:
                    slab = Slab(capacity, rows, self._store.make(rows, capacity))
                except MemoryError:  # others have taken what was free at the start
                    wanted = rows // 2
                else:
                    self.slabs.append(slab)
                    return slab
            if rows <= 1:
                if not empty:
                    return None
                gone = empty.pop()
                self.slabs.remove(gone)
                self._store.release(gone.tables)

    # Prefixes

    def match(self, adapter: str, tokens: Sequence[int]) -> int:
        """How many of `tokens` are known as the beginning of earlier ones, a multiple of BLOCK."""
        return BLOCK * sum(1 for _ in self._known(adapter, tokens))

    def recall(self, adapter: str, tokens: Sequence[int], place: Place) -> None:
        """Copy into `place` what is known of the beginning of `tokens`."""
        self._clock += 1
        for block in self._known(adapter, tokens):
            assert block.place is not None
            self._store.copy(block.place, 0, place, place.length, BLOCK)
            place.length += BLOCK
            self.hits += BLOCK
            block.used = self._clock

    def keep(self, adapter: str, tokens: Sequence[int], place: Place) -> None:
        """Keep the whole blocks of what `place` holds, which are `tokens`, where there is room without taking a row's."""
        self._clock += 1
        block = self._roots.setdefault(adapter, Prefix(None, (), None))
        for start in range(0, min(len(tokens), place.length) - BLOCK + 1, BLOCK):
            piece = tuple(tokens[start : start + BLOCK])
            block.used = self._clock
            if piece not in block.after:
                kept = self._room_for_block()
                if kept is None:
                    return
                self._store.copy(place, start, kept, 0, BLOCK)
                kept.length = BLOCK
                block.after[piece] = Prefix(block, piece, kept)
            block = block.after[piece]
        block.used = self._clock

    def forget(self, adapter: str) -> None:
        """All that is known with `adapter`."""
        root = self._roots.pop(adapter, None)
        for block in _below(root) if root else ():
            if block.place is not None:
                self.free(block.place)

    def _room_for_block(self) -> Place | None:
        """A row for a block, if need be that of an older one, but not of one that is of use just now."""
        free = any(slab.capacity == BLOCK and len(slab.places) < slab.rows for slab in self.slabs)
        # Blocks leave a quarter of the budget to rows, which would otherwise have to take it back again and again.
        is_full = self.allocated + self._block_slab > self.budget - self.budget // 4
        if not free and is_full and not self._forget_oldest_slab(but=self._clock):
            return None
        return self._take(BLOCK)

    def _known(self, adapter: str, tokens: Sequence[int]) -> Iterator[Prefix]:
        block = self._roots.get(adapter)
        # The last token is computed in any case: it says what comes next.
        for start in range(0, len(tokens) - BLOCK, BLOCK):
            block = block.after.get(tuple(tokens[start : start + BLOCK])) if block else None
            if block is None:
                return
            yield block

    def _forget_oldest_slab(self, but: int | None = None) -> bool:
        """Let go of a slab of blocks, that which has been of no use for longest. False where there is none.

        `but`: not of one that was of use at this time. By the slab, because a row needs room in one piece.
        """
        ages = {slab: 0 for slab in self.slabs if slab.capacity == BLOCK and slab.places}
        blocks = [block for root in self._roots.values() for block in _below(root) if block.place]
        for block in blocks:
            assert block.place is not None
            ages[block.place.slab] = max(ages[block.place.slab], block.used)
        oldest = min(ages, key=lambda slab: ages[slab], default=None)
        if oldest is None or ages[oldest] == but:
            return False
        for block in blocks:
            if block.place is not None and block.place.slab is oldest:
                self._remove(block)
        return True

    def _remove(self, block: Prefix) -> None:
        """And all that follows it, which could not be found any more."""
        assert block.parent is not None
        del block.parent.after[block.tokens]
        for gone in _below(block):
            assert gone.place is not None
            self.free(gone.place)
            gone.place = None


def _below(block: Prefix) -> list[Prefix]:
    found = [block]
    for at in found:  # it grows meanwhile
        found.extend(at.after.values())
    return found

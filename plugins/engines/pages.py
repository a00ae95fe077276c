"""Keys and values in pages, which an attention finds by a table (Kwon et al. 2023, arXiv 2309.06180)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from plugins.engines.cache import BLOCK, Place


class Pages:
    """A Store in pages of BLOCK tokens, any of which make a row.

    `tables` of a slab are the numbers of its pages, [rows, pages of a row].
    """

    def __init__(self, page_bytes: Iterable[int], pages: int) -> None:
        """`page_bytes`: what a page takes in each table of keys or values."""
        self.memory = [np.zeros((pages, size), np.uint8) for size in page_bytes]  # of each table
        self._free = list(range(pages))

    def make(self, rows: int, capacity: int) -> NDArray[np.int32]:
        count = rows * capacity // BLOCK
        taken, self._free = self._free[:count], self._free[count:]
        return np.array(taken, np.int32).reshape(rows, -1)

    def release(self, tables: NDArray[np.int32]) -> None:
        self._free += tables.flatten().tolist()

    def copy(self, source: Place, at: int, target: Place, to: int, tokens: int) -> None:
        """Whole pages: rows are copied from their beginning, prefixes by the page."""
        count = -(-tokens // BLOCK)
        theirs = source.slab.tables[source.row, at // BLOCK :][:count]
        ours = target.slab.tables[target.row, to // BLOCK :][:count]
        for table in self.memory:
            table[ours] = table[theirs]

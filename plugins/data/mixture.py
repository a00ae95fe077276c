"""Rows of several sources, drawn by weight."""

import random
from collections.abc import Iterator
from typing import Literal

from plugins.data.sources import Source
from plugins.spec import UserError, spec
from plugins.types import Row


@spec
class Mixture:
    """Each row is the next one of a source that is drawn by the `weights`, which need not add up to 1.

    The draws depend on `seed` alone. `stop`: "first" ends with the first source that ends, so that no row comes twice;
    "all" goes on until each source was read to its end, and shorter ones begin again. One row of each source is held in
    memory.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    seed: int = 0
    stop: Literal["first", "all"] = "first"

    def __post_init__(self) -> None:
        if len(self.sources) < 2:
            raise UserError(f"Mixture.sources: a mixture is of two or more, not of {len(self.sources)}")
        if len(self.weights) != len(self.sources):
            raise UserError(f"Mixture.weights: {len(self.weights)} weights for {len(self.sources)} sources")
        if min(self.weights) <= 0:
            raise UserError(f"Mixture.weights = {self.weights}: each must be above 0")

    def read(self) -> Iterator[tuple[str, Row]]:
        readers = [source.read() for source in self.sources]
        coming = [self._first(index, reader) for index, reader in enumerate(readers)]
        draw = random.Random(self.seed)
        ended: set[int] = set()
        while True:
            [index] = draw.choices(range(len(readers)), self.weights)
            yield coming[index]
            following = next(readers[index], None)
            if following is None:
                ended.add(index)
                if self.stop == "first" or len(ended) == len(readers):
                    return
                readers[index] = self.sources[index].read()
                following = self._first(index, readers[index])
            coming[index] = following

    def _first(self, index: int, reader: Iterator[tuple[str, Row]]) -> tuple[str, Row]:
        first = next(reader, None)
        if first is None:
            raise UserError(f"Mixture.sources.{index}: {self.sources[index]} has no rows")
        return first

"""An array of the store, read again chunk by chunk; what cannot be read is told and passed over."""

from collections.abc import Iterator

import numpy as np

from .arrays import StoredArray


class Reading:
    """(rows, values) of every chunk of an array that is whole; afterwards `faults` says what the others are.

    A missing chunk would read as zeros.
    """

    MISSING, WRONG = "missing or cut", "damaged: the checksum is wrong"

    def __init__(self, array: StoredArray) -> None:
        self._array = array
        self.faults: dict[str, list[int]] = {}  # {words: chunks}

    def __iter__(self) -> Iterator[tuple[slice, np.ndarray]]:
        lost = set(self._array.missing())
        for chunk in self._array.chunks:
            if chunk in lost:
                self.faults.setdefault(self.MISSING, []).append(chunk)
                continue
            try:
                values = np.asarray(self._array.stored[self._array.rows(chunk)])
            except ValueError:  # of the checksum
                self.faults.setdefault(self.WRONG, []).append(chunk)
                continue
            yield self._array.rows(chunk), values


def chunk_words(chunks: list[int], fault: str) -> str:
    if len(chunks) == 1:
        return f"chunk {chunks[0]} is {fault}"
    return f"chunks {', '.join(map(str, chunks))} are {fault}"

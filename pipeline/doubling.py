"""A number that is found by trying: doubled for as long as it makes things faster."""


class Doubling:
    """`value` starts at `start` and is at most `most`; `settled` once nothing more will be tried."""

    WORTH = 1.05  # how much faster the double has to be
    SAMPLES = 2  # reports on each value; the first is of cold caches and counts for nothing

    def __init__(self, start: int, most: int) -> None:
        self.value = min(start, most)
        self.settled = self.value == most
        self._most, self._best, self._seen = most, 0.0, 0

    def report(self, amount: float, seconds: float) -> None:
        """What was done in how many seconds with the present value."""
        if self.settled:
            return
        self._seen += 1
        if self._seen < self.SAMPLES:
            return
        rate = amount / max(seconds, 1e-9)
        if rate < self.WORTH * self._best:
            self.refuse()
        elif 2 * self.value > self._most:
            self.settled = True
        else:
            self._best, self._seen = rate, 0
            self.value *= 2

    def refuse(self) -> None:
        """The present value is not to be: back to the one before, for good."""
        if self._best:
            self.value //= 2
        self.settled = True

    def cap(self, most: int) -> None:
        """From now on at most this."""
        self.value, self.settled = min(self.value, most), True

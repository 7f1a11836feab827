"""Where the time of a slide or of a run went, and what bounded it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

BUSY = 0.9  # share of the time; an encoder that works as much is what bounds


@dataclass
class Meter:
    """Sums; those of two slides, or of two devices, add up. Seconds are of the thread that feeds the encoder, unless it
    is said.

    The encoder works meanwhile: `encoding` may overlap with what is waited for. The last tiles of a slide share a batch
    with the next slide, so a slide's own figures are true to a batch.
    """

    tiles: int = 0  # encoded
    seconds: float = 0.0
    encoding: float = 0.0  # the device was busy; half of its lanes for a second is half a second
    waiting: float = 0.0  # for tiles that were being read
    starving: float = 0.0  # for a slide that was being segmented
    stalled: float = 0.0  # for the writer
    reading: float = 0.0  # of all reader threads
    available: float = 0.0  # reader threads × seconds
    disk: float = 0.0  # of all reader threads, waiting for the disk
    writing: float = 0.0  # of the writer's thread
    decoded: int = 0  # pixels
    needed: int = 0  # pixels under the tiles of the finest level

    def __add__(self, other: "Meter") -> "Meter":
        return Meter(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def spend(self, seconds: float, readers: int) -> None:
        self.seconds += seconds
        self.available += readers * seconds

    @property
    def bound_by(self) -> str:
        """encoding, reading, segmenting or writing; "" if nothing was encoded.

        It is the encoder that bounds where it was busy, or where no wait explains why it was not.
        """
        if not self.tiles:
            return ""
        waits = {"reading": self.waiting, "segmenting": self.starving, "writing": self.stalled}
        longest, idle = max(waits, key=lambda name: waits[name]), self.seconds - self.encoding
        return longest if idle > (1 - BUSY) * self.seconds and waits[longest] >= idle / 2 else "encoding"

    def rates(self) -> dict[str, float]:
        """What a person wants to see: rates, and shares of the time."""
        seconds = max(self.seconds, 1e-9)
        return {
            "tiles_per_s": round(self.tiles / seconds, 1),
            "mpx_per_s": round(self.decoded / seconds / 1e6, 1),
            "encoder_busy": _share(self.encoding, self.seconds),
            "waited_for_tiles": _share(self.waiting, self.seconds),
            "waited_for_slides": _share(self.starving, self.seconds),
            "waited_for_writer": _share(self.stalled, self.seconds),
            "readers_busy": _share(self.reading, self.available),
            "disk": _share(self.disk, self.reading),
            "writer_busy": _share(self.writing, self.seconds),
            "unneeded": _share(max(0, self.decoded - self.needed), self.decoded),
        }

    def sentence(self) -> str:
        """One line on what bounded it."""
        if not self.tiles:
            return "nothing was encoded"
        rates = self.rates()
        threads = max(1, round(self.available / max(self.seconds, 1e-9)))
        readers = f"{threads} reader thread{'s' * (threads > 1)} at {rates['readers_busy']:.0%}"
        disk = f", {rates['disk']:.0%} of it waiting for the disk" if rates["disk"] > 0.2 else ""
        why = {
            "encoding": f"the encoder was busy {rates['encoder_busy']:.0%} of the time",
            "reading": f"{readers}{disk}; the encoder waited {1 - rates['encoder_busy']:.0%}",
            "segmenting": f"the encoder waited {rates['waited_for_slides']:.0%} for slides that were being segmented",
            "writing": f"the encoder waited {rates['waited_for_writer']:.0%} for the writer",
        }[self.bound_by]
        return f"bound by {self.bound_by}: {why}"

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def _share(part: float, whole: float) -> float:
    """At most all of it: the tiles of a small slide may be encoded in the time of the next."""
    return round(min(1.0, part / max(whole, 1e-9)), 3)

"""What zooming into slides spared the encoder, and what it cost the readers."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Saving:
    """Of one slide, or of several that one model has zoomed into.

    A tile that was not encoded is worth what one took in the fastest batch: readers and the head slow others down, so
    more is not promised. It is time of the encoder. Where reading bounds a run it is not saved: coarse tiles are
    averaged from the finest pixels, so that all of a slide is read once, and what the model chooses again.
    """

    k: float  # of the model: tiles of a level, or a share of them, that it looks at more closely
    tiles: int  # that are encoded without zooming
    encoded: int
    tile_seconds: float  # of the encoder's device
    again: float  # seconds of reader threads for pixels that had been read for a coarser level

    @classmethod
    def total(cls, savings: Collection["Saving"]) -> "Saving":
        """Of one or more."""
        k, fastest = (min(getattr(one, name) for one in savings) for name in ("k", "tile_seconds"))
        tiles, encoded = sum(one.tiles for one in savings), sum(one.encoded for one in savings)
        return cls(k, tiles, encoded, fastest, sum(one.again for one in savings))

    @property
    def share(self) -> float:
        """Of the tiles, encoded."""
        return self.encoded / self.tiles

    @property
    def seconds(self) -> float:
        """That the encoder was spared, an estimate."""
        return (self.tiles - self.encoded) * self.tile_seconds

    def sentence(self) -> str:
        spared, each = self.tiles - self.encoded, 1000 * self.tile_seconds
        return (
            f"zoom, k = {self.k:g}: {self.encoded} of {self.tiles} tiles encoded ({self.share:.0%}); the encoder was "
            f"spared about {self.seconds:.1f} s ({spared} tiles of {each:.3g} ms, as in the fastest batch); reading "
            f"again what the model chose cost the readers {self.again:.1f} s"
        )

    def as_dict(self) -> dict[str, Any]:
        figures = asdict(self) | {"share": self.share, "seconds_saved": self.seconds}
        return {name: round(value, 6) for name, value in figures.items()}

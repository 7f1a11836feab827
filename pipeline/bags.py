"""What heads are trained on: bags, of whose features and which level, of slides or of patients; or pictures."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from heads import BadBag, Bag
from heads.picture import Picture

from .errors import BrokenBag, SlideError, UsageError
from .output import read_run
from .pictures import Pictures
from .places import placed
from .store import BagStore, read_attrs

CACHE_BYTES = 4 << 30  # of bags that are kept in memory between epochs


class Features(Protocol):
    """Features of one kind, of many slides."""

    dim: int
    levels: list[float]  # µm/px, coarse → fine; empty where it is not known

    def bag(self, slide: str) -> Bag:
        """All levels. Raises BrokenBag."""
        ...

    def state(self, slide: str) -> str:
        """Another one when the features of the slide are others."""
        ...

    def about(self) -> dict[str, Any]:
        """What a model must know of them to be used on new slides."""
        ...


class StoredFeatures:
    """The features of one encoder in an output folder."""

    def __init__(self, store: BagStore, key: str, slide: str) -> None:
        """`slide`: any of those that have them."""
        path = store.group(slide).path
        self._store, self._key = store, key
        self._facts, tiles = read_attrs(path / "features" / key), read_attrs(path / "tiles")
        self.dim: int = self._facts["encoder"]["dim"]
        self.levels: list[float] = [tiles["levels"][k]["mpp"] for k in tiles["encoded"]]

    def bag(self, slide: str) -> Bag:
        return self._store.bag(slide, self._key)

    def state(self, slide: str) -> str:
        return self._store.group(slide).features(self._key).checksums()

    def about(self) -> dict[str, Any]:
        run = read_run(self._store.root)
        encoder = run["encoders"][self._key]
        own = {"encoder": encoder["name"], "weights": encoder["weights_file"], "force_scale": encoder["force_scale"]}
        return {
            "encoder_key": self._key,
            "encoder": self._facts["encoder"],
            "weights_sha256": self._facts["weights_sha256"],
            "feature_hash": self._facts["feature_hash"],
            "encoded_mpp": self.levels,
            "recipe": run["recipe"] | own,
            "versions": run["versions"],
        }


class Store:
    """An output folder of ours, as a place whose slides may be labelled."""

    def __init__(self, out: str | Path) -> None:
        self._store = BagStore(out)
        self.root = self._store.root

    def slides(self) -> list[str]:
        return self._store.slides()

    def origin(self) -> Path:
        root = read_run(self.root).get("root")
        if root is None:
            raise UsageError(f"{self.root} is no output folder of `slidestream run`")
        return placed(root)

    def has_features(self, slide: str) -> bool:
        return self._store.group(slide).status == "complete"

    def features(self, slides: Sequence[str], encoder: str | None) -> StoredFeatures:
        """The one set of features that all these slides have. Raises UsageError if they differ."""
        try:
            key = self._store.group(slides[0]).encoder_key(encoder)
        except BrokenBag as error:
            raise UsageError(str(error)) from error
        hashes: dict[str, list[str]] = defaultdict(list)
        for slide in slides:
            facts = read_attrs(self._store.group(slide).path / "features" / key)
            hashes[facts.get("feature_hash", "none")].append(slide)
        if len(hashes) > 1:
            odd = min(hashes.values(), key=len)
            raise UsageError(
                f"not all slides have the same features ({odd[0]} differs); run `slidestream run` with --redo"
            )
        return StoredFeatures(self._store, key, slides[0])

    def pictures(self, slides: Sequence[str]) -> Pictures:
        return Pictures.of_store(self._store, slides)


def choose_level(levels: Sequence[float], wanted: float | None) -> float | None:
    """The level that a flat head reads, the finest unless told; None where no level has a known µm/px."""
    if not levels:
        if wanted is not None:
            raise UsageError(f"--level {wanted:g}: these features do not say of which µm/px they are")
        return None
    wanted = levels[-1] if wanted is None else wanted
    for mpp in levels:
        if abs(mpp / wanted - 1) < 0.01:
            return mpp
    there = ", ".join(f"{mpp:g}" for mpp in levels)
    raise UsageError(f"--level {wanted:g}: no features at that µm/px; there are {there}")


class Bags(Sequence[Any]):
    """Bags, or pictures, that are read when they are asked for, and kept in memory while they fit.

    units: the slides of each, one or (of a patient) several. level: of all levels (None) or the one at this µm/px. A
    damaged slide is a UsageError: what was asked for cannot be had without it.
    """

    def __init__(self, source: Features | Pictures, units: Iterable[Sequence[str]], level: float | None) -> None:
        self._source, self._units, self._level = source, [tuple(unit) for unit in units], level
        self._kept: dict[int, Bag | Picture] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index in self._kept:
            return self._kept[index]
        bag = self._read(self._units[index])
        if self._bytes < CACHE_BYTES:
            self._kept[index] = bag
            self._bytes += bag.nbytes if isinstance(bag, Picture) else bag.features.nbytes
        return bag

    def _read(self, slides: Sequence[str]) -> Bag | Picture:
        try:
            if isinstance(self._source, Pictures):
                return self._picture(self._source, slides)
            bags = [self._source.bag(slide) for slide in slides]
            return Bag.joined(bags if self._level is None else [bag.at(self._level) for bag in bags])
        except (SlideError, BadBag) as error:
            raise UsageError(str(error)) from error

    def _picture(self, pictures: Pictures, slides: Sequence[str]) -> Picture:
        if len(slides) > 1:
            raise UsageError(f"{slides[0]} and {slides[1]} are of one patient; pictures cannot be joined: --unit slide")
        return pictures.picture(slides[0], self._level)


@dataclass(frozen=True)
class Chosen(Sequence[Bag]):
    """Some rows of bags that are shared by several folds."""

    bags: Sequence[Bag]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.bags[int(self.rows[index])]

"""Is the group of a slide whole? All of its arrays are read again, and its numbers are held against each other.

What is wrong is named: which array, which chunk, how many rows; and what mends it. Nothing is written. At most one
chunk of features and the table of tiles are in memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from extractors import EncoderFacts

from .arrays import StoredArray, read_attrs
from .config import difference, make_config
from .errors import BrokenBag, SlideError, slide_door
from .mending import Commands, Finding, removed
from .quadtree import QuadTree
from .rereading import Reading, chunk_words
from .stages import Recipe
from .store import SCHEMA, SCHEMA_VERSION, SlideGroup
from .treecheck import faults_of_tree

# What every group says of itself.
OWN = {"status": str, "slide": dict, "scale": dict, "reader": dict, "recipe": dict, "hashes": dict, "versions": dict}
UNREADABLE = "its zarr.json is missing or cut"


class Examination:
    """One slide's group, looked through.

    recipe: that of run.json, encoder: whose features have to be there; None where nobody knows.
    """

    def __init__(
        self, group: SlideGroup, commands: Commands, recipe: dict[str, Any] | None = None, encoder: str | None = None
    ) -> None:
        self.attrs = group.attrs
        self._group, self._commands, self._recipe, self._encoder = group, commands, recipe, encoder
        self._tree: QuadTree | None = None

    def findings(self) -> list[Finding]:
        """All that is wrong; of a group that is being written, or cannot be understood, nothing but that is said."""
        own = self._guarded("", self._of_itself)
        if not self.is_committed:
            return own
        found = [*own, *self._guarded("tissue", self._of_tissue), *self._guarded("tiles", self._of_tiles)]
        for key in self._names("features"):
            found += self._guarded(f"features/{key}", partial(self._of_features, key))
        for model in self._names("predictions"):
            found += self._guarded(f"predictions/{model}", partial(self._of_prediction, model))
        return [*found, *self._of_what_holds_them()]

    @property
    def is_understood(self) -> bool:
        """True if its own attributes are a slide's, of this schema."""
        attrs = self.attrs
        ours = (attrs.get("schema"), attrs.get("schema_version")) == (SCHEMA, SCHEMA_VERSION)
        own = all(isinstance(attrs.get(name), kind) for name, kind in OWN.items())
        return ours and own and attrs["slide"].get("path") == self._group.slide

    @property
    def is_committed(self) -> bool:
        """True if it says that it is whole."""
        return self.is_understood and (self.attrs["status"] in ("complete", "empty") or self.is_zoomed)

    @property
    def is_zoomed(self) -> bool:
        """True if a model has predicted it by zoom, which keeps no features."""
        folders = [self._group.path / "predictions" / model for model in self._names("predictions")]
        found = [read_attrs(folder) for folder in folders]
        return any("zoom" in attrs and attrs.get("status") == "complete" for attrs in found)

    @property
    def counted(self) -> int | None:
        """Tiles, by its own count."""
        tiles = self.attrs.get("counts", {}).get("tiles")
        return sum(tiles) if tiles is not None else None

    def _guarded(self, part: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
        """Attributes that cannot be understood may raise anything."""
        try:
            with slide_door(self._group.slide, "store", BrokenBag):
                return list(look())
        except SlideError as error:
            words = f"cannot be understood: {error.reason}"
            return [self._damaged(part, words, self.made_anew())]

    def _damaged(self, part: str, message: str, mend: tuple[str, ...], kind: str = "damaged") -> Finding:
        return Finding(self._group.slide, part, kind, message, mend)

    def _names(self, part: str) -> list[str]:
        folder = self._group.path / part
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []

    def made_again(self) -> tuple[str, ...]:
        """What makes a slide once more where `run` sees by itself that it is not whole, and what is made of it."""
        made = [self._commands.again(key) for key in self._names("features") or (None,)]
        made += map(self._predicted, self._names("predictions"))
        return tuple(command for mend in made for command in mend)

    def made_anew(self) -> tuple[str, ...]:
        """The same where `run` does not see it."""
        return (removed(self._group.path), *self.made_again())

    # -- the slide --

    def _of_itself(self) -> Iterator[Finding]:
        attrs, again = self.attrs, self.made_again()
        if not attrs:
            yield self._damaged("", UNREADABLE, again)
        elif not self.is_understood:
            words = f"its attributes are not of the schema {SCHEMA} {SCHEMA_VERSION}, or of another slide"
            yield self._damaged("", words, self.made_anew())
        elif not self.is_committed:
            if attrs["status"] == "writing":
                yield self._damaged("", "is not finished", again, "unfinished")
            else:
                yield self._damaged("", f"its status is {attrs['status']!r}", again)
        else:
            if self._recipe is not None and (changes := difference(attrs["recipe"], self._recipe)):
                words = f"was made by another recipe than run.json tells: {'; '.join(changes)}"
                yield self._damaged("", words, again, "outdated")
            if (
                attrs["status"] == "complete"
                and self._encoder not in (None, *self._names("features"))
                and not self.is_zoomed
            ):
                yield self._damaged(f"features/{self._encoder}", "is missing", self._commands.again(self._encoder))
            if attrs["status"] == "complete" and not self._names("features"):
                yield self._damaged("features", "is missing", self._commands.again())

    def _of_what_holds_them(self) -> Iterator[Finding]:
        """The groups of groups, which say nothing but must be there for zarr; and what a killed writer left."""
        for part in ("features", "predictions"):
            document = self._group.path / part / "zarr.json"
            if self._names(part) and not _is_json(document):
                made = [f"{part}/{name}" for name in self._names(part)]
                yield self._damaged(part, UNREADABLE, self._anew(part, *made))
        for left in sorted(self._group.path.rglob("*.partial")):
            yield stray(self._group.slide, left, str(left.relative_to(self._group.path)))

    def _anew(self, place: str, *parts: str) -> tuple[str, ...]:
        """Delete what is at `place`, and make these features and predictions again."""
        keys = [part.partition("/")[2] for part in parts if part.startswith("features/")]
        models = [part.partition("/")[2] for part in parts if part.startswith("predictions/")]
        made = [self._commands.again(key) for key in keys] + [self._predicted(model) for model in models]
        return (removed(self._group.path / place), *(command for mend in made for command in mend))

    # -- tissue and tiles --

    def _of_tissue(self) -> Iterator[Finding]:
        facts, redo = read_attrs(self._group.path / "tissue"), self._redo_all()
        if not {"downsample", "mpp", "method", "warnings"} <= facts.keys():
            yield self._damaged("tissue", UNREADABLE, redo)
        damage = [*self._damage("tissue/mask", redo), *self._damage("tissue/thumbnail", redo)]
        yield from damage
        if damage:
            return
        mask, thumbnail = (StoredArray.open(self._group.path / "tissue" / name) for name in ("mask", "thumbnail"))
        if thumbnail.shape != (*mask.shape, 3):
            words = f"the mask is of shape {mask.shape}, the thumbnail of {thumbnail.shape}"
            yield self._damaged("tissue", words, self.made_anew())

    def _of_tiles(self) -> Iterator[Finding]:
        redo = self._redo_all()
        if "levels" not in read_attrs(self._group.path / "tiles"):
            yield self._damaged("tiles", UNREADABLE, redo)
        names = ("grid", "xy", "tissue", "parent")
        damage = [finding for name in names for finding in self._damage(f"tiles/{name}", redo)]
        yield from damage
        if damage or "levels" not in read_attrs(self._group.path / "tiles"):
            return
        try:
            tree = self._group.tree()
        except BrokenBag as error:
            yield self._damaged("tiles", error.reason.split(". Run ")[0], redo)
            return
        self._tree = tree
        for part, fault in faults_of_tree(tree, in_order=self.attrs["recipe"].get("tiler") is None):
            yield self._damaged(f"tiles{part}", fault, self.made_anew())
        counts = self.attrs.get("counts", {})
        if counts.get("tiles") != [level.stop - level.start for level in tree.levels]:
            words = f"counts.tiles is {counts.get('tiles')}, the table has {[len(level.grid) for level in tree.levels]}"
            yield self._damaged("", words, self._recount())
        if (self.attrs["status"] == "empty") != (len(tree) == 0):
            words = f"its status is {self.attrs['status']}, and it has {len(tree)} tiles"
            yield self._damaged("", words, self.made_anew())

    def _redo_all(self) -> tuple[str, ...]:
        """Tissue or tiles that are made again take with them what was made of them."""
        keys, models = self._names("features"), self._names("predictions")
        made = [self._commands.redo(self._group.path, key) for key in keys or (None,)]
        return tuple(command for mend in [*made, *map(self._predicted, models)] for command in mend)

    def _recount(self) -> tuple[str, ...]:
        """Counts are written at the end, after features."""
        keys = self._names("features")
        place = self._group.path / "features" / keys[0] if keys else self._group.path
        return self._commands.anew(place, *keys[:1])

    # -- features --

    def _of_features(self, key: str) -> Iterator[Finding]:
        part, again = f"features/{key}", self._commands.again(key)
        facts = read_attrs(self._group.path / part)
        if not facts:
            yield self._damaged(part, UNREADABLE, again)
            return
        if facts.get("status") != "complete":
            yield self._damaged(part, "is not finished", again, "unfinished")
            return
        for name, wanted in self._wanted(key, facts).items():
            if facts.get(name) != wanted:
                mend = self._anew(part, part) if name == "levels" else again  # at which `run` does not look
                yield self._damaged(part, f"its {name} is {facts.get(name)!r}, and should be {wanted!r}", mend)
        yield from self._of_rows(part, key, facts)

    def _wanted(self, key: str, facts: dict[str, Any]) -> dict[str, Any]:
        """Attributes of features, from the group they belong to."""
        wanted = {"tiles": self.attrs["hashes"].get("tiles"), "reader": self.attrs["reader"]["used"]}
        if self._tree is None:
            return wanted
        told: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in facts["encoder"].items()}
        recipe = Recipe(make_config(), EncoderFacts(**told), key, facts["weights_sha256"], facts["weights"])
        return wanted | {
            "levels": list(self._tree.encoded_levels),
            "feature_hash": recipe.hash_of(self._tree.facts()),
        }

    def _of_rows(self, part: str, key: str, facts: dict[str, Any]) -> Iterator[Finding]:
        again, redo = self._commands.again(key), self._commands.redo(self._group.path / part, key)
        anew = self._anew(part, part, *self._made_of(facts["feature_hash"]))
        arrays = {name: self._opened(f"{part}/{name}") for name in ("x", "valid")}
        for name, array in arrays.items():
            if array is None:
                yield self._damaged(f"{part}/{name}", UNREADABLE, anew[1:])
        x, valid = arrays["x"], arrays["valid"]
        if x is None or valid is None:
            return
        rows = None if self._tree is None else len(self._tree.encoded_rows)
        shapes, told = (x.shape, valid.shape), ((rows, facts["encoder"]["dim"]), (rows,))
        if rows is not None and shapes != told:
            yield self._damaged(part, f"x and valid are of shape {shapes}, the tiles ask for {told}", again)
            return
        reading = Reading(valid)
        whole = np.ones(valid.shape, bool)
        for at, values in reading:
            whole[at] = values
        yield from self._lost(f"{part}/valid", reading, again, redo)
        known = not reading.faults
        reading, odd, filled = Reading(x), 0, 0
        for at, values in reading:
            odd += int(np.count_nonzero(~np.isfinite(values).all(axis=1)))
            filled += int(np.count_nonzero(values[~whole[at]].any(axis=1)))
        yield from self._lost(f"{part}/x", reading, again, redo)
        if odd:
            yield self._damaged(f"{part}/x", f"{odd} of {len(whole)} rows hold NaN or inf", anew)
        if filled:
            yield self._damaged(f"{part}/x", f"{filled} rows are not valid, and not zero", anew)
        invalid, counted = int(np.count_nonzero(~whole)), self.attrs.get("counts", {}).get("invalid")
        if known and self.attrs["status"] == "complete" and counted != invalid:
            yield self._damaged("", f"counts.invalid is {counted}, {part}/valid tells {invalid}", self._recount())

    def _made_of(self, feature_hash: str) -> list[str]:
        """The predictions that were made of these features."""
        names = [f"predictions/{model}" for model in self._names("predictions")]
        return [name for name in names if read_attrs(self._group.path / name).get("feature_hash") == feature_hash]

    # -- predictions --

    def _of_prediction(self, model: str) -> Iterator[Finding]:
        part, mend = f"predictions/{model}", self._predicted(model)
        attrs = read_attrs(self._group.path / part)
        if attrs.get("status") != "complete":
            yield self._damaged(part, "is not finished", mend, "unfinished")
            return
        names = self._names(part)
        damage = [finding for name in names for finding in self._damage(f"{part}/{name}", mend)]
        yield from damage
        for name, wanted in (("tiles", self.attrs["hashes"].get("tiles")), ("feature_hash", None)):
            if name == "tiles" and attrs.get(name, wanted) != wanted:
                yield self._damaged(part, "was made of other tiles than are stored", mend, "outdated")
            elif name == "feature_hash" and not self._has_features_of(attrs):
                yield self._damaged(part, "was made of features that are not there", mend, "outdated")
        if damage:
            return
        found = {name: StoredArray.open(self._group.path / part / name) for name in names}
        if "logits" in found and not np.isfinite(found["logits"].read()).all():
            yield self._damaged(f"{part}/logits", "holds NaN or inf", mend)
        if (wanted := self._scores(attrs)) is not None and {found[name].shape for name in ("raw", "weight")} != {
            wanted
        }:
            shapes = " and ".join(str(found[name].shape[0]) for name in ("raw", "weight"))
            yield self._damaged(part, f"has scores of {shapes} tiles, the level has {wanted[0]}", mend)

    def _has_features_of(self, attrs: dict[str, Any]) -> bool:
        """True also for predictions of what is no features: pixels, or those that a zoom did not keep."""
        if "zoom" in attrs or attrs.get("levels") == []:
            return True
        keys = self._names("features")
        there = {read_attrs(self._group.path / "features" / key).get("feature_hash") for key in keys}
        return attrs.get("feature_hash") in there

    def _scores(self, attrs: dict[str, Any]) -> tuple[int] | None:
        """How many tiles have scores, if a head read one level of the tree."""
        levels = attrs.get("levels", [])
        if self._tree is None or len(levels) != 1:
            return None
        return (len(self._tree.levels[levels[0]].grid),)

    def _predicted(self, model: str) -> tuple[str, ...]:
        """What makes a prediction again."""
        place = self._group.path / "predictions" / model
        attrs = read_attrs(place)
        if model.endswith(".stitched"):
            return self._commands.stitch(place, model.removesuffix(".stitched"), self._group.slide, attrs)
        return self._commands.zoom(place, model) if "zoom" in attrs else self._commands.predict(model)

    # -- arrays --

    def _opened(self, name: str) -> StoredArray | None:
        try:
            return StoredArray.open(self._group.path / name)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _damage(self, name: str, mend: tuple[str, ...]) -> Iterator[Finding]:
        """What is wrong with an array that is read for this alone."""
        array = self._opened(name)
        if array is None:
            yield self._damaged(name, UNREADABLE, mend)
            return
        reading = Reading(array)
        for _ in reading:
            pass
        yield from self._lost(name, reading, mend, mend)

    def _lost(self, name: str, reading: Reading, again: tuple[str, ...], redo: tuple[str, ...]) -> Iterator[Finding]:
        for fault, chunks in reading.faults.items():
            yield self._damaged(name, chunk_words(chunks, fault), again if fault == Reading.MISSING else redo)


def stray(slide: str, path: Path, part: str) -> Finding:
    """A file that a killed writer left: harmless."""
    return Finding(slide, part, "note", "was left by a killed writer; nothing reads it", (removed(path),))


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False

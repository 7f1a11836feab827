"""Where everything about a slide is kept: one Zarr v3 group per slide, resumable, and whole only when it says so.

A group is written in place; its own attributes come last and say `complete` or `empty`. Features are written in whole
chunks of rows, each once: a chunk that exists is finished, whatever happened after.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import PLAIN, DamagedArray, StoredArray, read_attrs, write_group
from .errors import BrokenBag, UsageError, nearest, slide_door
from .objects import ObjectPath
from .places import is_remote, of_each, placed, remove_tree, walk
from .quadtree import QuadTree
from .tissue import TissueMask

if TYPE_CHECKING:
    from heads import Bag

SCHEMA = "slidestream/bag"
SCHEMA_VERSION = 1
CHUNK_ROWS = 2048
MAX_NAME_BYTES = 240
CHECKSUM_BYTES = 4  # the end of every chunk


class BagStore:
    """The slides of an output folder.

    >>> bag = BagStore("out/").bag("case1/a.svs", encoder="resnet50")  # a heads.Bag
    """

    def __init__(self, root: str | Path) -> None:
        self.root = placed(root)

    def group(self, slide: str) -> "SlideGroup":
        """The group of a slide, whether it is there or not."""
        return SlideGroup(self.root / "slides" / group_path(slide), slide)

    def slides(self) -> list[str]:
        """The slides that have a readable group, sorted; look at `group(slide).status` for what it is worth."""
        names = of_each(_name_of, list(group_folders(self.root / "slides")), self.root)
        return sorted(name for name in names if name is not None)

    def bag(self, slide: str, encoder: str | None = None) -> "Bag":
        """The stored features of a slide as a heads.Bag. `encoder` may be left out where there is one only.

        Raises BrokenBag if the slide is not complete, damaged, or has no features of this encoder.
        """
        from heads import Bag, BagLevel

        group = self.group(slide)
        group.require_complete()
        tree, features = group.tree(), group.features(group.encoder_key(encoder))
        x, valid = features.read()
        levels, at = [], 0
        for k, level in enumerate(tree.levels):
            n = level.stop - level.start
            has = k in tree.encoded_levels
            rows = slice(at, at + n)
            levels.append(
                BagLevel.of(
                    x[rows] if has else None,
                    grid=level.grid,
                    tissue=level.tissue,
                    parent=level.parent,
                    valid=valid[rows] if has else None,
                    xy=level.xy,
                    mpp=level.mpp,
                    tile_px=level.tile_px,
                    span_px=level.span_px,
                )
            )
            at += n if has else 0
        return Bag(levels=levels, slide=slide)


def _name_of(group: Path) -> str | None:
    """The slide of a group; its other attributes, of thousands of slides, are not kept."""
    slide = read_attrs(group).get("slide")
    return None if slide is None else str(slide["path"])


def group_folders(slides: Path) -> Iterator[Path]:
    """The folders of all groups below `slides`."""
    for folder, names, _ in walk(slides):
        groups = sorted(name for name in names if name.endswith(".zarr"))
        names[:] = [name for name in names if name not in groups]
        yield from (folder / name for name in groups)


def group_path(slide: str) -> Path:
    """The folder of a slide's group below `slides/`; a name too long for a file system is cut and gets its hash."""
    pure = PurePosixPath(slide)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise UsageError(f"{slide!r} is no slide of this folder")
    return Path(*pure.parts[:-1], short_name(pure.name, ".zarr"))


def short_name(name: str, suffix: str) -> str:
    raw = os.fsencode(name)
    if len(raw) + len(suffix) <= MAX_NAME_BYTES:
        return name + suffix
    return (
        os.fsdecode(raw[:160]).encode("utf-8", "ignore").decode() + "-" + hashlib.sha256(raw).hexdigest()[:16] + suffix
    )


class SlideGroup:
    """One slide's group on disk."""

    def __init__(self, path: Path, slide: str) -> None:
        self.path = path
        self.slide = slide

    @property
    def attrs(self) -> dict[str, Any]:
        return read_attrs(self.path)

    @property
    def status(self) -> str:
        """writing, complete or empty; missing if there is nothing that can be read."""
        attrs = self.attrs
        return attrs.get("status", "missing") if attrs.get("schema") == SCHEMA else "missing"

    def begin(self, status: str = "writing", **attrs: Any) -> None:
        """Start or take up a group. One whose own attributes cannot be read is begun anew."""
        old = self.attrs
        if not old and self.path.exists():
            remove_tree(self.path)
        self._sweep()
        hashes = old.get("hashes", {})
        self.update(schema=SCHEMA, schema_version=SCHEMA_VERSION, status=status, hashes=hashes, **attrs)

    def _sweep(self) -> None:
        """Remove what a killed writer left half-written: a file is written aside and renamed, an object is not."""
        if is_remote(self.path):
            return
        for part in self.path.rglob("*.partial"):
            part.unlink(missing_ok=True)

    def update(self, **attrs: Any) -> None:
        write_group(self.path, self.attrs | attrs)

    def drop(self, *parts: str) -> None:
        """Delete parts of the group (`tissue`, `tiles`, `features`, `predictions`)."""
        for part in parts:
            remove_tree(self.path / part, ignore_errors=True)

    def finish(self, status: str, **attrs: Any) -> None:
        """The last write: from now on the group is whole."""
        self.update(status=status, **attrs)

    def write_tissue(self, mask: TissueMask, thumbnail: np.ndarray, tissue_hash: str) -> None:
        if self.attrs.get("hashes"):
            self.update(hashes={})  # a writer killed below must not leave new tissue under the hash of the old
        self.drop("tissue", "tiles", "features", "predictions")
        facts = {
            "downsample": list(mask.downsample),
            "mpp": mask.mpp,
            "method": mask.method,
            "warnings": list(mask.warnings),
        }
        write_group(self.path / "tissue", facts)
        StoredArray.write(self.path / "tissue/mask", mask.image.astype(np.uint8))
        StoredArray.write(self.path / "tissue/thumbnail", thumbnail)
        self.update(hashes={"tissue": tissue_hash})

    def write_tiles(self, tree: QuadTree) -> None:
        self.drop("tiles", "features", "predictions")
        write_group(self.path / "tiles", tree.facts())
        for name in ("grid", "xy", "tissue", "parent"):
            StoredArray.write(self.path / "tiles" / name, getattr(tree, name))
        self.update(hashes={"tissue": self.attrs["hashes"]["tissue"], "tiles": tree.hash})

    def mask(self) -> TissueMask:
        with self._door():
            facts = read_attrs(self.path / "tissue")
            image = self._whole("tissue/mask").astype(bool)
            return TissueMask(
                image, tuple(facts["downsample"]), facts["mpp"], facts["method"], tuple(facts["warnings"])
            )

    def thumbnail(self) -> np.ndarray:
        with self._door():
            return self._whole("tissue/thumbnail")

    def tree(self) -> QuadTree:
        """The stored tiles; BrokenBag if they are not what their hash says."""
        with self._door():
            facts = read_attrs(self.path / "tiles")
            grid, xy, tissue, parent = (self._whole(f"tiles/{name}") for name in ("grid", "xy", "tissue", "parent"))
            scales = tuple((part["mpp"], part["span_px"], part["start"], part["stop"]) for part in facts["levels"])
            encoded = tuple(facts["encoded"])
            tree = QuadTree(
                grid,
                xy,
                tissue,
                parent,
                scales,
                facts["levels"][0]["tile_px"],
                tuple(facts["origin"]),
                facts["overlap"],
                facts["regular"],
                () if len(encoded) == len(scales) else encoded,
            )
        if tree.hash != self.attrs.get("hashes", {}).get("tiles"):
            raise self._broken("its table of tiles is not the one that was written")
        return tree

    def _door(self):  # type: ignore[no-untyped-def]  # a context manager
        return slide_door(self.slide, "store", BrokenBag)

    def _whole(self, name: str) -> np.ndarray:
        try:
            return StoredArray.open(self.path / name).read()
        except DamagedArray as error:
            raise self._broken(f"{name}: {error}") from error

    def _broken(self, what: str) -> BrokenBag:
        return BrokenBag(
            self.slide, "store", f"{what}. Run the same command with --redo: it recomputes what is damaged"
        )

    def require_complete(self) -> None:
        if self.status == "empty":
            raise BrokenBag(self.slide, "store", "the slide has no tissue, so it has no features")
        if self.status != "complete":
            found = {"missing": "has not been processed", "writing": "is not finished"}[self.status]
            raise BrokenBag(self.slide, "store", f"the slide {found}; run `slidestream run` again, it resumes")

    def encoders(self) -> list[str]:
        """The keys of the feature groups that are complete."""
        folder = self.path / "features"
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return [name for name in names if read_attrs(folder / name).get("status") == "complete"]

    def encoder_key(self, encoder: str | None) -> str:
        """The feature group that is meant: its key, or an encoder's name where one group only is of that encoder."""
        there = self.encoders()
        wanted = (
            there
            if encoder is None
            else [k for k in there if k == encoder or k.split("@")[0] == encoder.replace("/", "--")]
        )
        exact = [key for key in wanted if key == encoder]
        if len(exact or wanted) == 1:
            return (exact or wanted)[0]
        if not there:
            raise BrokenBag(self.slide, "store", "the slide has no complete features")
        if wanted:
            raise BrokenBag(self.slide, "store", f"more than one set of features fits, say which: {', '.join(wanted)}")
        raise BrokenBag(self.slide, "store", nearest(encoder or "", there, "encoder"))

    def features(self, key: str) -> "Features":
        return Features(self, key)

    def write_prediction(self, model: str, arrays: dict[str, np.ndarray], **attrs: Any) -> None:
        """predictions/<model>: small arrays and, last, their attributes with `status: complete`."""
        name = f"predictions/{model}"
        self.drop(name)
        self._make_room("predictions")
        for key, array in arrays.items():
            StoredArray.write(self.path / name / key, array)
        write_group(self.path / name, attrs | {"status": "complete"})

    def prediction(self, model: str) -> dict[str, np.ndarray]:
        folder = self.path / "predictions" / model
        if read_attrs(folder).get("status") != "complete":
            raise BrokenBag(self.slide, "store", f"there is no prediction of the model {model!r}")
        with self._door():
            names = sorted(path.parent.name for path in folder.glob("*/zarr.json"))
            return {name: self._whole(f"predictions/{model}/{name}") for name in names}

    def _make_room(self, part: str) -> None:
        """`features` and `predictions` are groups of groups."""
        if not (self.path / part / "zarr.json").exists():
            write_group(self.path / part, {})


class Features:
    """One encoder's features of a slide: `x` (M, D) and `valid` (M,), rows of the encoded levels in table order."""

    def __init__(self, group: SlideGroup, key: str) -> None:
        self.group = group
        self.key = key
        self.path = group.path / "features" / key

    @property
    def attrs(self) -> dict[str, Any]:
        return read_attrs(self.path)

    def begin(self, rows: int, dim: int, dtype: str, **attrs: Any) -> None:
        """Start, or take up what is current; features of anything else under this key are deleted first."""
        old = self.attrs
        if any(old.get(name) != value for name, value in attrs.items()) or not self._arrays_fit(rows, dim, dtype):
            self._drop(old.get("feature_hash"))
            self.group._make_room("features")
            StoredArray.create(self.path / "valid", (rows,), bool, _chunk_rows(rows))
            StoredArray.create(self.path / "x", (rows, dim), dtype, _chunk_rows(rows), PLAIN)
        # After the arrays: attributes that fit say that these were begun for them.
        write_group(self.path, attrs | {"status": "writing"})
        self._x, self._valid = self._open()

    def _drop(self, feature_hash: str | None) -> None:
        """Delete these features, and the predictions that were made of them."""
        folder = self.group.path / "predictions"
        made = [p.name for p in folder.glob("*") if read_attrs(p).get("feature_hash") == feature_hash]
        self.group.drop(f"features/{self.key}", *(f"predictions/{name}" for name in made))

    def _arrays_fit(self, rows: int, dim: int, dtype: str) -> bool:
        try:
            x, valid = self._open()
        except (OSError, ValueError, KeyError, TypeError):
            return False
        chunks = ((_chunk_rows(rows), dim), (_chunk_rows(rows),))
        found = (x.shape, valid.shape, x.chunk_shape, valid.chunk_shape, x.dtype)
        return found == ((rows, dim), (rows,), *chunks, np.dtype(dtype))

    def _open(self) -> tuple[StoredArray, StoredArray]:
        return StoredArray.open(self.path / "x"), StoredArray.open(self.path / "valid")

    @property
    def dtype(self) -> np.dtype:
        return self._x.dtype

    def stored_valid(self) -> np.ndarray:
        """(M,) bool of features that are being written; rows whose chunk is missing are False."""
        return np.asarray(self._valid.stored[...])

    def missing_rows(self) -> np.ndarray:
        """(M,) bool: the rows whose chunk is not there yet, or is damaged."""
        missing = np.zeros(self._x.shape[0], bool)
        for array in (self._x, self._valid):
            lost = set(array.missing())
            for chunk in array.chunks:
                if chunk in lost or array.is_damaged(chunk):
                    missing[array.rows(chunk)] = True
        return missing

    def write_chunk(self, chunk: int, x: np.ndarray, valid: np.ndarray) -> None:
        """One whole chunk of rows; `valid` first, so that an `x` chunk that exists has its `valid`."""
        self._valid.write_chunk(chunk, valid)
        self._x.write_chunk(chunk, x)

    def chunks_are_there(self) -> bool:
        """Every chunk is stored, in its full size where that is known; no chunk is read."""
        with self.group._door():
            return not any(array.missing() for array in self._open())

    def checksums(self) -> str:
        """Of all chunks as they were written: changes with the features. No chunk is read whole."""
        total = hashlib.sha256()
        chunks = [path for name in ("x", "valid") for path in (self.path / name / "c").rglob("*") if path.is_file()]
        for path in sorted(chunks):
            total.update(_end(path))
        return total.hexdigest()

    def finish(self, **attrs: Any) -> None:
        write_group(self.path, self.attrs | attrs | {"status": "complete"})

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """x (M, D) float16 or float32 and valid (M,) bool. BrokenBag if a chunk is missing or fails its checksum."""
        if self.attrs.get("status") != "complete":
            raise BrokenBag(self.group.slide, "store", f"its features of {self.key} are not finished")
        with self.group._door():
            return self.group._whole(f"features/{self.key}/x"), self.group._whole(f"features/{self.key}/valid")


def _end(path: Path) -> bytes:
    """The checksum of a chunk."""
    size = path.stat().st_size
    if isinstance(path, ObjectPath):
        return path.read_range(max(0, size - CHECKSUM_BYTES), size)
    with open(path, "rb") as file:
        file.seek(max(0, size - CHECKSUM_BYTES))
        return file.read()


def _chunk_rows(rows: int) -> int:
    """Of features: chunks are stored whole, and a biopsy with 70 tiles need not take the 4 MB of 2,048."""
    return min(CHUNK_ROWS, max(rows, 1))
